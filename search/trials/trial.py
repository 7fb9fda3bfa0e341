"""One evaluation: a genome becomes a network, is trained for a few epochs, and returns a fitness.

Whatever goes wrong inside is a typed outcome, never an exception: a search outlives its networks.
"""

from __future__ import annotations

import faulthandler
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch

from dmi_hpc import checkpoint
from dmi_hpc.config import Recipe, StartConfig, TrainConfig, with_train
from dmi_hpc.errors import DataError, FailureKind, Interrupted, NetworkError, TrialFailure
from dmi_hpc.job import Epoch, Job
from dmi_hpc.meters import Step
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import require_fit
from dmi_hpc.models.objectives import broken, others
from dmi_hpc.models.space import SearchSpace
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.train import fit
from search.evolution.evolve import Failure, Outcome, Success
from search.records.kept import Kept, Origin, Trained
from search.spaces.genome import Genome, decode, from_json
from search.spaces.recipe import recipe_space
from search.trials.inherit import inherited
from search.trials.objectives import measured

TRACEBACK_CHARACTERS = 4000  # the end of it, kept in the journal
# of a worker that hangs, after the time limit of its trial
GRACE_S, GRACE_SHARE = 5.0, 0.2
# how libraries say it in errors without a type of their own
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class TrialOutcome:
    """What one evaluation brought: its fitness (validation MAE) or failure, time, and measures."""

    told: Outcome
    seconds: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Goal:
    """How far a trial is trained before it pauses: epochs, samples or seconds since it began."""

    amount: float
    unit: Literal["epochs", "samples", "seconds"] = "epochs"


@dataclass(frozen=True)
class Assignment:
    """A trial that keeps what it needs to go on.

    number: of its proposal; goal: None means the whole training; parents: ids of trials whose weights
    it may begin with.
    """

    number: int
    goal: Goal | None = None
    parents: tuple[int, ...] = ()


class Deadline:
    """Observer that ends a training at its time limit with a typed failure."""

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s, self._started = limit_s, time.monotonic()

    def on_step(self, step: Step) -> None:
        return None

    def on_epoch(self, epoch: Epoch) -> None:
        return None

    def on_event(self, event: str, values: Mapping[str, Any]) -> None:
        return None

    def must_stop(self) -> str | None:
        if self._limit_s is not None and time.monotonic() - self._started > self._limit_s:
            raise TrialFailure("timeout", f"not finished after {self._limit_s:g} s")
        return None


class Pause(Deadline):
    """... and lets it stop in order, with a checkpoint, after the epoch that reaches the goal."""

    def __init__(self, limit_s: float | None, goal: Goal | None, seconds: float) -> None:
        """seconds: that the trial was trained before."""
        super().__init__(limit_s)
        self._goal, self.seconds, self.reached = goal, seconds, False

    def on_epoch(self, epoch: Epoch) -> None:
        self.seconds += epoch.seconds
        if self._goal is not None:
            done = {
                "epochs": epoch.epoch + 1,
                "samples": epoch.samples,
                "seconds": self.seconds,
            }
            self.reached = done[self._goal.unit] >= self._goal.amount

    def must_stop(self) -> str | None:
        super().must_stop()
        return "it pauses at its rung" if self.reached else None


