"""Support vector machines that screen candidates before compute time is spent on them.

A regression on fitness *ranks* orders candidates; a classifier, once something has failed, says
which are likely to fail. After the SVM-guided second phase of Johnston et al., "Optimizing
convolutional neural networks for cloud detection", MLHPC 2017; ranks make it immune to outliers and
to the unit of the fitness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from sklearn.svm import SVC, SVR

from search.base import G, Space, Vector

REFIT_AFTER = 4  # tells
REFIT_SHARE = 50  # ... and at least 1/50 of what is known: the cost of a tell stays bounded
NEWEST = 2000  # a fit costs more than the square of its points
LEAST_FITTED = 8
PENALTY = 3.0
TUBE = 0.02  # of the regression, in ranks scaled to [0, 1]


class Surrogate(Generic[G]):
    """Learns from told genomes; `screen` orders candidates by expected fitness.

    Its state is a function of the sequence of `add` calls alone: a fit uses the first n points for
    an n on a fixed schedule, whenever it is asked. So a replayed search meets the same models.
    """

    def __init__(self, space: Space[G]) -> None:
        self._space = space
        self._points: list[Vector] = []
        self._fitness: list[float | None] = []
        self._due = REFIT_AFTER
        self._usable = 0  # the newest scheduled number of points
        self._fitted = 0
        self._ranker: SVR | None = None
        self._failures: SVC | None = None

    def add(self, genome: G, fitness: float | None) -> None:
        """One evaluated genome; `fitness` is None if it failed for a reason of its own."""
        self._points.append(self._space.features([genome])[0])
        self._fitness.append(fitness)
        if len(self._points) == self._due:
            self._usable = self._due
            self._due += max(REFIT_AFTER, self._due // REFIT_SHARE)

    def screen(self, candidates: Sequence[G]) -> list[int] | None:
        """Indices of `candidates`, most promising first; those expected to fail come last.

        None while too little is known.
        """
        if self._fitted != self._usable:
            self._fit()
        if self._ranker is None:
            return None
        x = self._space.features(candidates)
        ranks = self._ranker.predict(x)
        fails = np.zeros(len(x), dtype=bool)
        if self._failures is not None:
            fails = self._failures.predict(x).astype(bool)
        order: list[int] = np.lexsort((ranks, fails)).tolist()
        return order

    def _fit(self) -> None:
        start = max(0, self._usable - NEWEST)
        x = np.array(self._points[start : self._usable])
        fitness = self._fitness[start : self._usable]
        failed = np.array([value is None for value in fitness])
        self._ranker = _ranker(x[~failed], [value for value in fitness if value is not None])
        self._failures = _classifier(x, failed)
        self._fitted = self._usable


def _ranker(x: Vector, fitness: Sequence[float]) -> SVR | None:
    if len(fitness) < LEAST_FITTED:
        return None
    ranks = (rankdata(fitness) - 1) / (len(fitness) - 1)
    return SVR(C=PENALTY, epsilon=TUBE, gamma=_gamma(x)).fit(x, ranks)


def _classifier(x: Vector, failed: npt.NDArray[np.bool_]) -> Any:
    if failed.all() or not failed.any():
        return None
    return SVC(C=PENALTY, class_weight="balanced", gamma=_gamma(x)).fit(x, failed)


def _gamma(x: Vector) -> float:
    """Kernel width by the typical squared distance of two points, which is twice the variance."""
    variance = float(x.var(axis=0).sum())
    return 1.0 / variance if variance > 0 else 1.0
