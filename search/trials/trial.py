"""One evaluation: a genome becomes a network, is trained for a few epochs, and returns a fitness.

Whatever goes wrong inside is a typed outcome, never an exception: a search outlives its networks.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from dmi_hpc import checkpoint
from dmi_hpc.config import Recipe, TrainConfig, with_train
from dmi_hpc.errors import DataError, FailureKind, Interrupted, NetworkError, TrialFailure
from dmi_hpc.job import Job, Result
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
from search.trials.ending import Assignment, Deadline, Goal, Pause, TimeIsOver, watchdog
from search.trials.heritage import SHARE_OF_EPOCHS, beginning_with, heritage, shortened
from search.trials.objectives import measured

TRACEBACK_CHARACTERS = 4000  # the end of it, kept in the journal
SAVE_S = 60.0  # between checkpoints of a trial: what the end of a worker may cost
# how libraries say it in errors without a type of their own
OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


@dataclass(frozen=True)
class TrialOutcome:
    """What one evaluation brought: its fitness (validation error) or failure, time, and measures."""

    told: Outcome
    seconds: float
    metrics: Mapping[str, float]
    # validation error after each epoch so far, where it is extrapolated
    curve: tuple[float, ...] = ()


class Left(NamedTuple):
    """A trial that had to stop, for the time is over; its checkpoint keeps what `seconds` brought."""

    seconds: float


Answer = TrialOutcome | Left


# lowest error so far, what came with it, and the curve of `TrialOutcome`
Measured = tuple[float, dict[str, float], tuple[float, ...]]


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

    def __call__(self, genome: Mapping[str, Any], assignment: Assignment | None = None) -> Answer:
        """Without an assignment it is trained in one go, and nothing is kept."""
        started = time.perf_counter()
        try:
            curve: tuple[float, ...] = ()
            if assignment is None:
                fitness, metrics = self._train(from_json(genome))
            else:
                fitness, metrics, curve = self._train_on(from_json(genome), assignment)
        except TimeIsOver:
            return Left(time.perf_counter() - started)
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
        return TrialOutcome(told, time.perf_counter() - started, metrics, curve)

    def _device_answers(self) -> bool:
        """False after a CUDA error that sticks: every later call of this process would fail too."""
        if self._device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return False
        return True

    def _fitted(
        self, network: NetworkSpec, config: TrainConfig, ranks: int = 1
    ) -> tuple[TrainConfig, dict[str, float]]:
        """`config` with a batch computed in as many parts as memory demands, and what the network
        then costs. Raises TrialFailure if that is more than it may.
        """
        search, share = self._recipe.search, -(-config.batch_size // ranks)
        parts = require_fit(network, share, self._memory_bytes, config.accumulation)
        wanted = {*search.objectives, *search.limits}
        costs = measured(network, -(-share // parts), wanted, self._device)
        if over := broken(search.limits, costs):
            raise TrialFailure("limit", over)
        if parts <= config.accumulation:
            return config, costs
        costs["accumulation"] = float(parts)
        return config.model_copy(update={"accumulation": parts}), costs

    def _train(self, genome: Genome) -> tuple[float, dict[str, float]]:
        search = self._recipe.search
        network = decode(genome, self._space.network)
        config, costs = self._fitted(network, trial_config(self._recipe, genome))
        job = Job(self._problem, network, config, self._recipe.seed, device=self._device)
        limit_s = search.trial_time_limit_s
        with watchdog(limit_s):
            result = fit(job, Deadline(limit_s), resume=False, warn=_unheard)
        return result.best_error, {**costs, **scores(result)}

    def _train_on(self, genome: Genome, assignment: Assignment) -> Measured:
        """Begin, or go on from the last checkpoint, until the goal.

        The schedule of the learning rate is that of the whole training from the first step on.
        """
        assert self._kept is not None, "assignments need a place for what is kept"
        kept, number = self._kept, assignment.number
        network = decode(genome, self._space.network)
        config, costs = self._fitted(network, kept_config(trial_config(self._recipe, genome)))
        job = Job(
            self._problem,
            network,
            config,
            self._recipe.seed,
            device=self._device,
            checkpoints=kept.checkpoints(number),
            saves_epochs=assignment.lasting,
        )
        limit_s, end = self._recipe.search.trial_time_limit_s, assignment.end
        if not assignment.lasting:
            result = _run(job, Pause(limit_s, end=end), limit_s)
            assert result is not None, "it has no goal to pause at"
            return result.best_error, {**costs, **scores(result)}, ()
        with TemporaryDirectory(prefix="inherited-") as scratch:
            job, goal, origin = self._begun(job, assignment, Path(scratch))
            pause = Pause(limit_s, goal, origin.seconds, end)
            try:
                if not is_there(job, goal, origin.seconds):
                    _run(job, pause, limit_s)
            finally:
                kept.save_origin(number, replace(origin, seconds=pause.seconds))
        fitness, found, curve = self._measured(job, number)
        return fitness, {**costs, **found}, curve

    def _measured(self, job: Job, number: int) -> Measured:
        """The lowest error so far and what came with it; its weights are kept for children."""
        assert self._kept is not None
        assert job.checkpoints is not None
        origin = self._kept.origin(number)
        best, meta = checkpoint.best(job.checkpoints, _unheard)
        last = checkpoint.all_in(job.checkpoints)[-1]
        epochs = checkpoint.read_meta(last, verify=False).epoch
        lineage = origin.epochs + epochs
        weights = checkpoint.read_weights(best)
        error = meta.metrics["validation_error"]
        self._kept.save_weights(number, Trained(job.network, weights, lineage, error))
        curve: tuple[float, ...] = ()
        if self._recipe.search.extrapolate:
            curve = tuple(checkpoint.load_state(last)["counters"]["validation"])
        found = {
            "epochs": float(epochs),
            "training_s": origin.seconds,
            "validation_rmse": meta.metrics["validation_rmse"],
            "lineage_epochs": lineage,
            "inherited": origin.share,
            **({} if origin.parent is None else {"inherited_from": float(origin.parent)}),
        }
        return error, found, curve

    def _begun(
        self, job: Job, assignment: Assignment, scratch: Path
    ) -> tuple[Job, Goal | None, Origin]:
        """What is to be trained, how far now, and from what: where it goes on, as it began; else with
        weights of a parent, if some are worth it. Such a child takes a share of all budgets."""
        assert self._kept is not None, "assignments need a place for what is kept"
        kept, number, goal = self._kept, assignment.number, assignment.goal
        if checkpoint.latest(kept.checkpoints(number), _unheard) is None:
            left = ((parent, kept.weights(parent)) for parent in assignment.parents)
            found = heritage(job, [(n, each) for n, each in left if each is not None], number)
            kept.save_origin(number, found.origin if found else Origin())
            if found:
                job = beginning_with(job, found.weights, scratch)
        origin = kept.origin(number)
        if origin.parent is not None:
            job = shortened(job)
            goal = goal and replace(goal, amount=SHARE_OF_EPOCHS * goal.amount)
        return job, goal, origin


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


def kept_config(config: TrainConfig) -> TrainConfig:
    """`config` of a trial that may be ended at any time and goes on from its checkpoint."""
    every = SAVE_S if config.checkpoint_s is None else config.checkpoint_s
    return config.model_copy(update={"keep_checkpoints": 1, "checkpoint_s": every})


def scores(result: Result) -> dict[str, float]:
    """What a training says beside its error; of its best epoch, if it was in this process."""
    best = next((e for e in result.history if e.epoch == result.best_epoch), None)
    found = {"epochs": float(result.epochs)}
    if earlier := result.epochs - len(result.history):
        found["resumed_epochs"] = float(earlier)
    if best is not None:
        found |= {"validation_rmse": best.validation_rmse, "validation_r2": best.validation_r2}
    return found


def _run(job: Job, pause: Pause, limit_s: float | None) -> Result | None:
    """Train on until the end, or (None) until the goal. Raises TimeIsOver."""
    with watchdog(limit_s):
        try:
            return fit(job, pause, resume=True, warn=_unheard)
        except Interrupted as stopped:
            if not pause.reached:
                raise TimeIsOver from stopped
            return None


def is_there(job: Job, goal: Goal | None, seconds: float) -> bool:
    """Whether the last checkpoint has reached the goal: an epoch may pass several rungs, and a worker
    may end before it tells of one."""
    assert job.checkpoints is not None
    found = checkpoint.latest(job.checkpoints, _unheard)
    if goal is None or found is None:
        return False
    epochs = checkpoint.read_meta(found, verify=False).epoch
    return goal.is_reached(epochs, epochs * len(job.problem.train_rows), seconds)


def _failed(failure: TrialFailure, started: float) -> TrialOutcome:
    told = Failure(failure.kind, failure.message[:1000], failure.traceback)
    return TrialOutcome(told, time.perf_counter() - started, {})


def _unheard(message: str) -> None:
    """A trial resumes nothing, so `fit` has nothing to warn of."""
