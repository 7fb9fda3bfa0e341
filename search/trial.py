"""One evaluation: a genome becomes a network, is trained for a few epochs, and returns a fitness.

Whatever goes wrong inside is a typed outcome, never an exception: a search outlives its networks.
"""

from __future__ import annotations

import faulthandler
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dmi_hpc.config import Recipe, TrainConfig, with_train
from dmi_hpc.errors import FailureKind, NetworkError, TrialFailure
from dmi_hpc.job import Epoch, Job
from dmi_hpc.meters import Step
from dmi_hpc.models.cost import require_fit
from dmi_hpc.models.space import SearchSpace
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.train import fit
from search.evolve import Failure, Outcome, Success
from search.genome import Genome, decode, from_json

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

    def __init__(self, recipe: Recipe, data: Path, device: torch.device, memory_GB: float) -> None:
        """memory_GB: a network estimated to need more is not started."""
        torch.set_num_threads(recipe.search.trial_threads)
        self._recipe, self._data, self._device = recipe, data, device
        self._memory_bytes = memory_GB * 1e9
        self.spent = False  # the device is lost to this process: it must end

    @cached_property
    def _space(self) -> SearchSpace:
        return self._problem.task.space()

    @cached_property
    def _problem(self) -> Problem:
        """Opened at the first trial, so that a failing task is a typed outcome too. The driver has
        verified the checksums once for all workers."""
        task = make_task(self._recipe.task)
        return Problem.open(task, self._data, verify="none", reading=self._recipe.data)

    def __call__(self, genome: Mapping[str, Any]) -> TrialOutcome:
        started = time.perf_counter()
        try:
            fitness, metrics = self._train(from_json(genome))
        except TrialFailure as failure:
            return _failed(failure, started)
        except NetworkError as error:
            return _failed(TrialFailure("invalid", str(error)), started)
        except (MemoryError, torch.OutOfMemoryError) as error:
            return _failed(TrialFailure("memory", str(error) or "out of memory"), started)
        except Exception as error:
            self.spent = not self._device_answers()
            memory = any(sign in str(error) for sign in OUT_OF_MEMORY)
            kind: FailureKind = "memory" if memory else "exception"
            text = traceback.format_exc()[-TRACEBACK_CHARACTERS:]
            message = f"{type(error).__name__}: {error}"
            return _failed(TrialFailure(kind, message, text), started)
        return TrialOutcome(Success(fitness), time.perf_counter() - started, metrics)

    def _device_answers(self) -> bool:
        """False after a CUDA error that sticks: every later call of this process would fail too."""
        if self._device.type != "cuda":
            return True
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            return False
        return True

    def _train(self, genome: Genome) -> tuple[float, dict[str, float]]:
        search = self._recipe.search
        network = decode(genome, self._space.network)
        config = trial_config(self._recipe, genome)
        cost = require_fit(network, config.batch_size, self._memory_bytes)
        job = Job(self._problem, network, config, self._recipe.seed, device=self._device)
        limit_s = search.trial_time_limit_s
        with watchdog(limit_s):
            result = fit(job, Deadline(limit_s), resume=False, warn=_unheard)
        best = result.history[result.best_epoch]
        return result.best_mae, {
            "parameters": float(cost.parameters),
            "flops": float(cost.flops),
            "epochs": float(result.epochs),
            "validation_rmse": best.validation_rmse,
            "validation_r2": best.validation_r2,
        }


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
