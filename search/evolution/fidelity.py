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

from search.base import G
from search.evolution.evolve import Evolution, Failure, Outcome, Proposal, checked

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


_Entry = tuple[float, int]  # (error, id): lists of them are sorted, best first


class Rungs:
    """Who goes on. A budget is of the whole training up to its rung, in any unit."""

    def __init__(self, budgets: Sequence[float], reduction: int = REDUCTION) -> None:
        """budgets: ascending; if there is one alone, nothing pauses."""
        assert budgets and all(a < b for a, b in pairwise(budgets)), budgets
        assert reduction > 1, reduction
        self.budgets = tuple(budgets)
        self._reduction = reduction
        self._errors: list[dict[int, float]] = [{} for _ in budgets]
        self._arrived: list[list[_Entry]] = [[] for _ in budgets]
        self._waiting: list[list[_Entry]] = [[] for _ in budgets]

    @property
    def top(self) -> int:
        return len(self.budgets) - 1

    def error(self, identifier: int, rung: int) -> float:
        """Of a trial at a rung that it reached."""
        return self._errors[rung][identifier]

    def report(self, identifier: int, rung: int, error: float) -> None:
        """Trial `identifier` came to `rung`, and waits there unless it is the last one."""
        assert identifier not in self._errors[rung], f"{identifier} came to rung {rung} twice"
        assert not rung or identifier in self._errors[rung - 1], f"{identifier} left a rung out"
        self._errors[rung][identifier] = error
        insort(self._arrived[rung], (error, identifier))
        if rung < self.top:
            insort(self._waiting[rung], (error, identifier))

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
        waiting, entry = self._waiting[rung - 1], (self.error(identifier, rung - 1), identifier)
        at = bisect_left(waiting, entry)
        assert waiting[at : at + 1] == [entry], f"{identifier} does not wait below rung {rung}"
        del waiting[at]

    def next_in_line(self, most: int) -> list[int]:
        """At most `most` waiting trials, those nearest to going on first: whose checkpoints to keep."""
        nearest = [
            (bisect_left(self._arrived[rung], entry) / len(self._arrived[rung]), -rung, entry[1])
            for rung, waiting in enumerate(self._waiting)
            for entry in waiting[:most]
        ]
        return [identifier for *_, identifier in sorted(nearest)[:most]]

    def best(self) -> tuple[int, float] | None:
        """(id, error) of the best trial at the highest rung that any has reached."""
        arrived = next(filter(None, reversed(self._arrived)), None)
        return None if arrived is None else arrived[0][::-1]

    def places(self) -> dict[int, float]:
        """Place in (0, 1] of each trial, lower is better: comparisons at equal rungs alone.

        All stand in the order of rung 0. Those that came to rung 1 hand out anew, by their errors
        there, the places they hold among themselves; and so on. So a trial that stopped early is
        compared with all others by what they were at that time.
        """
        order = [identifier for _, identifier in self._arrived[0]]
        for errors, arrived in zip(self._errors[1:], self._arrived[1:], strict=True):
            held = [place for place, identifier in enumerate(order) if identifier in errors]
            for place, (_, identifier) in zip(held, arrived, strict=True):
                order[place] = identifier
        return {identifier: (place + 1) / len(order) for place, identifier in enumerate(order)}


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

    def tell(self, identifier: int, outcome: Outcome) -> Outcome:
        """Report the stage that trial `identifier` was in; returns the outcome as it was taken.

        Fitness: the lowest error so far. A trial that fails at a higher rung stays judged by those it
        has reached, and goes on no more.
        """
        outcome, rung = checked(outcome), self._running.pop(identifier)
        if isinstance(outcome, Failure):
            return outcome if rung else self.evolution.tell(identifier, outcome)
        error = outcome.fitness
        if rung:  # an earlier model of it is still there
            error = min(error, self.rungs.error(identifier, rung - 1))
        self.rungs.report(identifier, rung, error)
        if not rung:
            self.evolution.tell(identifier, outcome)
        if self.rungs.top:
            self.evolution.revise(self.rungs.places())
        return outcome

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
