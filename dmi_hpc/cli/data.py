"""``dmi data``: make, check, stage and look at shard sets."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

from dmi_hpc.cli.data_import import import_
from dmi_hpc.cli.data_tools import bench, head, info, made_text, master, split, stage, verify
from dmi_hpc.cli.options import Out, RecipeFile, Resume, new_app, run_of, stops_tidily
from dmi_hpc.config import cores_per_rank
from dmi_hpc.data.build import Communicator
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.errors import DataError, counted, together
from dmi_hpc.run import Run, record_command
from dmi_hpc.watch import console, progress_bar, say
from dmi_hpc.world import World, detect

app = new_app()

_CONTINUE = "with --resume it continues (dmi launch: by the same command)"


@app.callback()
def _group() -> None:
    """Make, check, stage and look at shard sets."""


@app.command()
def build(recipe: RecipeFile, out: Out = None, resume: Resume = False) -> None:
    """Make the recipe's data set with its solver.

    Over processes and MPI ranks. A finished set of the same recipe is kept as it is. An interrupted
    one is completed with --resume: only missing shards are made.
    """
    from dmi_hpc.collectives import mpi_ranks

    world = detect()
    with mpi_ranks(world) as communicator:
        run: Run | None = None
        with together(communicator.share):  # rank 0 first: it makes the run folder
            run = run_of(recipe, out) if world.is_first else None
            if run is not None and not resume:
                _refuse_unfinished(run.data)
        with together(communicator.share):
            run = run or run_of(recipe, out)
        # a rank that leaves alone would wait for the others in MPI's own end
        tidily = stops_tidily(_CONTINUE) if world.size == 1 else nullcontext()
        with tidily:
            manifest = _build(run, world, communicator)
    if world.is_first:
        record_command(run)
        say(made_text(run.data, manifest))


def _refuse_unfinished(folder: Path) -> None:
    """An interrupted build is there: continue it or not is the user's word."""
    from dmi_hpc.data.parts import unfinished

    if count := unfinished(folder):
        raise DataError(
            f"{folder}: an interrupted build left {counted(count, 'finished shard')} here; --resume "
            "keeps them and makes the rest. To begin anew choose another --out, or delete the folder"
        )


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


app.command(name="import")(import_)
for _tool in (info, head, verify, split, stage, bench, master):
    app.command()(_tool)
