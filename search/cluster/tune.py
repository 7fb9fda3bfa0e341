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
from dmi_hpc.errors import DMIError, Interrupted, LaunchError
from search.cluster.allocation import Allocation
from search.cluster.capacity import Shape
from search.cluster.devices import Ranks, bundles
from search.cluster.forecast import Forecast
from search.cluster.ray_cluster import Cluster, cluster
from search.driver import Driver
from search.evolution.evolve import Failure, Proposal
from search.records.kept import Kept
from search.spaces.genome import Genome, to_json
from search.trials.trial import TRACEBACK_CHARACTERS, Answer, Evaluator, Left, TrialOutcome

DEATHS = 3  # of workers in a row, times their number, before the machine counts as the cause

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


class SpentWorker(Exception):
    """A worker that lost its device refuses a trial. Tune does not reuse an actor that raised."""


class Slot(tune.Trainable):  # type: ignore[misc]
    """An actor that opens the data once, then evaluates a genome a step."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        self._evaluator = context.evaluator()
        self._job: Mapping[str, Any] = config["job"]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._job = new_config["job"]
        return True

    def give(self, job: Mapping[str, Any]) -> None:
        """What the next step evaluates: the evaluator's arguments."""
        self._job = job

    def step(self) -> dict[str, Any]:
        if self._evaluator.spent:
            raise SpentWorker
        return {"outcome": self._evaluator(**self._job)}


class _Desk:
    """Between the slots and the driver: who evaluates what, and since when."""

    def __init__(
        self,
        driver: Driver,
        allocation: Allocation,
        shown: Callable[[], None],
        trial_limit_s: float | None = None,
    ) -> None:
        self.driver, self.allocation, self.shown = driver, allocation, shown
        self._forecast = Forecast(driver, trial_limit_s)
        self._deaths = 0  # since an evaluation finished
        self._numbers: dict[str, int] = {}  # slot -> the proposal it evaluates
        self._started: dict[str, float] = {}

    def next_for(self, slot: str) -> dict[str, Any] | None:
        """What to evaluate: the evaluator's arguments. None while there is none, or no time for it."""
        proposal = self._in_time(slot)
        self.shown()
        if proposal is None:
            return None
        self._numbers[slot] = proposal.id
        self._started.pop(slot, None)
        assignment = self.driver.assignment(proposal.id, self.allocation.end)
        return {"genome": to_json(proposal.genome), "assignment": assignment}

    def _in_time(self, slot: str) -> Proposal[Genome] | None:
        while self.allocation.may_start(time.time()):
            proposal = self.driver.next_proposal(slot)
            if proposal is None:
                return None
            refused = self._forecast.refusal(proposal.id)
            if refused is None:
                return proposal
            self.driver.finished(proposal.id, refused)
        return None

    @property
    def is_done(self) -> bool:
        """Nothing runs, and nothing will."""
        closed = self.allocation.closed is not None and not self.driver.progress.running
        return closed or self.driver.done

    def started(self, slot: str) -> None:
        self._started[slot] = time.monotonic()

    def finished(self, slot: str, outcome: Answer) -> None:
        self._deaths = 0
        number = self._numbers.pop(slot)
        if isinstance(outcome, Left):
            self.allocation.close("trials are left, each with a checkpoint, for the next session")
            self.driver.progress.busy_s += outcome.seconds  # nothing of it is lost
            self.driver.again(number)
            return
        self.driver.finished(number, self._forecast.learned(number, outcome), slot)
        self.allocation.finished(outcome.seconds)
        self.shown()

    def died(self, slot: str) -> tuple[int, float] | None:
        """(proposal, seconds it ran) of a slot whose worker died; None if it had none."""
        number, started = self._numbers.pop(slot, None), self._started.pop(slot, None)
        seconds = 0.0 if started is None else time.monotonic() - started
        self._deaths += 1
        return None if number is None else (number, seconds)

    def require_life(self, text: str) -> None:
        """LaunchError if workers do nothing but die; text: Ray's word of the last one."""
        if self._deaths >= DEATHS * self.driver.progress.workers:
            *_, last = text.strip().splitlines() or ["nothing"]
            raise LaunchError(
                f"{self._deaths} workers in a row died, and none finished an evaluation: the fault is "
                f"not a network's. Ray says of the last one: {last[:500]}. Once that is mended, "
                "--resume continues"
            )


class _Adapter(Searcher):  # type: ignore[misc]
    """Tune's searcher: opens slots. The argument names below are Tune's calling convention."""

    def __init__(self, desk: _Desk) -> None:
        super().__init__()
        self._desk = desk

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        job = self._desk.next_for(trial_id)
        if job is None:
            return str(Searcher.FINISHED) if self._desk.is_done else None  # None: ask again later
        return {"job": job}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        return None

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        return None  # a slot closes: `_Relay` took its last result, `_Events` judges errors

    def save(self, checkpoint_path: str) -> None:
        return None

    def restore(self, checkpoint_path: str) -> None:
        return None


class _Relay(FIFOScheduler):  # type: ignore[misc]
    """Tune's scheduler: takes a slot's result and gives it the next genome, or closes it."""

    def __init__(self, desk: _Desk) -> None:
        super().__init__()
        self._desk = desk

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        self._desk.finished(trial.trial_id, result["outcome"])
        job = self._desk.next_for(trial.trial_id)
        if job is None:
            return str(TrialScheduler.STOP)
        # an actor runs its calls in order, so this one comes before the step that Tune asks for next
        trial.temporary_state.ray_actor.give.remote(job)
        self._desk.started(trial.trial_id)
        return str(TrialScheduler.CONTINUE)


class _Events(tune.Callback):  # type: ignore[misc]
    """Judges trials that died, keeps the terminal alive between results, and obeys a stop at once.

    Tune's own way to stop would wait for the trials in flight; the journal needs no such care.
    """

    def __init__(self, desk: _Desk, limit_s: float | None, halt: Callable[[], None]) -> None:
        self._desk, self._limit_s, self._halt = desk, limit_s, halt

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._desk.started(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        died = self._desk.died(trial.trial_id)
        if died is None:
            return
        self._halt()  # a search that ends, or a cluster that is gone, says nothing of a network
        text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
        judge_loss(self._desk.driver, *died, self._limit_s, text)
        self._desk.require_life(text)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._desk.shown()
        self._halt()


def judge_loss(
    driver: Driver, number: int, seconds: float, limit_s: float | None, text: str
) -> None:
    """Tell `driver` that the worker of trial `number` failed after `seconds`. text: Ray's word."""
    *_, last = text.strip().splitlines() or [""]
    text = text[-TRACEBACK_CHARACTERS:]
    if SpentWorker.__name__ in text:
        driver.again(number)
    elif limit_s is not None and seconds > limit_s:
        message = f"its worker hung and was ended: not finished after {limit_s:g} s"
        driver.finished(number, TrialOutcome(Failure("timeout", message, text), seconds, {}))
    else:
        message = f"the worker process died (killed, out of memory, or as Ray says: {last[:500]})"
        driver.finished(number, TrialOutcome(Failure("lost", message, text), seconds, {}))


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

    desk = _Desk(driver, allocation, shown, context.recipe.search.trial_time_limit_s)
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
            # unset, Tune starts one trial at a time for a Searcher that it does not know
            max_concurrent_trials=driver.progress.workers,
            reuse_actors=True,
            max_failures=0,
            raise_on_failed_trial=False,
            callbacks=[_Events(desk, context.recipe.search.trial_time_limit_s, halt)],
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
