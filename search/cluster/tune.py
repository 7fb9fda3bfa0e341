"""Runs the search on Ray Tune: a Tune trial is a slot, whose actor evaluates one genome after another.

Tune finds the slots their resources, starts their actors and says when one died. A result comes back
through Tune's loop, and the next genome goes to the same actor with the same step of that loop: no
trial is set up or torn down in between. What matters is in our journal; Tune's own state, a dump of
all trials every ten seconds or more, is thrown away.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayError
from ray.tune.error import TuneError
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from dmi_hpc.config import Recipe
from dmi_hpc.errors import DMIError, Interrupted
from search.cluster.allocation import Allocation
from search.cluster.capacity import Shape
from search.cluster.desk import Desk, SpentWorker, judge_loss
from search.cluster.devices import Ranks, bundles
from search.cluster.ray_cluster import Cluster, cluster
from search.driver import Driver
from search.records.kept import Kept
from search.trials.trial import Evaluator

__all__ = ["Cluster", "TrialContext", "cluster", "judge_loss", "own_errors", "run_trials"]


@dataclass(frozen=True)
class TrialContext:
    """What every worker needs; put once into Ray's object store."""

    recipe: Recipe
    data: Path
    scratch: Path  # for files of Ray and Tune that nobody needs afterwards
    memory_GB: float
    ranks: int = 1  # processes of a trial, each with its own device
    gpu_share: float = 1.0
    kept: Path | None = None  # the search's folder, where trials keep what they go on from

    @property
    def shape(self) -> Shape:
        return Shape(self.recipe.search.trial_threads, self.ranks, self.gpu_share)

    def evaluator(self) -> Evaluator | Ranks:
        """What evaluates genomes in a worker; called there."""
        if self.ranks > 1:
            return Ranks(self.recipe, self.data, self.memory_GB, self.ranks, self.kept)
        device = torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")
        kept = None if self.kept is None else Kept(self.kept)
        return Evaluator(self.recipe, self.data, device, self.memory_GB, kept)


class Slot(tune.Trainable):  # type: ignore[misc]
    """An actor that opens the data once, says that it is ready, then evaluates a genome a step."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        self._evaluator = context.evaluator()
        self._job: Mapping[str, Any] | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def give(self, job: Mapping[str, Any]) -> None:
        """What the next step evaluates: the evaluator's arguments."""
        self._job = job

    def step(self) -> dict[str, Any]:
        job, self._job = self._job, None
        if job is None:
            return {"outcome": None}
        if self._evaluator.spent:
            raise SpentWorker
        return {"outcome": self._evaluator(**job)}


class _Adapter(Searcher):  # type: ignore[misc]
    """Tune's searcher: opens slots. The argument names below are Tune's calling convention."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._desk.open(trial_id):
            return {}
        return str(Searcher.FINISHED) if self._desk.is_done else None  # None: ask again later

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        return None

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        self._desk.close(trial_id)  # `_Relay` took its last result, `_Events` judges errors

    def save(self, checkpoint_path: str) -> None:
        return None

    def restore(self, checkpoint_path: str) -> None:
        return None


class _Relay(FIFOScheduler):  # type: ignore[misc]
    """Tune's scheduler: takes a slot's result and gives it the next genome, or closes it.

    The first result of a slot says no more than that its worker is ready.
    """

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result["outcome"] is not None:
            self._desk.finished(trial.trial_id, result["outcome"])
        job = self._desk.next_for(trial.trial_id)
        if job is None:
            return str(TrialScheduler.STOP)
        # an actor runs its calls in order, so this one comes before the step that Tune asks for next
        trial.temporary_state.ray_actor.give.remote(job)
        return str(TrialScheduler.CONTINUE)


class _Events(tune.Callback):  # type: ignore[misc]
    """Judges trials that died, keeps the terminal alive between results, and obeys a stop at once.

    Tune's own way to stop would wait for the trials in flight; the journal needs no such care.
    """

    def __init__(self, desk: Desk, limit_s: float | None, halt: Callable[[], None]) -> None:
        self._desk, self._limit_s, self._halt = desk, limit_s, halt

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._halt()  # a search that ends, or a cluster that is gone, says nothing of a network
        text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
        self._desk.died(trial.trial_id, self._limit_s, text)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._desk.attend()
        self._halt()


def run_trials(
    driver: Driver,
    context: TrialContext,
    found: Cluster,
    shown: Callable[[], None],
    stop: Callable[[], bool],
    allocation: Allocation | None = None,
) -> None:
    """Evaluate until the driver has nothing more to ask, or nothing more fits into `allocation`.

    Raises Interrupted when `stop` says so, at the end of the allocation, and when Ray fails: trials
    in flight stay to be asked. allocation: if not until the end of the Slurm job.
    """
    allocation = allocation or Allocation.of(os.environ, None, time.time())

    def halt() -> None:
        if stop():
            raise Interrupted("the search was asked to stop")
        if not found.alive():
            raise Interrupted("Ray's own processes are gone")
        over = allocation.is_over(time.time())
        if over is not None:
            raise Interrupted(over)

    limit_s = context.recipe.search.trial_time_limit_s
    desk = Desk(driver, allocation, shown, limit_s, found.room)
    trainable = tune.with_resources(
        tune.with_parameters(Slot, context=context), bundles(context.shape, gpus=found.gpus)
    )
    with TemporaryDirectory(prefix="tune-", dir=context.scratch) as folder, own_errors():
        # not Tuner: it pickles the search algorithm, and ours holds an open journal
        tune.run(
            trainable,
            name="search",
            storage_path=folder,
            search_alg=_Adapter(desk),
            scheduler=_Relay(desk),
            num_samples=-1,  # the driver's budget ends it
            reuse_actors=True,
            max_failures=0,
            raise_on_failed_trial=False,
            callbacks=[_Events(desk, limit_s, halt)],
            verbose=0,
        )


@contextmanager
def own_errors() -> Iterator[None]:
    """Ray's failures as Interrupted; our errors as themselves, which Tune wraps with their text."""
    try:
        yield
    except (RayError, TuneError) as error:
        inner: BaseException | None = error
        while isinstance(inner, TuneError):
            inner = inner.__cause__ or inner.__context__
        if isinstance(inner, DMIError | Interrupted):
            raise inner from error
        if isinstance(inner, RayError):
            raise Interrupted(f"Ray failed ({type(inner).__name__}: {inner})") from error
        raise
