"""``dmi train``: one network, on this process alone or as one of several ranks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmi_hpc.cli.options import Out, RecipeFile, Resume, new_app, run_of
from dmi_hpc.config import RESOURCES, TrainConfig, with_train
from dmi_hpc.deadline import Deadline, end_of, heed
from dmi_hpc.errors import DataError, Interrupted, RunError, TrialFailure, together
from dmi_hpc.files import exclusive, remove_stale, write_json, writing
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.records import rank_log
from dmi_hpc.run import Run, network_to_train, record_command
from dmi_hpc.watch import (
    StopFlag,
    TrainingWatch,
    console,
    leaving_in_time,
    say,
    stop_on_signals,
)

if TYPE_CHECKING:
    import torch

    from dmi_hpc.job import Job, Result
    from dmi_hpc.problem import Problem
    from dmi_hpc.tasks.base import Task
    from dmi_hpc.world import World

app = new_app()


@app.command()
def train(recipe: RecipeFile, out: Out = None, resume: Resume = False) -> None:
    """Train the recipe's network: the published one, given layers, or the search's winner.

    Ranks are found from torchrun, mpirun or srun; `dmi launch train` starts them on this machine.
    A finished training is left as it is.
    """
    with stop_on_signals() as stop, ExitStack() as early:
        early.enter_context(leaving_in_time())  # up to the first step there is nothing to save
        from dmi_hpc import collectives
        from dmi_hpc.world import detect

        world = detect()
        device, share = collectives.device_of(world), collectives.gather_objects
        with collectives.group(world, device), ExitStack() as held:
            heed(stop, share)
            plan: Plan | None = None
            finished = None
            with together(share):  # rank 0 first: it makes the run folder, or says why not
                if world.is_first:
                    plan = plan_of(run_of(recipe, out))
                    held.enter_context(exclusive(plan.run.train, "training"))
                    finished = begin(plan, resume=resume)
            finished = share(finished)[0]
            if finished is not None:
                if world.is_first:
                    say(_closing_line(finished))
                return
            with together(share):
                plan = plan or plan_of(run_of(recipe, out))
                held.enter_context(rank_log(plan.run.folder, world))
            with _state_on_disk(plan.run.train / "status.json", world.is_first):
                with together(share):
                    job = _job_of(plan, world, device)
                if world.is_first:
                    console().print(f"reading {reading_of(job.problem)}", highlight=False)
                heed(stop, share)
                early.close()
                result = _fit(job, plan.run, resume, stop)
                if world.is_first:
                    with collectives.busy("the end"):  # the others wait to leave together
                        _finish(job, plan.run, result)


def train_alone(run: Run) -> None:
    """Train `run` on this process alone, on from what is there; a finished training is left as it is.

    Raises Interrupted at a stop signal, with all state saved.
    """
    from dmi_hpc import collectives
    from dmi_hpc.world import World

    world = World()
    device = collectives.device_of(world)
    plan = plan_of(run)
    with (
        stop_on_signals() as stop,
        exclusive(run.train, "training"),
        collectives.group(world, device),
    ):
        if begin(plan, resume=True) is None:
            with _state_on_disk(run.train / "status.json", first=True):
                job = _job_of(plan, world, device)
                _finish(job, run, _fit(job, run, True, stop))


def _job_of(plan: Plan, world: World, device: torch.device) -> Job:
    """Open the data; what this rank is to train."""
    import torch

    from dmi_hpc.job import Job
    from dmi_hpc.problem import Problem
    from dmi_hpc.world import require_gpu

    run, config = plan.run, plan.config
    if config.device == "cuda":
        require_gpu(world)
    torch.set_num_threads(config.threads_of_rank(world.ranks_on_cores))
    problem = Problem.open(
        plan.task,
        run.data,
        verify="open" if world.is_first else "none",
        reading=run.recipe.data,
        processes_on_node=world.ranks_on_cores,
    )
    return Job(
        problem,
        plan.network,
        config,
        run.recipe.seed,
        world,
        device,
        run.checkpoints,
        run.recipe.fingerprint(),
    )


@dataclass(frozen=True)
class Plan:
    """A run's training: what it trains and how."""

    run: Run
    task: Task
    network: NetworkSpec
    config: TrainConfig

    def identity(self) -> dict[str, Any]:
        """What a training must not change on its way: all but its resources."""
        config = self.config.model_dump(mode="json", exclude=RESOURCES["train"])
        return {**config, "network": self.network.model_dump(mode="json")}


def plan_of(run: Run) -> Plan:
    """Raises DataError or RunError if the run's data set or its search's winner is missing."""
    from dmi_hpc.tasks import make_task

    task = make_task(run.recipe.task)
    if not (run.data / "manifest.json").exists():
        there = ", only something else (no manifest.json)" if run.data.exists() else ""
        raise DataError(
            f"{run.data}: no data set{there}. First: dmi data build RECIPE --out {run.folder}, or dmi "
            f"data import FILE --out {run.data}; or correct data.path"
        )
    network, changes = network_to_train(run, task.published_network())
    return Plan(run, task, network, with_train(run.recipe, changes, where="search winner"))