@contextmanager
def watchdog(limit_s: float | None) -> Iterator[None]:
    """End this process if the block hangs: `Deadline` is asked between steps only.

    By faulthandler's own thread: it needs no interpreter lock, which a hanging extension may hold.
    """
    if limit_s is None:
        yield
        return
    grace = max(GRACE_S, GRACE_SHARE * limit_s)
    faulthandler.dump_traceback_later(limit_s + grace, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Evaluator:
    """Evaluates genomes one after the other on the same data; lives as long as its worker."""

    def __init__(
        self,
        recipe: Recipe,
        data: Path,
        device: torch.device,
        memory_GB: float,
        kept: Kept | None = None,
    ) -> None:
        """memory_GB: a network estimated to need more is not started; kept: for `Assignment`s."""
        torch.set_num_threads(recipe.search.trial_threads)
        self._kept = kept
        self._recipe, self._data, self._device = recipe, data, device
        self._memory_bytes = memory_GB * 1e9
        self.spent = False  # the device is lost to this process: it must end

    @cached_property
    def _space(self) -> SearchSpace:
        return recipe_space(self._recipe, self._problem.task)

    @cached_property
    def _problem(self) -> Problem:
        """Opened at the first trial, so that a failing task is a typed outcome too. The driver has
        verified the checksums once for all workers."""
        task = make_task(self._recipe.task)
        return Problem.open(task, self._data, verify="none", reading=self._recipe.data)

    def __call__(
        self, genome: Mapping[str, Any], assignment: Assignment | None = None
    ) -> TrialOutcome:
        """Without an assignment it is trained in one go, and nothing is kept."""
        started = time.perf_counter()
        try:
            if assignment is None:
                fitness, metrics = self._train(from_json(genome))
            else:
                fitness, metrics = self._train_on(from_json(genome), assignment)
        except TrialFailure as failure:
            return _failed(failure, started)
        except NetworkError as error:
            return _failed(TrialFailure("invalid", str(error)), started)
        except (MemoryError, torch.OutOfMemoryError) as error:
            return _failed(TrialFailure("memory", str(error) or "out of memory"), started)
        except (DataError, OSError) as error:
            text = traceback.format_exc()[-TRACEBACK_CHARACTERS:]
            return _failed(TrialFailure("data", f"{type(error).__name__}: {error}", text), started)
        except Exception as error:
            self.spent = not self._device_answers()
            memory = any(sign in str(error) for sign in OUT_OF_MEMORY)
            kind: FailureKind = "memory" if memory else "exception"
            text = traceback.format_exc()[-TRACEBACK_CHARACTERS:]
            message = f"{type(error).__name__}: {error}"
            return _failed(TrialFailure(kind, message, text), started)
        told = Success(fitness, others(self._recipe.search.objectives, metrics))
        return TrialOutcome(told, time.perf_counter() - started, metrics)

    def _device_answers(self) -> bool:
        """False after a CUDA error that sticks: every later call of this process would fail too."""
        if self._device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return False
        return True

    def _costs(self, network: NetworkSpec, batch_size: int) -> dict[str, float]:
        """What the network costs. Raises TrialFailure if that is more than it may."""
        search = self._recipe.search
        require_fit(network, batch_size, self._memory_bytes)
        costs = measured(network, batch_size, {*search.objectives, *search.limits}, self._device)
        if over := broken(search.limits, costs):
            raise TrialFailure("limit", over)
        return costs

    def _train(self, genome: Genome) -> tuple[float, dict[str, float]]:
        search = self._recipe.search
        network = decode(genome, self._space.network)
        config = trial_config(self._recipe, genome)
        costs = self._costs(network, config.batch_size)
        job = Job(self._problem, network, config, self._recipe.seed, device=self._device)
        limit_s = search.trial_time_limit_s
        with watchdog(limit_s):
            result = fit(job, Deadline(limit_s), resume=False, warn=_unheard)
        best = result.history[result.best_epoch]
        return result.best_mae, {
            **costs,
            "epochs": float(result.epochs),
            "validation_rmse": best.validation_rmse,
            "validation_r2": best.validation_r2,
        }

    def _train_on(self, genome: Genome, assignment: Assignment) -> tuple[float, dict[str, float]]:
        """Begin, or go on from the last checkpoint, until the goal.

        The schedule of the learning rate is that of the whole training from the first step on.
        """
        assert self._kept is not None, "assignments need a place for what is kept"
        kept, number = self._kept, assignment.number
        network = decode(genome, self._space.network)
        config = trial_config(self._recipe, genome).model_copy(update={"keep_checkpoints": 1})
        costs = self._costs(network, config.batch_size)
        folder = kept.checkpoints(number)
        job = Job(
            self._problem,
            network,
            config,
            self._recipe.seed,
            device=self._device,
            checkpoints=folder,
        )
        limit_s = self._recipe.search.trial_time_limit_s
        with TemporaryDirectory(prefix="inherited-") as scratch:
            if checkpoint.latest(folder, _unheard) is None:
                job, origin = self._begun(job, assignment, Path(scratch))
            else:
                origin = kept.origin(number)
            pause = Pause(limit_s, assignment.goal, origin.seconds)
            with watchdog(limit_s):
                try:
                    fit(job, pause, resume=True, warn=_unheard)
                except Interrupted:
                    assert pause.reached, "nothing else asks a trial to stop"
        kept.save_origin(number, replace(origin, seconds=pause.seconds))
        fitness, found = self._measured(job, number)
        return fitness, {**costs, **found}

    def _measured(self, job: Job, number: int) -> tuple[float, dict[str, float]]:
        """The lowest error so far and what came with it; its weights are kept for children."""
        assert self._kept is not None
        assert job.checkpoints is not None
        origin = self._kept.origin(number)
        best, meta = checkpoint.best(job.checkpoints, _unheard)
        last = checkpoint.all_in(job.checkpoints)[-1]
        epochs = checkpoint.read_meta(last, verify=False).epoch
        lineage = origin.epochs + epochs
        weights = checkpoint.read_weights(best)
        self._kept.save_weights(number, Trained(job.network, weights, lineage))
        return meta.metrics["validation_mae"], {
            "epochs": float(epochs),
            "training_s": origin.seconds,
            "validation_rmse": meta.metrics["validation_rmse"],
            "lineage_epochs": lineage,
            "inherited": origin.share,
            **({} if origin.parent is None else {"inherited_from": float(origin.parent)}),
        }

    def _begun(self, job: Job, assignment: Assignment, scratch: Path) -> tuple[Job, Origin]:
        """With the weights of the parent that gives most, if one has any left."""
        assert self._kept is not None, "assignments need a place for what is kept"
        torch.manual_seed(job.seed)  # the weights that `fit` would begin with
        fresh = build(job.network).state_dict()
        origin, weights = Origin(), None
        for parent in assignment.parents:
            trained = self._kept.weights(parent)
            if trained is None:
                continue
            rng = np.random.default_rng([job.seed, assignment.number])
            found, report = inherited(job.network, fresh, trained.network, trained.weights, rng)
            if report.share > origin.share:
                origin, weights = Origin(parent, report.share, trained.epochs), found
        self._kept.save_origin(assignment.number, origin)
        if weights is None:
            return job, origin
        problem = self._problem
        about = checkpoint.Meta(
            step=0,
            epoch=0,
            network=job.network,
            scale=problem.scale,
            task=problem.task.recipe_options(),
        )
        start = StartConfig(path=checkpoint.save(scratch, about, weights, {}), rescale_head=False)
        return replace(job, config=job.config.model_copy(update={"start": start})), origin


def trial_config(recipe: Recipe, genome: Genome) -> TrainConfig:
    """[train] of a trial: the recipe's, then search.train, then the genome's hyper-parameters."""
    changes = {
        # one rank: nothing to reduce or to share
        "engine": "torch",
        "zero_stage": "auto",
        "offload": "none",
        "deepspeed": {},
        # every network is another one: nothing of another training fits
        "start": None,
        "freeze": (),
        "noise_scale": False,  # nobody looks at it
        "threads": recipe.search.trial_threads,
        "epochs": recipe.search.epochs,
        **recipe.search.train,
        **dict(genome.hyper),
    }
    return with_train(recipe, changes, where="hyper-parameters of a trial")


def _failed(failure: TrialFailure, started: float) -> TrialOutcome:
    told = Failure(failure.kind, failure.message[:1000], failure.traceback)
    return TrialOutcome(told, time.perf_counter() - started, {})


def _unheard(message: str) -> None:
    """A trial resumes nothing, so `fit` has nothing to warn of."""
