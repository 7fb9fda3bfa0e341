"""``dmi train``: one network, on this process alone or as one of several ranks."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dmi_hpc.cli.options import Out, RecipeFile, Resume, new_app, run_of
from dmi_hpc.errors import Interrupted, TrialFailure
from dmi_hpc.files import write_json
from dmi_hpc.run import Run, network_to_train, record_command
from dmi_hpc.watch import TrainingWatch, console, say, stop_on_signals
from dmi_hpc.world import World

if TYPE_CHECKING:
    from dmi_hpc.train import Job, Result

app = new_app()


@app.command()
def train(recipe: RecipeFile, out: Out = None, resume: Resume = False) -> None:
    """Train the recipe's network: the published one, given layers, or the search's winner.

    Ranks are found from torchrun, mpirun or srun; `dmi launch train` starts them on this machine.
    """
    from dmi_hpc import collectives
    from dmi_hpc.world import detect

    world = detect()
    device = collectives.device_of(world)
    with collectives.group(world, device):
        run = run_of(recipe, out) if world.is_first else None
        collectives.barrier()  # rank 0 makes the run folder
        run = run or run_of(recipe, out)
        _train(run, world, device, resume)


def _train(run: Run, world: World, device: Any, resume: bool) -> None:
    import torch

    from dmi_hpc import collectives
    from dmi_hpc.config import with_train
    from dmi_hpc.errors import DataError, RunError
    from dmi_hpc.problem import Problem
    from dmi_hpc.tasks import make_task
    from dmi_hpc.train import Job

    task, status_file = make_task(run.recipe.task), run.train / "status.json"
    network, changes = network_to_train(run, task.published_network())
    config = with_train(run.recipe, changes, where="search winner")
    if status_file.exists() and not resume:
        raise RunError(
            f"{run.train}: a training is here already; --resume continues it, or choose another --out"
        )
    if not (run.data / "manifest.json").exists():
        raise DataError(f"{run.data}: no data set. First: dmi data build RECIPE --out {run.folder}")
    torch.set_num_threads(config.threads_of_rank(world.local_size))
    collectives.barrier()
    if world.is_first:
        run.train.mkdir(exist_ok=True)
        record_command(run)
        write_json(run.train / "network.json", network.model_dump(mode="json"))
        write_json(status_file, {"state": "running"})
    problem = Problem.open(task, run.data, verify=world.is_first)
    job = Job(problem, network, config, run.recipe.seed, world, device, run.checkpoints)
    try:
        result = _fit(job, run, resume)
    except Interrupted:
        if world.is_first:
            write_json(status_file, {"state": "interrupted"})
        raise
    except TrialFailure as failure:
        if world.is_first:
            state = {"state": "failed", "failure": failure.kind, "message": failure.message}
            write_json(status_file, state)
        raise
    if world.is_first:
        _finish(job, run, result)


def _fit(job: Job, run: Run, resume: bool) -> Result:
    from dmi_hpc.train import fit

    with stop_on_signals() as stop:
        unit, first = job.problem.task.quantity.unit, job.world.is_first
        watch = TrainingWatch(run.train, job.config.epochs, unit, stop, first)
        with watch.shown(run.train / "tensorboard"):
            return fit(job, watch, resume=resume, warn=console().print)


def _finish(job: Job, run: Run, result: Result) -> None:
    """Record the outcome and say it."""
    from dmi_hpc import checkpoint

    best, meta = checkpoint.best(run.checkpoints)
    weights, unit = meta.files[checkpoint.WEIGHTS], job.problem.task.quantity.unit
    write_json(
        run.train / "status.json",
        {
            "state": "finished",
            "ranks": job.world.size,
            "launcher": job.world.source,
            "device": str(job.device),
            "engine": job.config.engine,
            "best_checkpoint": best.name,
            "weights_xxh3": weights,
            "train": job.config.model_dump(mode="json"),
            **{k: v for k, v in asdict(result).items() if k != "history"},
        },
    )
    say(
        f"trained {result.parameters:,} parameters for {result.epochs} epochs ({result.reason}) on "
        f"{job.world.size} ranks: best validation MAE {result.best_mae:.4g} {unit} "
        f"after epoch {result.best_epoch + 1}; weights {weights}"
    )
