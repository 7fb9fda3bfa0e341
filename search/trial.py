"""One evaluation: a genome becomes a network, is trained for a few epochs, and returns a fitness.

Whatever goes wrong inside is a typed outcome, never an exception: a search outlives its networks.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dmi_hpc.config import Recipe, TrainConfig, with_train
from dmi_hpc.errors import FailureKind, NetworkError, TrialFailure
from dmi_hpc.models.cost import require_fit
from dmi_hpc.models.space import SearchSpace
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.train import Epoch, Job, fit
from search.evolve import Failure, Outcome, Success
from search.genome import Genome, decode, from_json

TRACEBACK_CHARACTERS = 4000  # the end of it, kept in the journal


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

    def on_step(self, epoch: int, step: int, steps_per_epoch: int) -> None:
        return None

    def on_epoch(self, epoch: Epoch) -> None:
        return None

    def should_stop(self) -> bool:
        if self._limit_s is not None and time.monotonic() - self._started > self._limit_s:
            raise TrialFailure("timeout", f"not finished after {self._limit_s:g} s")
        return False


class Evaluator:
    """Evaluates genomes one after the other on the same data; lives as long as its worker."""

    def __init__(self, recipe: Recipe, data: Path, device: torch.device) -> None:
        torch.set_num_threads(recipe.search.trial_threads)
        self._recipe, self._data, self._device = recipe, data, device

    @cached_property
    def _space(self) -> SearchSpace:
        return self._problem.task.space()

    @cached_property
    def _problem(self) -> Problem:
        """Opened at the first trial, so that a failing task is a typed outcome too. The driver has
        verified the checksums once for all workers."""
        return Problem.open(make_task(self._recipe.task), self._data, verify=False)

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
            kind: FailureKind = "memory" if "can't allocate memory" in str(error) else "exception"
            text = traceback.format_exc()[-TRACEBACK_CHARACTERS:]
            message = f"{type(error).__name__}: {error}"
            return _failed(TrialFailure(kind, message, text), started)
        return TrialOutcome(Success(fitness), time.perf_counter() - started, metrics)

    def _train(self, genome: Genome) -> tuple[float, dict[str, float]]:
        search = self._recipe.search
        network = decode(genome, self._space.network)
        config = trial_config(self._recipe, genome)
        cost = require_fit(network, config.batch_size, search.trial_memory_GB * 1e9)
        job = Job(self._problem, network, config, self._recipe.seed, device=self._device)
        result = fit(job, Deadline(search.trial_time_limit_s), resume=False, warn=_unheard)
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
        "engine": "torch",  # one rank: nothing to reduce
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
