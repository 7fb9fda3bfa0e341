"""``dmi train``: one network, on this process alone or as one of several ranks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dmi_hpc.cli.options import Out, RecipeFile, Resume, new_app, run_of
from dmi_hpc.run import Run, network_to_train, record_command
from dmi_hpc.watch import TrainingWatch, console, say, stop_on_signals

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


def _train(run: Run, world: Any, device: Any, resume: bool) -> None:
    import torch

    from dmi_hpc import checkpoint, collectives
    from dmi_hpc.config import cores_per_rank, with_train
    from dmi_hpc.errors import DataError, Interrupted, RunError
    from dmi_hpc.files import write_json
    from dmi_hpc.problem import Problem
    from dmi_hpc.tasks import make_task
    from dmi_hpc.train import Job, fit

    task, status_file = make_task(run.recipe.task), run.train / "status.json"
    network, changes = network_to_train(run, task.published_network())
    config = with_train(run.recipe, changes, where="search winner")
    if status_file.exists() and not resume:
        raise RunError(
            f"{run.train}: a training is here already; --resume continues it, or choose another --out"
        )
    if not (run.data / "manifest.json").exists():
        raise DataError(f"{run.data}: no data set. First: dmi data build RECIPE --out {run.folder}")
    torch.set_num_threads(
        cores_per_rank(world.local_size) if config.threads == "auto" else config.threads
    )
    show = console()
    collectives.barrier()
    if world.is_first:
        run.train.mkdir(exist_ok=True)
        record_command(run)
        write_json(run.train / "network.json", network.model_dump(mode="json"))
        write_json(status_file, {"state": "running"})
    problem = Problem.open(task, run.data, verify=world.is_first)
    job = Job(problem, network, config, run.recipe.seed, world, device, run.checkpoints)
    with stop_on_signals() as stop:
        watch = TrainingWatch(run.train, config.epochs, task.quantity.unit, stop, world.is_first)
        try:
            with watch.shown(run.train / "tensorboard"):
                result = fit(job, watch, resume=resume, warn=show.print)
        except Interrupted:
            if world.is_first:
                write_json(status_file, {"state": "interrupted"})
            raise
    if not world.is_first:
        return
    best, meta = checkpoint.best(run.checkpoints)
    summary = {k: v for k, v in asdict(result).items() if k != "history"}
    write_json(
        status_file,
        {
            "state": "finished",
            "ranks": world.size,
            "launcher": world.source,
            "device": str(device),
            "engine": config.engine,
            "best_checkpoint": best.name,
            "weights_xxh3": meta.files[checkpoint.WEIGHTS],
            "train": config.model_dump(mode="json"),
            **summary,
        },
    )
    say(
        f"trained {result.parameters:,} parameters for {result.epochs} epochs ({result.reason}) on "
        f"{world.size} ranks: best validation MAE {result.best_mae:.4g} {task.quantity.unit} "
        f"after epoch {result.best_epoch + 1}; weights {meta.files[checkpoint.WEIGHTS]}"
    )
