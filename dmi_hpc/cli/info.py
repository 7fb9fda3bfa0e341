"""``dmi info``: this installation and machine, or the state of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dmi_hpc.cli.options import new_app
from dmi_hpc.watch import say

app = new_app()


@app.command()
def info(
    run_folder: Annotated[Path | None, typer.Argument(help="run folder")] = None,
) -> None:
    """Versions, hardware and ranks as DMI-HPC sees them; or what a run folder holds."""
    from dmi_hpc.run import hardware, open_run, versions
    from dmi_hpc.tasks import TASKS
    from dmi_hpc.world import detect

    if run_folder is None:
        world = detect()
        found = {
            "versions": versions(),
            "hardware": hardware(),
            "rank": f"{world.rank} of {world.size} (from: {world.source})",
            "tasks": sorted(TASKS),
        }
        say(json.dumps(found, indent=1))
        return
    run = open_run(run_folder.resolve())
    say(f"run {run.recipe.name}, task {run.recipe.task['name']}, seed {run.recipe.seed}")
    for name, path in (
        ("data", run.data / "manifest.json"),
        ("search", run.winner),
        ("training", run.train / "status.json"),
        ("evaluation", run.folder / "evaluation.json"),
        ("report", run.folder / "report.html"),
    ):
        say(f"  {name:<10} {path if path.exists() else 'not yet'}")
    status = run.train / "status.json"
    if status.exists():
        say(json.dumps(json.loads(status.read_text()), indent=1))