def reading_of(problem: Problem) -> str:
    """How the data are read, and why so."""
    access = problem.shards.access
    shuffle = problem.shuffle or access.shuffle
    return f"{problem.shards.path}: {access.backend}, {shuffle} shuffle ({access.reason})"


def begin(plan: Plan, *, resume: bool) -> dict[str, Any] | None:
    """On rank 0, with the lock of the training: make its folder ready.

    Returns the status of a training that has finished. Raises RunError if there is one already and
    `resume` is not set, or it is of another network or configuration; nothing is written then.
    """
    folder = plan.run.train
    status_file, plan_file = folder / "status.json", folder / "plan.json"
    if status_file.exists():
        if not resume:
            raise RunError(
                f"{folder}: a training is here already; --resume continues it, or choose another "
                "--out"
            )
        _require_same(plan_file, plan.identity())
        status: dict[str, Any] = json.loads(status_file.read_text())
        if status["state"] == "finished":
            return status
    with writing(folder):
        remove_stale(folder)
        remove_stale(plan.run.checkpoints)
        record_command(plan.run)
        write_json(folder / "network.json", plan.network.model_dump(mode="json"))
        write_json(plan_file, plan.identity())
        write_json(status_file, {"state": "running"})
    return None


def _require_same(plan_file: Path, wanted: dict[str, Any]) -> None:
    """Raise RunError unless the training that `plan_file` records is the wanted one."""
    folder = plan_file.parent
    if not plan_file.exists():
        raise RunError(f"{plan_file}: missing, so nobody knows what was trained; remove {folder}")
    there = json.loads(plan_file.read_text())
    changed = [key for key in wanted if there.get(key) != wanted[key]]
    if not changed:
        return
    lines = "".join(
        f"\n  {key}" + ("" if key == "network" else f": {there.get(key)} there, {wanted[key]} here")
        for key in changed
    )
    raise RunError(
        f"{folder}: holds another training; it differs in:{lines}\nChoose another --out, or remove "
        f"{folder} if it is no longer needed"
    )


@contextmanager
def _state_on_disk(status_file: Path, first: bool) -> Iterator[None]:
    """Leave in `status_file`, by rank 0, how the block ended if it did not end well."""
    state: dict[str, str] = {}
    try:
        yield
    except Interrupted:
        state = {"state": "interrupted"}
        raise
    except Exception as error:
        kind = error.kind if isinstance(error, TrialFailure) else "exception"
        state = {"state": "failed", "failure": kind, "message": str(error)}
        raise
    finally:
        if state and first:
            try:
                write_json(status_file, state)
            except OSError as problem:  # a full disk: the error under way is the one to show
                console().print(f"{status_file}: not written: {problem}")


def _fit(job: Job, run: Run, resume: bool, stop: StopFlag) -> Result:
    from dmi_hpc import collectives
    from dmi_hpc.train import fit

    # a launcher ends survivors of a lost rank by signal: they must have named it before
    with collectives.naming_the_lost(), ExitStack() as held:
        end = end_of(os.environ, job.config.time_limit_s, time.time())
        with together(collectives.gather_objects):  # a disk or a server may refuse rank 0
            watching = TrainingWatch(job, run.train, Deadline(stop, end))
            watch = held.enter_context(watching.shown())
        return fit(job, watch, resume=resume, warn=console().print)


def _finish(job: Job, run: Run, result: Result) -> None:
    """Record the outcome and say it."""
    from dmi_hpc import checkpoint

    best, meta = checkpoint.best(run.checkpoints, console().print)
    status = {
        "state": "finished",
        "ranks": job.world.size,
        "launcher": job.world.source,
        "device": str(job.device),
        "reading": reading_of(job.problem),
        "engine": job.config.engine,
        "measure": job.problem.task.measure[0],
        "unit": job.problem.task.measure[1],
        "best_checkpoint": best.name,
        "weights_xxh3": meta.files[checkpoint.WEIGHTS],
        "train": job.config.model_dump(mode="json"),
        **{k: v for k, v in asdict(result).items() if k != "history"},
    }
    with writing(run.train):
        write_json(run.train / "status.json", status)
    say(_closing_line(status))


def _closing_line(status: dict[str, Any]) -> str:
    unit = f" {status['unit']}" if status["unit"] else ""
    return (
        f"trained {status['parameters']:,} parameters for {status['epochs']} epochs "
        f"({status['reason']}) on {status['ranks']} ranks: best validation {status['measure']} "
        f"{status['best_error']:.4g}{unit} after epoch {status['best_epoch'] + 1}; "
        f"weights {status['weights_xxh3']}"
    )
