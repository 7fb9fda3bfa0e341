"""``dmi study``: one recipe with several seeds, and at several points; what they say together."""

from __future__ import annotations

import json
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmi_hpc.cli.options import RecipeFile, new_app
from dmi_hpc.watch import StopFlag, console, progress_bar, say, stop_on_signals

if TYPE_CHECKING:
    from dmi_hpc.study.plan import Member
    from dmi_hpc.study.pool import Outcome, Work

app = new_app()


@app.command()
def study(
    recipe: RecipeFile,
    seeds: Annotated[str, typer.Option(help="of the trainings, separated by commas")] = "0,1,2",
    vary: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE,VALUE of the recipe, such as data.train_rows=250,1000"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="folder of the study; default: studies/NAME of the recipe")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="trainings at once")] = 1,
    no_baselines: Annotated[
        bool, typer.Option("--no-baselines", help="the network alone; else once at each point")
    ] = False,
    ensemble: Annotated[
        bool,
        typer.Option("--ensemble", help="keep the networks of each point as one, for dmi predict"),
    ] = False,
) -> None:
    """Train a recipe with each seed, at each point of --vary, and score all on the test split.

    The same command continues where an earlier one ended. results.md has the table, results.json all
    numbers, runs/ an ordinary run folder of each training.
    """
    from dmi_hpc.config import load_recipe
    from dmi_hpc.errors import Interrupted
    from dmi_hpc.files import exclusive
    from dmi_hpc.study.plan import members, points, varied
    from dmi_hpc.study.pool import Work

    folder = (out or Path("studies") / load_recipe(recipe).name).resolve()
    chosen = points(varied(vary or ()))
    found = members(recipe, chosen, _seeds(seeds), folder / "runs")
    _require_data(found)
    first = {member.point.name: member for member in reversed(found)}
    works = [
        Work(member, not no_baselines and first[member.point.name] is member) for member in found
    ]
    with stop_on_signals() as stop, exclusive(folder, "study"):
        outcomes = _trained(works, folder, workers, stop)
        if stop or any(outcome.state == "interrupted" for outcome in outcomes.values()):
            raise Interrupted("all state is saved; the same command continues")
        failed = _write(folder, found, outcomes)
    if ensemble:
        _keep_ensembles(folder, found, outcomes)
    if failed:
        raise typer.Exit(1)


def _seeds(text: str) -> list[int]:
    from dmi_hpc.errors import RecipeError

    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 0 or len(set(found)) < len(found):
        raise RecipeError(
            f"--seeds: found {text!r}, expected different whole numbers such as 0,1,2"
        )
    return found


def _require_data(found: list[Member]) -> None:
    """Raises RecipeError without data.path, DataError if there is no data set; before all trainings."""
    from dmi_hpc.data.manifest import read_manifest
    from dmi_hpc.errors import RecipeError

    for path in dict.fromkeys(member.recipe.data.path for member in found):
        if path is None:
            raise RecipeError(
                "data.path: missing. The seeds of a study learn from one data set: name it in the "
                "recipe, or with --vary data.path=FOLDER"
            )
        read_manifest(path)


def _trained(works: list[Work], folder: Path, workers: int, stop: StopFlag) -> dict[Path, Outcome]:
    """The outcome of every work, by run folder; what has been evaluated is not done again."""
    from dmi_hpc.study.pool import Outcome, run_all

    outcomes: dict[Path, Outcome] = {}
    for work in works:
        if _is_done(work):
            outcomes[work.member.folder] = Outcome("done")
    left = [work for work in works if work.member.folder not in outcomes]
    if not left:
        return outcomes
    bar = progress_bar(console())
    with bar:
        line = bar.add_task("training", total=len(works), completed=len(outcomes), note="")

        def told(work: Work, outcome: Outcome) -> None:
            member = work.member
            outcomes[member.folder] = outcome
            text = f"{member.point.name}, seed {member.seed}: {outcome.state}"
            if outcome.state != "done" or bar.disable:
                reason = f": {outcome.reason}" if outcome.reason else ""
                console().print(text + reason, markup=False, highlight=False)
            bar.update(line, completed=len(outcomes), note=text)

        run_all(left, min(workers, len(left)), folder / "study.log", stop, told)
    return outcomes


def _is_done(work: Work) -> bool:
    """Trained to the end by this very recipe, and evaluated with what is asked for."""
    from dmi_hpc.run import open_run
    from dmi_hpc.tasks import make_task

    folder, recipe = work.member.folder, work.member.recipe
    files = folder / "train" / "status.json", folder / "evaluation.json"
    if not all(file.exists() for file in files):
        return False
    open_run(folder, recipe)  # refuses another one's folder
    status, evaluation = (json.loads(file.read_text()) for file in files)
    if status.get("best_checkpoint") != evaluation["checkpoint"]:  # evaluated on its way
        return False
    compared = len(evaluation["methods"]) > 1 or not make_task(recipe.task).baselines()
    return compared or not work.baselines


def _write(folder: Path, found: list[Member], outcomes: dict[Path, Outcome]) -> bool:
    """results.json and results.md, which is shown, too; whether a training failed."""
    from dmi_hpc.files import write_json, write_text, writing
    from dmi_hpc.run import hardware, versions
    from dmi_hpc.study.results import gathered, markdown, over_data, results_row, summary

    points = [summary(result) for result in gathered(found, outcomes)]
    machine, made = hardware(), versions()
    gpus = machine["gpus"] if any("cuda" in point.get("device", "") for point in points) else []
    command = shlex.join(["dmi", *sys.argv[1:]])
    about: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": ", ".join([machine["cpu"], f"{machine['host_cores']} cores", *gpus]),
        "versions": f"dmi-hpc {made['dmi-hpc']}, torch {made['torch']}",
    }
    if data := {point["data"] for point in points if "data" in point}:
        about["data"] = ", ".join(sorted(data))
    title = found[0].recipe.name
    text = markdown(title, command, about, points)
    rows = [results_row(title, command, about, point) for point in points if "mean" in point]
    as_rows = ["", "As a row of a list of results:", "", "```", *rows, "```", ""] if rows else []
    content = {"command": command, **about, "points": points, "over_data": over_data(points)}
    with writing(folder):
        write_json(folder / "results.json", content)
        write_text(folder / "results.md", text + "\n".join(as_rows))
    say(text.rstrip())
    say(f"\nin {folder / 'results.md'}")
    return any(point["failed"] for point in points)


def _keep_ensembles(folder: Path, found: list[Member], outcomes: dict[Path, Outcome]) -> None:
    """The networks of each point as one, in FOLDER/ensembles/POINT."""
    from dmi_hpc.ensemble import Calibration, save_ensemble
    from dmi_hpc.files import writing
    from dmi_hpc.predict import load

    for name in dict.fromkeys(member.point.name for member in found):
        kept = [
            member
            for member in found
            if member.point.name == name and outcomes[member.folder].state == "done"
        ]
        if len(kept) < 2:
            continue
        models = {f"seed-{member.seed}": load(member.folder, device="cpu") for member in kept}
        target = folder / "ensembles" / name
        with writing(folder):
            target.parent.mkdir(exist_ok=True)
            save_ensemble(target, models, Calibration(), {})
        say(f"ensemble of {len(kept)} in {target}")
