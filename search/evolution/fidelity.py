"""Fidelity: poor networks stop early, and only what was measured alike is compared.

Asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) in its promoting form: a trial
pauses at every rung, and goes on once it is among the best of those that came as far. Evolution gets
*places*, never raw errors: an error after 3 epochs and one after 50 have no scale in common.

    search = Halving(Evolution(space, config), Rungs(ladder(1, 50, 4)))
    stage = search.ask()                               # a paused trial goes on, or a new proposal
    search.tell(stage.proposal.id, Success(error))     # at that rung; or a Failure
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic

import numpy as np

from search.base import G
from search.evolution.curves import Continuation
from search.evolution.evolve import Evolution, Outcome, Proposal, Success, checked
from search.evolution.pareto import order

REDUCTION = 4  # of the trials of a rung, one goes on


def ladder(least: float, most: float, reduction: int = REDUCTION) -> tuple[int, ...]:
    """Ascending budgets that end with `most`, each about a `reduction`-th of the next, none below
    `least`.

    >>> ladder(1, 52, 4)
    (1, 3, 13, 52)
    """
    budgets = [round(most)]
    while (below := round(most := most / reduction)) >= least and below < budgets[0]:
        budgets.insert(0, below)
    return tuple(budgets)


_Entry = tuple[float, int]  # (score, id): lists of them are sorted, best first


class Rungs:
    """Who goes on. A budget is of the whole training up to its rung, in any unit.

    Trials of a rung are in the order of their errors there; with `extrapolate`, of the errors that
    they may have at the next rung (``search.evolution.curves``). With further objectives the order is
    that of NSGA-II over both (``search.evolution.pareto``).
    """

    def __init__(
        self, budgets: Sequence[float], reduction: int = REDUCTION, *, extrapolate: bool = False
    ) -> None:
        """budgets: ascending; if there is one alone, nothing pauses."""
        assert budgets and all(a < b for a, b in pairwise(budgets)), budgets
        assert reduction > 1, reduction
        self.budgets = tuple(budgets)
        self._reduction = reduction
        self._errors: list[dict[int, float]] = [{} for _ in budgets]
        self._others: dict[int, tuple[float, ...]] = {}
        self._several = False  # objectives
        self._curves = [Continuation() for _ in budgets[:-1]] if extrapolate else []
        self._arrived: list[list[_Entry]] = [[] for _ in budgets]
        self._waiting: list[list[_Entry]] = [[] for _ in budgets]

    @property
    def top(self) -> int:
        return len(self.budgets) - 1

    def error(self, identifier: int, rung: int) -> float:
        """Of a trial at a rung that it reached."""
        return self._errors[rung][identifier]

    def reached(self, identifier: int) -> int:
        """The highest rung that the trial came to; -1 if it came to none."""
        return sum(identifier in errors for errors in self._errors) - 1

    def report(
        self,
        identifier: int,
        rung: int,
        error: float,
        *,
        others: tuple[float, ...] = (),
        curve: Sequence[float] = (),
        waits: bool = True,
    ) -> None:
        """Trial `identifier` came to `rung`, and waits there unless it is the last one.

        others: further objectives; curve: errors after each epoch so far; waits: False if it is for
        others to let it go on.
        """
        assert identifier not in self._errors[rung], f"{identifier} came to rung {rung} twice"
        assert not rung or identifier in self._errors[rung - 1], f"{identifier} left a rung out"
        self._errors[rung][identifier] = error
        self._others[identifier], self._several = others, bool(others)
        score = error
        if self._curves and rung < self.top:
            score = self._curves[rung].arrived(identifier, error, curve)
        entry = (score, identifier)
        insort(self._arrived[rung], entry)
        if waits and rung < self.top:
            insort(self._waiting[rung], entry)
        if others:
            self._rank(rung)
        if self._curves and rung and self._curves[rung - 1].went_on(identifier, error):
            self._rank(rung - 1)

    def next_promotion(self) -> tuple[int, int] | None:
        """(id, rung to go to) of the trial to `promote` next; None if none may go on.

        One may that waits among the best 1 / reduction of its rung; higher rungs are asked first.
        """
        for rung in reversed(range(self.top)):
            arrived, waiting = self._arrived[rung], self._waiting[rung]
            if waiting and bisect_left(arrived, waiting[0]) < len(arrived) // self._reduction:
                return waiting[0][1], rung + 1
        return None

    def promote(self, identifier: int, rung: int) -> None:
        """Trial `identifier` waits no longer below `rung`: it goes there."""
        waiting = self._waiting[rung - 1]
        left = [entry for entry in waiting if entry[1] != identifier]
        assert len(left) < len(waiting), f"{identifier} does not wait below rung {rung}"
        self._waiting[rung - 1] = left

    def next_in_line(self, most: int) -> list[int]:
        """At most `most` waiting trials, those nearest to going on first: whose checkpoints to keep."""
        nearest = [
            (bisect_left(self._arrived[rung], entry) / len(self._arrived[rung]), -rung, entry[1])
            for rung, waiting in enumerate(self._waiting)
            for entry in waiting[:most]
        ]
        return [identifier for *_, identifier in sorted(nearest)[:most]]

    def best(self) -> tuple[int, float] | None:
        """(id, error) of the trial of the lowest error at the highest rung that any has reached."""
        errors = next(filter(None, reversed(self._errors)), None)
        if errors is None:
            return None
        error, identifier = min((error, identifier) for identifier, error in errors.items())
        return identifier, error

    def places(self) -> dict[int, float]:
        """Place in (0, 1] of each trial, lower is better: comparisons at equal rungs alone.

        All stand in the order of rung 0. Those that came to rung 1 hand out anew, by their errors
        there, the places they hold among themselves; and so on. So a trial that stopped early is
        compared with all others by what they were at that time.
        """
        first, *higher = map(self._ordered, range(len(self.budgets)))
        for at_rung in higher:
            come = set(at_rung)
            held = [place for place, identifier in enumerate(first) if identifier in come]
            for place, identifier in zip(held, at_rung, strict=True):
                first[place] = identifier
        return {identifier: (place + 1) / len(first) for place, identifier in enumerate(first)}

    def _expected(self, rung: int) -> dict[int, float]:
        """What the trials of a rung are compared by."""
        if not self._curves or rung == self.top:
            return self._errors[rung]
        return {number: self._curves[rung].expected(number) for number in self._errors[rung]}

    def _ordered(self, rung: int) -> list[int]:
        """Trials that came to a rung, the first objective alone, best first."""
        entries = self._arrived[rung]
        if self._several:
            entries = sorted((value, number) for number, value in self._expected(rung).items())
        return [number for _, number in entries]

    def _rank(self, rung: int) -> None:
        """Order the trials of a rung anew."""
        scores = self._expected(rung)
        if self._several:
            values = np.array([(score, *self._others[n]) for n, score in scores.items()])
            scores = dict(zip(scores, order(values).tolist(), strict=True))
        self._arrived[rung] = sorted((score, number) for number, score in scores.items())
        waiting = {number for _, number in self._waiting[rung]}
        self._waiting[rung] = [entry for entry in self._arrived[rung] if entry[1] in waiting]


@dataclass(frozen=True)
class Stage(Generic[G]):
    """A proposal to be trained until the budget of `rung`; above 0 it goes on from a checkpoint."""

    proposal: Proposal[G]
    rung: int


class Halving(Generic[G]):
    """Evolution whose evaluations pause at rungs; pure, any number of stages may be outstanding.

    With one rung the fitness that evolution gets is the error itself, else the place.
    """

    def __init__(self, evolution: Evolution[G], rungs: Rungs) -> None:
        self.evolution, self.rungs = evolution, rungs
        self._running: dict[int, int] = {}  # id -> rung it goes to

    def ask(self) -> Stage[G]:
        """A waiting trial to go on with, else a new proposal. Raises SpaceExhausted.

        What it returns counts as begun: a journal records it, and replays it by the two below.
        """
        promotion = self.rungs.next_promotion()
        if promotion is not None:
            return self.restore_promotion(*promotion)
        return self._begun(self.evolution.ask(), 0)

    def restore_ask(self, proposal: Proposal[G]) -> Stage[G]:
        """Take over a proposal that an earlier run made."""
        self.evolution.restore_ask(proposal)
        return self._begun(proposal, 0)

    def restore_promotion(self, identifier: int, rung: int) -> Stage[G]:
        """Let a waiting trial go on, as an earlier run has."""
        self.rungs.promote(identifier, rung)
        return self._begun(self.evolution.proposals[identifier], rung)

    def tell(
        self,
        identifier: int,
        outcome: Outcome,
        curve: Sequence[float] = (),
        *,
        waits: bool = True,
    ) -> Outcome:
        """Report the stage that trial `identifier` was in; returns the outcome as it was taken.

        Fitness: the lowest error so far. A trial that fails at a higher rung stays judged by those it
        has reached, and goes on no more. curve, waits: see `Rungs.report`.
        """
        rung = self._running.pop(identifier)
        outcome = checked(outcome) if rung else self.evolution.tell(identifier, outcome)
        if isinstance(outcome, Success):
            self._report(identifier, rung, outcome, curve, waits)
        return outcome

    def migrated(
        self, identifier: int, rung: int, outcome: Outcome, curve: Sequence[float] = ()
    ) -> None:
        """A trial of another search, known to the evolution, came to `rung`; there it waits, if so."""
        if isinstance(outcome, Success):
            self._report(identifier, rung, outcome, curve, waits=False)

    def _report(
        self, identifier: int, rung: int, outcome: Success, curve: Sequence[float], waits: bool
    ) -> None:
        error, others = outcome.fitness, outcome.others
        if rung:  # an earlier model of it is still there
            error = min(error, self.rungs.error(identifier, rung - 1))
        self.rungs.report(identifier, rung, error, others=others, curve=curve, waits=waits)
        if self.rungs.top:
            self.evolution.revise(self.rungs.places())

    def best(self) -> tuple[int, float] | None:
        """(id, error) at the highest rung so far; None if nothing has succeeded."""
        return self.rungs.best() if self.rungs.top else self.evolution.best()

    def is_running(self, identifier: int) -> bool:
        """Whether a stage of it was begun and has no outcome yet."""
        return identifier in self._running

    def stage(self, identifier: int) -> Stage[G]:
        """The one that trial `identifier` is in."""
        return Stage(self.evolution.proposals[identifier], self._running[identifier])

    def pending(self) -> list[Stage[G]]:
        """Stages without an outcome, in the order they were begun."""
        proposals = self.evolution.proposals
        return [Stage(proposals[identifier], rung) for identifier, rung in self._running.items()]

    def _begun(self, proposal: Proposal[G], rung: int) -> Stage[G]:
        assert proposal.id not in self._running, f"{proposal.id} runs already"
        self._running[proposal.id] = rung
        return Stage(proposal, rung)
