"""The breeding population: bounded, steady state, the worst member makes room for a better one."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence
from heapq import nsmallest

import numpy as np

from search.evolution.pareto import order

Member = tuple[float, int]  # (fitness or place, id); lower is better, then the older


class Population:
    """At most `size` members, best first. Failed networks never enter: they have no fitness.

    With several objectives a member's place is that of NSGA-II's order: by front, then the lonelier
    first (``search.evolution.pareto``).
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._members: list[Member] = []
        self._others: dict[int, tuple[float, ...]] = {}

    @property
    def members(self) -> Sequence[Member]:
        """(fitness, id), best first."""
        return tuple(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def add(self, identifier: int, fitness: float, others: tuple[float, ...] = ()) -> None:
        """Insert; if there are too many now, the worst leaves (perhaps the new one)."""
        if not others:
            insort(self._members, (fitness, identifier))
            del self._members[self._size :]
            return
        self._others[identifier] = others
        known = [*self._members, (fitness, identifier)]
        values = np.array([(first, *self._others[number]) for first, number in known])
        ranked = [known[i] for i in np.argsort(order(values))]
        self._members = ranked[: self._size]
        for _, leaving in ranked[self._size :]:
            del self._others[leaving]

    def revise(self, fitness: Mapping[int, float]) -> None:
        """Start anew with the best of `fitness`: id -> value, of one objective."""
        self._members = nsmallest(
            self._size, ((value, number) for number, value in fitness.items())
        )

    def tournament(self, contestants: int, rng: np.random.Generator) -> int:
        """Id of the best of some members drawn with replacement."""
        ranks = rng.integers(len(self._members), size=contestants)
        return self._members[int(ranks.min())][1]
