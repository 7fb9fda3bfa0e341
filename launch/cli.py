"""``dmi launch``: one stage of a recipe, or all of them, on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dmi_hpc.cli.options import Out, RecipeFile, new_app, recipe_of
from dmi_hpc.config import Recipe
from dmi_hpc.errors import LaunchError
from dmi_hpc.watch import stop_on_signals
from launch.cluster import Job, run

app = new_app()

STAGES = ("data", "search", "train", "evaluate", "report")


@app.command()
def launch(
    stage: Annotated[str, typer.Argument(help=" | ".join((*STAGES, "all")))],
    recipe: RecipeFile,
    out: Out = None,
    ranks: Annotated[int | None, typer.Option("-n", min=1, help="training ranks")] = None,
) -> None:
    """Start a stage with the ranks it needs; finished parts are kept, interrupted ones continued.

    `all` goes from nothing to the report: data, search (if the recipe trains its winner), training,
    evaluation, report.
    """
    if stage not in (*STAGES, "all"):
        raise LaunchError(f"no stage '{stage}'; stages: {', '.join((*STAGES, 'all'))}")
    with stop_on_signals() as stop:
        loaded = recipe_of(recipe)
        folder = (out or Path("runs") / loaded.name).resolve()
        count = ranks or ranks_of(loaded)
        for name in stages_of(loaded) if stage == "all" else (stage,):
            run(job_of(name, recipe, folder, count), stop)


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages of a whole run, in order: data from a user is not built, no search without need."""
    searched = recipe.model.source == "search"
    imported = recipe.data.path is not None
    return tuple(s for s in STAGES if (s != "search" or searched) and (s != "data" or not imported))


def job_of(stage: str, recipe: Path, folder: Path, ranks: int) -> Job:
    """Command line and ranks of one stage."""
    arguments: tuple[str, ...]
    match stage:
        case "data":
            arguments = ("data", "build", str(recipe), "--out", str(folder), "--resume")
        case "search" | "train":
            arguments = (stage, str(recipe), "--out", str(folder), "--resume")
        case _:
            arguments = (stage, str(folder))
    return Job(arguments, ranks if stage == "train" else 1, folder / "logs")


def ranks_of(recipe: Recipe) -> int:
    """Training ranks: as the recipe says, or one per GPU, or two on a CPU with at least two cores."""
    if recipe.launch.ranks != "auto":
        return recipe.launch.ranks
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(2, len(os.sched_getaffinity(0)))
