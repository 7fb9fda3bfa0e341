"""The breeding population: bounded, steady state; the worst member makes room, or the oldest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import nsmallest
from itertools import count
from typing import Literal

import numpy as np

from search.evolution.pareto import order

Values = tuple[float, ...]  # fitness and further objectives, lower is better
Member = tuple[float, int]  # (fitness or place, id); lower is better, then the older
Replacement = Literal["worst", "age"]


class Population:
    """At most `size` members, best first. Failed networks never enter: they have no fitness.

    Who leaves when there are too many: the worst, which may be the new one (Whitley's GENITOR), or
    the one that entered first, however good (E. Real et al., "Regularized evolution for image
    classifier architecture search", AAAI 2019). With several objectives a member's place is that of
    NSGA-II's order: by front, then the lonelier first (``search.evolution.pareto``).
    """

    def __init__(self, size: int, replacement: Replacement = "worst") -> None:
        self._size, self._ages = size, replacement == "age"
        self._members: list[Member] = []
        self._others: dict[int, tuple[float, ...]] = {}
        self._turn = count()
        self._entered: dict[int, int] = {}  # of all since the last restart: turn

    @property
    def members(self) -> Sequence[Member]:
        """(fitness, id), best first."""
        return tuple(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def add(self, identifier: int, fitness: float, others: tuple[float, ...] = ()) -> None:
        """Insert; if there are too many now, one leaves."""
        self._entered[identifier] = next(self._turn)
        if others:
            self._others[identifier] = others
        members = [*self._members, (fitness, identifier)]
        if self._ages and len(members) > self._size:
            members.remove(min(members, key=self._turn_of))
        self._members = self._ranked(members)[: self._size]

    def revise(self, fitness: Mapping[int, float]) -> None:
        """Start anew with those of `fitness` (id -> value) that would be members now, had they entered
        with these values; others than have entered do not count."""
        known = [(value, number) for number, value in fitness.items() if number in self._entered]
        if self._ages:
            known = sorted(known, key=self._turn_of)[-self._size :]
        several = bool(self._others)
        self._members = (self._ranked(known) if several else nsmallest(self._size, known))[
            : self._size
        ]

    def restart(self, survivors: int) -> None:
        """All but the best `survivors` leave, and never come back."""
        self._members = self._members[:survivors]
        self._entered = {number: self._entered[number] for _, number in self._members}

    def tournament(self, contestants: int, rng: np.random.Generator) -> int:
        """Id of the best of some members drawn with replacement."""
        ranks = rng.integers(len(self._members), size=contestants)
        return self._members[int(ranks.min())][1]

    def _turn_of(self, member: Member) -> int:
        return self._entered[member[1]]

    def _ranked(self, members: list[Member]) -> list[Member]:
        if not self._others:
            return sorted(members)
        values = np.array([(first, *self._others[number]) for first, number in members])
        return [members[i] for i in np.argsort(order(values))]
