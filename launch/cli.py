"""``dmi launch``: a stage of a recipe, or all of them: here, on many nodes, or as a job for later."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dmi_hpc.cli.options import Out, recipe_of
from dmi_hpc.config import Recipe
from dmi_hpc.errors import LaunchError
from dmi_hpc.watch import stop_on_signals
from dmi_hpc.world import detect
from launch.allocation import require_place, scheduler_around
from launch.cluster import Command, command_line, run
from launch.job import OPTIONS
from launch.machine_tools import machines, pack
from launch.stages import STAGES, arguments_of, stages_of
from launch.tools import TOOLS

ALL = (*STAGES, "all", "check")


class Group(TyperGroup):
    """`dmi launch STAGE RECIPE` means `dmi launch run STAGE RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def _group() -> None:
    """Start stages of a recipe: on this machine, inside an allocation, or as a job of a batch system.

    `dmi launch STAGE RECIPE` is short for `dmi launch run STAGE RECIPE`; the other commands look at
    what was launched, or steer it.
    """


def _option(field: str, help_: str) -> Any:
    return typer.Option(*OPTIONS[field], help=help_)


@app.command(name="run")
def launch(
    stage: Annotated[str, typer.Argument(help=" | ".join(ALL))],
    recipe: Annotated[
        Path | None,
        typer.Argument(help="recipe (TOML): the whole run in one file; check: a folder"),
    ] = None,
    extra: Annotated[
        list[str] | None, typer.Argument(help="further arguments of the stage, after --")
    ] = None,
    out: Out = None,
    machine: Annotated[str | None, _option("machine", "name or file: dmi launch machines")] = None,
    nodes: Annotated[int | None, _option("nodes", "of the job; alone: 1")] = None,
    time: Annotated[str | None, _option("time_s", "of the job: minutes, H:M:S or D-H:M:S")] = None,
    ranks: Annotated[int | None, _option("ranks", "training ranks, in all")] = None,
    name: Annotated[str | None, _option("name", "of the job; default: the recipe's")] = None,
    account: Annotated[str | None, _option("account", "that pays")] = None,
    queue: Annotated[str | None, _option("queue", "partition or queue")] = None,
    qos: Annotated[str | None, _option("qos", "quality of service")] = None,
    reservation: Annotated[str | None, _option("reservation", "of nodes")] = None,
    constraint: Annotated[str | None, _option("constraint", "kind of nodes")] = None,
    option: Annotated[list[str] | None, _option("options", "any other of the scheduler's")] = None,
    chain: Annotated[
        str | None, _option("chain", "how it goes on: requeue, dependency, off")
    ] = None,
    max_jobs: Annotated[int | None, _option("max_jobs", "in a chain")] = None,
    max_node_hours: Annotated[
        float | None, _option("max_node_hours", "of all jobs together")
    ] = None,
    islands: Annotated[int | None, _option("islands", "searches that learn of each other")] = None,
    after: Annotated[str | None, _option("after", "job that must have ended before")] = None,
    packed: Annotated[Path | None, _option("packed", "environment to copy to the nodes")] = None,
    dashboard: Annotated[bool, _option("dashboard", "Ray's own, on the first node")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what would be submitted")
    ] = False,
    submit: Annotated[
        bool, typer.Option("--submit", help="as a job of its own, from inside an allocation too")
    ] = False,
) -> None:
    """Start a stage with the ranks it needs; finished parts are kept, interrupted ones continued.

    `all` goes from nothing to the report: data, search (if the recipe trains its winner), training,
    evaluation, report. With --nodes or --time it becomes a job of the batch system; inside an
    allocation it uses the nodes of that; else it runs on this machine. `check` looks at the nodes and
    the file system of a folder before a big job.
    """
    if stage not in ALL:
        raise LaunchError(f"no stage '{stage}'; stages: {', '.join(ALL)}")
    require_place(os.environ)
    loaded, recipe, folder = _of(stage, recipe, out)
    values: dict[str, Any] = {
        "stage": stage,
        "recipe": recipe,
        "out": folder,
        "ranks": ranks,
        "name": name or (loaded.name if loaded else stage),
        "account": account,
        "queue": queue,
        "qos": qos,
        "reservation": reservation,
        "constraint": constraint,
        "options": tuple(option or ()),
        "chain": chain,
        "max_jobs": max_jobs,
        "max_node_hours": max_node_hours,
        "islands": islands,
        "after": after,
        "packed": packed.resolve() if packed else None,
        "dashboard": dashboard,
        "extra": tuple(extra or ()),
        "nodes": nodes,
        "time": time,
        "machine": machine,
    }
    inside = scheduler_around(os.environ)
    if submit or dry_run or (inside is None and (nodes is not None or time is not None)):
        from launch.submit import submitted

        submitted(values, dry_run=dry_run)
    elif inside is not None:
        from launch.session import conducted

        sys.exit(conducted(inside, values, loaded))
    elif loaded is None:
        _check_here(folder)
    elif detect().size > 1:
        _become_a_rank(stage, recipe, folder, tuple(extra or ()))
    else:
        _here(stage, recipe, folder, loaded, values)


def _of(stage: str, recipe: Path | None, out: Path | None) -> tuple[Recipe | None, Path, Path]:
    """(recipe, its file, run folder); of a check: (None, the folder, twice)."""
    if stage == "check":
        folder = (out or recipe or Path()).resolve()
        return None, folder, folder
    if recipe is None:
        raise LaunchError(f"the recipe is missing: dmi launch {stage} RECIPE")
    loaded = recipe_of(recipe)
    return loaded, recipe.resolve(), (out or Path("runs") / loaded.name).resolve()


def _check_here(folder: Path) -> None:
    from launch.check import check_here, shown

    with stop_on_signals() as stop:
        sys.exit(shown(check_here(folder, stop)))


def _become_a_rank(stage: str, recipe: Path, folder: Path, extra: tuple[str, ...]) -> None:
    """Somebody else (mpirun, srun) started the ranks: this process is one of them."""
    if stage == "all":
        raise LaunchError(
            f"{detect().size} ranks of another launcher (source: {detect().source}), and stages that "
            "need different numbers of them: start one stage, or dmi launch without that launcher"
        )
    command = command_line(arguments_of(stage, recipe, folder, extra=extra))
    os.execv(command[0], command)


def _here(stage: str, recipe: Path, folder: Path, loaded: Recipe, values: dict[str, Any]) -> None:
    """On this machine."""
    for needs in ("islands", "after", "packed", "max_node_hours"):
        if values[needs] is not None:
            option = OPTIONS[needs][0]
            raise LaunchError(
                f"{option} is for jobs of a batch system: give nodes and time too (-N, -t), or leave it "
                "out"
            )
    extra = values["extra"]
    with stop_on_signals() as stop:
        for one in stages_of(loaded, stage):
            count = (values["ranks"] or ranks_of(loaded)) if one == "train" else 1
            arguments = arguments_of(one, recipe, folder, extra=extra if one == stage else ())
            run(Command(arguments, count, folder / "logs"), stop)


def ranks_of(recipe: Recipe) -> int:
    """Training ranks: as the recipe says, or one per GPU, or two on a CPU with at least two cores."""
    if recipe.launch.ranks != "auto":
        return recipe.launch.ranks
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(2, len(os.sched_getaffinity(0)))


for _tool in (*TOOLS, machines, pack):
    app.command()(_tool)
