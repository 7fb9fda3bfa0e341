"""Discrete-event simulation of a search: the same ask and tell, workers that cost nothing.

Shows how a search behaves with any number of workers, any distribution of durations and any cost of
the driver, alone or as islands, within minutes and without a cluster.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isinf
from operator import itemgetter
from typing import Any, Generic, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from search.base import G
from search.evolution.evolve import Failure, Outcome, Proposal, SpaceExhausted, Success


class AskTell(Protocol[G]):
    """What is simulated: ``search.evolution.evolve.Evolution``, or what asks and tells as it does."""

    def ask(self) -> Proposal[G]:
        """The next genome. Raises SpaceExhausted."""

    def tell(self, identifier: int, outcome: Outcome, /) -> Outcome:
        """The outcome as it was taken."""

    def restore_ask(self, proposal: Proposal[G], /) -> None:
        """Take over a migrant; its id is negative."""


Evaluate = Callable[[G], tuple[Outcome, float]]  # -> outcome, duration in seconds


def _nothing(told: int) -> float:
    return 0.0


@dataclass(frozen=True)
class Costs:
    """Time that a search takes beside its evaluations, in seconds.

    A driver serves one worker after the other: it takes `tell_s`, then `ask_s`, functions of the number
    of evaluations that it was told before, and who comes meanwhile waits. The workers come one by one
    within `arrival_s`; after a failure one stays away for `restart_s`.
    """

    ask_s: Callable[[int], float] = _nothing
    tell_s: Callable[[int], float] = _nothing
    arrival_s: float = 0.0
    restart_s: float = 0.0


@dataclass(frozen=True)
class Exchange:
    """How islands learn from each other: every `interval_s` each takes in what the others found since,
    the best first, in all at most `per_own` for every evaluation of its own. Each costs it a tell.
    """

    interval_s: float
    per_own: float = 2.0


@dataclass(frozen=True)
class Trace:
    """Finished evaluations in the order of their end.

    ids: (n,) int64; times: (n,) simulated seconds; best: (n,) best fitness so far, inf before the
    first success. Shares, until the last end or the limit: utilisation, of all workers' time inside
    evaluations; finished, inside those that ended in time; driver, of its time that it was busy.
    """

    ids: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    best: npt.NDArray[np.float64]
    utilisation: float
    finished: float
    driver: float


def simulate(
    evolution: AskTell[G],
    evaluate: Evaluate[G],
    workers: int,
    evaluations: int,
    *,
    costs: Costs | None = None,
    limit_s: float = inf,
) -> Trace:
    """Run `evaluations` in all on `workers`; a worker asks as soon as it is free.

    limit_s: all stops then. Ends early if the space is exhausted. Equal end times are told in the
    order of the asks.
    """
    island = _Island(evolution, evaluate, costs or Costs(), workers, evaluations)
    island.run(limit_s)
    return island.trace(limit_s)


def simulate_islands(
    evolutions: Sequence[AskTell[G]],
    evaluate: Evaluate[G],
    workers: int,
    evaluations: int,
    exchange: Exchange | None,
    *,
    costs: Costs | None = None,
    limit_s: float = inf,
) -> list[Trace]:
    """A search on each of several islands, which share `workers` and `evaluations` equally.

    exchange: None for searches that know nothing of each other.
    """
    count = len(evolutions)
    islands = [
        _Island(
            e, evaluate, costs or Costs(), _part(workers, count, i), _part(evaluations, count, i)
        )
        for i, e in enumerate(evolutions)
    ]
    end = 0.0
    while exchange is not None and end < limit_s and any(island.works for island in islands):
        end = min(end + exchange.interval_s, limit_s)
        news: list[_News] = [[] for _ in islands]
        for island, own in zip(islands, news, strict=True):
            island.run(end, own)
        for island, own in zip(islands, news, strict=True):
            foreign = [item for found in news if found is not own for item in found]
            island.take_in(end, foreign, exchange.per_own)
    for island in islands:
        island.run(limit_s)
    return [island.trace(limit_s) for island in islands]


def _part(whole: int, parts: int, index: int) -> int:
    return whole // parts + (index < whole % parts)


_News = list[tuple[float, Proposal[Any], Outcome]]  # (fitness, or inf of a failure, ...)


class _Running(NamedTuple, Generic[G]):
    begin: float
    proposal: Proposal[G]
    outcome: Outcome


class _Island(Generic[G]):
    """A driver with its workers; `run` takes them on in time."""

    def __init__(
        self,
        evolution: AskTell[G],
        evaluate: Evaluate[G],
        costs: Costs,
        workers: int,
        evaluations: int,
    ) -> None:
        self._evolution, self._evaluate, self._costs = evolution, evaluate, costs
        self._workers, self._left = workers, evaluations
        # who will come to the driver, a heap: (when, order, what it brings)
        self._coming: list[tuple[float, int, _Running[G] | None]] = [
            (costs.arrival_s * number / workers, number, None) for number in range(workers)
        ]
        self._order = workers
        self._free_s = self._last_s = 0.0  # the driver is busy until; the last evaluation's end
        self._driver_s = self._busy_s = 0.0  # sums
        self._ids: list[int] = []
        self._times: list[float] = []
        self._best: list[float] = []
        self._hashes: set[str] = set()
        self._told = self._taken = 0

    @property
    def works(self) -> bool:
        return bool(self._coming)

    def run(self, until: float, news: _News | None = None) -> None:
        """Serve everybody whose turn comes until then; appends to `news` what was told."""
        while self._coming and max(self._coming[0][0], self._free_s) <= until:
            ready, _, running = heapq.heappop(self._coming)
            self._free_s = max(ready, self._free_s)
            if running is not None:
                fitness, outcome = self._tell(ready, running)
                if news is not None:
                    news.append((fitness, running.proposal, outcome))
                if self._costs.restart_s and isinstance(outcome, Failure):
                    self._come(ready + self._costs.restart_s, None)
                    continue
            if self._left:
                self._ask()

    def take_in(self, now: float, foreign: _News, per_own: float) -> None:
        """The best of what other islands found, as far as it is not known here."""
        room = int(per_own * len(self._ids)) - self._taken
        new = [item for item in foreign if item[1].hash not in self._hashes]
        for _, proposal, outcome in heapq.nsmallest(max(0, room), new, key=itemgetter(0)):
            if proposal.hash in self._hashes:
                continue
            self._taken += 1
            migrant = Proposal(-self._taken, proposal.genome, "migrant", (), proposal.hash)
            self._hashes.add(proposal.hash)
            self._evolution.restore_ask(migrant)
            self._evolution.tell(migrant.id, outcome)
            self._free_s = max(now, self._free_s)
            self._spend(self._costs.tell_s(self._told))
            self._told += 1

    def trace(self, limit_s: float) -> Trace:
        end = self._last_s if isinf(limit_s) else limit_s
        cut_s = sum(
            max(0.0, min(ready, end) - running.begin)
            for ready, _, running in self._coming
            if running is not None
        )
        total = self._workers * end or 1.0
        return Trace(
            np.array(self._ids),
            np.array(self._times),
            np.array(self._best),
            utilisation=(self._busy_s + cut_s) / total,
            finished=self._busy_s / total,
            driver=min(self._driver_s / end, 1.0) if end else 0.0,
        )

    def _come(self, when: float, running: _Running[G] | None) -> None:
        heapq.heappush(self._coming, (when, self._order, running))
        self._order += 1

    def _spend(self, seconds: float) -> None:
        self._free_s += seconds
        self._driver_s += seconds

    def _tell(self, ready: float, running: _Running[G]) -> tuple[float, Outcome]:
        number = running.proposal.id
        outcome = self._evolution.tell(number, running.outcome)
        self._spend(self._costs.tell_s(self._told))
        fitness = outcome.fitness if isinstance(outcome, Success) else inf
        self._told += 1
        self._busy_s += ready - running.begin
        self._last_s = ready
        self._ids.append(number)
        self._times.append(ready)
        self._best.append(min(fitness, self._best[-1] if self._best else inf))
        return fitness, outcome

    def _ask(self) -> None:
        try:
            proposal = self._evolution.ask()
        except SpaceExhausted:
            self._left = 0
            return
        self._left -= 1
        self._hashes.add(proposal.hash)
        self._spend(self._costs.ask_s(self._told))
        outcome, seconds = self._evaluate(proposal.genome)
        self._come(self._free_s + seconds, _Running(self._free_s, proposal, outcome))
