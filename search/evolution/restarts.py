"""Restarts: when nothing has improved for long and the population has become alike, new blood comes.

The best member stays and all others leave; strangers take their places, each far from everything
that was ever proposed. What the surrogate has learned stays too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic

import numpy as np

from search.base import G, Space, Vector
from search.evolution.pareto import front
from search.evolution.population import Population, Values

SURVIVORS = 1
IMMIGRANTS = 0.5  # of the size of the population
STRANGERS = 16  # random genomes that tell how wide the space is; the most novel one comes
ALIKE = 0.5  # of their variance over all features: members with less have collapsed
MOST_KNOWN = 2000  # newest genomes from which a stranger keeps away


class Restarts(Generic[G]):
    """Sees all asks and tells; its state is a function of them, proposals of origin `ORIGIN` included.

    So a journal that holds those proposals holds the restarts.
    """

    ORIGIN = "restart"

    def __init__(self, space: Space[G], population: Population, size: int, patience: int) -> None:
        """size: of the population; patience: results without improvement before a restart."""
        self._space, self._population = space, population
        self._immigrants, self._patience = max(1, round(IMMIGRANTS * size)), patience
        self._features: dict[int, Vector] = {}
        self._told: dict[int, int] = {}  # id -> how many were told before it
        self._front: dict[int, Values] = {}  # the best so far, and what it has
        self._begun_at = 0
        self._due = 0
        self.count = 0

    def asked(self, identifier: int, genome: G, origin: str) -> None:
        """A proposal, made here or in an earlier run."""
        self._features[identifier] = self._space.features([genome])[0]
        if origin != self.ORIGIN:
            return
        if not self._due:
            self.count += 1
            self._begun_at = len(self._told)
            self._due = self._immigrants
            self._population.restart(SURVIVORS)
        self._due -= 1

    def told(self, identifier: int, values: Values | None) -> None:
        """A result, after it came into the population; None: it failed."""
        self._told[identifier] = len(self._told)
        if values is None or values in self._front.values():
            return
        known = {**self._front, identifier: values}
        best = front(np.array(list(known.values())))
        self._front = {number: known[number] for number in np.array(list(known))[best].tolist()}

    def revised(self, values: Mapping[int, Values]) -> None:
        """All fitnesses are others now."""
        numbers = list(values)
        best = front(np.array(list(values.values()))).tolist()
        self._front = {numbers[i]: values[numbers[i]] for i in best}

    def immigrants(self, rng: np.random.Generator) -> Iterator[G]:
        """Random genomes, the most novel first, if new blood is due now; else nothing."""
        if not (self._due or self._stagnates):
            return
        strangers = [self._space.random(rng) for _ in range(STRANGERS)]
        x = self._space.features(strangers)
        if not self._due and not self._collapsed(x):
            return
        newest = np.array(list(self._features.values())[-MOST_KNOWN:])
        yield from (strangers[i] for i in np.argsort(-_nearest(x, newest), kind="stable"))

    @property
    def _stagnates(self) -> bool:
        improved = max((self._told[number] + 1 for number in self._front), default=0)
        return len(self._told) - max(improved, self._begun_at) >= self._patience

    def _collapsed(self, strangers: Vector) -> bool:
        members = [self._features[number] for _, number in self._population.members]
        if len(members) < 2:
            return False
        own, most = (float(np.var(x, axis=0).sum()) for x in (members, strangers))
        return own < ALIKE * most


def _nearest(points: Vector, known: Vector) -> Vector:
    """(n, d), (m, d) -> (n,) squared distance of each point to the nearest one that is known."""
    squares = (points**2).sum(axis=1)[:, None] + (known**2).sum(axis=1) - 2 * points @ known.T
    found: Vector = squares.min(axis=1)
    return found
