"""Fitness of trials that were stopped early: compared where both were, never across epochs.

A scheduler such as ASHA stops most trials. Their last scores are of fewer iterations than those of
the others, and in one scale with them they mislead a search. What can be compared is two trials at
the last iteration that both have reached.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import inf, isfinite

GAP = 1.0  # to the best or worst one so far, where a score cannot be used as it is


@dataclass(frozen=True)
class Curve:
    """Scores of one trial, lower is better, at ascending iterations; at least one.

    ended: by itself, so that its last score stands for all later iterations; else it was stopped.
    """

    iterations: tuple[float, ...]
    scores: tuple[float, ...]
    ended: bool

    @property
    def reach(self) -> float:
        """The last iteration at which it can be compared."""
        return inf if self.ended else self.iterations[-1]

    def at(self, iteration: float) -> float:
        """The last score up to `iteration`; the first one if there is none."""
        return self.scores[max(0, bisect_right(self.iterations, iteration) - 1)]


class Standing:
    """Places trials among each other. A fitness once given stays; only their order means anything.

    Where no trial was stopped early, the fitness is the last score itself.
    """

    def __init__(self) -> None:
        self._placed: list[tuple[Curve, float]] = []

    def add(self, curve: Curve) -> float:
        """The fitness of a finished trial, lower is better.

        Comparisons at later iterations count first: an earlier one cannot overrule them.
        """
        fitness = self._fitness(curve)
        self.restore(curve, fitness)
        return fitness

    def restore(self, curve: Curve, fitness: float) -> None:
        """Take over a trial with the fitness that it was given."""
        self._placed.append((curve, fitness))

    def _fitness(self, curve: Curve) -> float:
        low, high = -inf, inf
        rivals = sorted(self._placed, key=lambda placed: -min(placed[0].reach, curve.reach))
        for rival, fitness in rivals:
            if low < fitness < high:
                common = min(rival.reach, curve.reach)
                mine, other = curve.at(common), rival.at(common)
                if mine == other:
                    return fitness
                low, high = (low, fitness) if mine < other else (fitness, high)
        last = curve.scores[-1]
        return last if low < last < high else _between(low, high)


def _between(low: float, high: float) -> float:
    if isfinite(low) and isfinite(high):
        return (low + high) / 2
    return high - GAP if isfinite(high) else low + GAP
