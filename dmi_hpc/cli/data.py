"""``dmi data``: build, import and check shard sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dmi_hpc.cli.options import Out, RecipeFile, new_app, run_of
from dmi_hpc.config import cores_per_rank, parse
from dmi_hpc.data.build import Communicator
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.errors import together
from dmi_hpc.run import Run, record_command
from dmi_hpc.watch import console, progress_bar, say
from dmi_hpc.world import World, detect

app = new_app()


@app.callback()
def _group() -> None:
    """Build, import and check shard sets."""


@app.command()
def build(recipe: RecipeFile, out: Out = None) -> None:
    """Make the recipe's data set with its solver, over processes and MPI ranks.

    A finished set of the same recipe is kept as it is; an interrupted one is completed.
    """
    from dmi_hpc.collectives import mpi_ranks

    world = detect()
    with mpi_ranks(world) as communicator:
        run: Run | None = None
        with together(communicator.share):  # rank 0 first: it makes the run folder
            run = run_of(recipe, out) if world.is_first else None
        with together(communicator.share):
            run = run or run_of(recipe, out)
        manifest = _build(run, world, communicator)
    if world.is_first:
        record_command(run)
        rows = ", ".join(f"{count} {name}" for name, count in manifest.split_rows.items())
        say(f"data set {run.data}: {manifest.rows} rows ({rows}) in {len(manifest.shards)} shards")


def _build(run: Run, world: World, communicator: Communicator) -> Manifest:
    from dmi_hpc.tasks import make_task
    from dmi_hpc.tasks.base import BuildContext

    task, config = make_task(run.recipe.task), run.recipe.data
    processes = config.processes
    if processes == "auto":
        processes = cores_per_rank(world.ranks_on_cores)
    with progress_bar(console()) as bar:
        bar.disable = bar.disable or not world.is_first
        note = f"rank 0 of {world.size}, {processes} processes"
        line = bar.add_task("data", total=task.rows(), note=note)
        context = BuildContext(
            config=config,
            seed=run.recipe.seed,
            communicator=communicator,
            processes=processes,
            progress=lambda rows: bar.update(line, advance=rows * world.size),
        )
        return task.build_data(run.data, context)


@app.command(name="import")
def import_(
    files: Annotated[list[Path], typer.Argument(help="CSV files (also .csv.xz, .csv.gz)")],
    out: Annotated[Path, typer.Option(help="folder of the new shard set")],
    formula: Annotated[str, typer.Option(help="column of the formulas")] = "formula",
    value: Annotated[str, typer.Option(help="column of the target")] = "target",
    quantity: Annotated[str, typer.Option(help="name of the target")] = "formation_enthalpy",
    unit: Annotated[str, typer.Option(help="unit of the target")] = "eV/atom",
    bad: Annotated[str, typer.Option(help="bad lines: error | skip")] = "error",
    duplicates: Annotated[
        str, typer.Option(help="lines of one composition: keep | error | mean | lowest")
    ] = "keep",
    validation: Annotated[float, typer.Option(help="share of compositions")] = 0.1,
    test: Annotated[float, typer.Option(help="share of compositions")] = 0.1,
    seed: Annotated[int, typer.Option(help="of the split")] = 0,
) -> None:
    """Turn a CSV of compositions and targets into a shard set.

    One composition is never in two splits. Bad lines and duplicates are reported by line number.
    """
    from dmi_hpc.data.composition import CompositionImport, import_compositions

    raw: dict[str, Any] = {
        "formula": formula,
        "value": value,
        "quantity": quantity,
        "unit": unit,
        "bad": bad,
        "duplicates": duplicates,
        "validation": validation,
        "test": test,
        "seed": seed,
    }
    options = parse(CompositionImport, raw, where="dmi data import")
    manifest, report = import_compositions(files, out, options)
    show = console()
    for problem in report.bad[:20]:
        show.print(
            f"skipped {problem.file}, line {problem.line}: {problem.formula!r}: {problem.reason}"
        )
    if len(report.bad) > 20:
        show.print(f"... and {len(report.bad) - 20} more bad lines")
    for group in report.duplicates[:5]:
        lines = ", ".join(map(str, group.lines))
        show.print(f"composition {group.formula} stands in lines {lines} ({duplicates})")
    if len(report.duplicates) > 5:
        show.print(f"... and {len(report.duplicates) - 5} more compositions with several lines")
    rows = ", ".join(f"{count} {name}" for name, count in manifest.split_rows.items())
    say(f"data set {out}: {report.kept} of {report.read} lines kept ({rows})")


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="folder of a shard set")]) -> None:
    """Read every shard and compare its checksum with the manifest."""
    from dmi_hpc.data.shards import ShardSet

    with ShardSet.open(path, verify=True) as shards:
        manifest = shards.manifest
        size = sum(shard.bytes for shard in manifest.shards)
        say(
            f"{path}: {manifest.rows} rows, {len(manifest.shards)} shards, {size:,} bytes: all whole"
        )
