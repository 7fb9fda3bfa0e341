"""The breeding population: bounded, steady state, the worst member makes room for a better one."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

import numpy as np

Member = tuple[float, int]  # (fitness, proposal id); lower fitness is better, then the older


class Population:
    """At most `size` members, best first. Failed networks never enter: they have no fitness."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._members: list[Member] = []

    @property
    def members(self) -> Sequence[Member]:
        """(fitness, id), best first."""
        return tuple(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def add(self, identifier: int, fitness: float) -> None:
        """Insert; if there are too many now, the worst leaves (perhaps the new one)."""
        insort(self._members, (fitness, identifier))
        del self._members[self._size :]

    def tournament(self, contestants: int, rng: np.random.Generator) -> int:
        """Id of the best of some members drawn with replacement."""
        ranks = rng.integers(len(self._members), size=contestants)
        return self._members[int(ranks.min())][1]
