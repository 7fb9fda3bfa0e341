"""Support vector machines that screen candidates before compute time is spent on them.

A least-squares regression on the *ranks* of what was found says what to expect of a candidate; its
uncertainty, made smaller around what runs already, keeps many workers from flocking together. A
classifier, once something has failed, says what is likely to fail. After the SVM-guided second phase
of Johnston et al., "Optimizing convolutional neural networks for cloud detection", MLHPC 2017; ranks
make it immune to outliers and to the unit of the fitness.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from search.base import G, Space, Vector
from search.evolution.pareto import order

if TYPE_CHECKING:
    from search.evolution.regression import Regression, Running

Values = tuple[float, ...]  # fitness and further objectives, lower is better

LEAST_FITTED = 8
REFIT_SHARE = 25  # a refit after so many new points: 1/25 of what is known, at least one
MOST_FITTED = 300  # half of them the best, half the newest: bounds the cost of a fit
MOST_PENDING = 64
PENALTY = 3.0  # of the classifier


class Judgement(NamedTuple):
    """Of candidates, (n,) each. expected: share of what is known that is better, about 0 to 1;
    deviation: of it; fails: whether it is likely to have no fitness at all."""

    expected: Vector
    deviation: Vector
    fails: npt.NDArray[np.bool_]


class Surrogate(Generic[G]):
    """Learns from told genomes; `judge` says what to expect of others.

    Its models are a function of the sequence of `add` and `revise` alone: a fit uses what was known
    at fixed numbers of points, whenever it is asked. So a replayed search meets the same models.
    """

    def __init__(self, space: Space[G]) -> None:
        self._space = space
        self._points: list[Vector] = []
        self._values: list[Values | None] = []
        self._rows: dict[int, int] = {}
        self._pending: dict[int, Vector] = {}
        self._due = LEAST_FITTED
        self._kept: list[int] = []  # rows that a fit uses
        self._seen = 0
        self._unfitted: tuple[list[int], Vector, list[int]] | None = None
        self._model: Regression | None = None
        self._running: Running | None = None  # made anew when the model or what runs is another
        self._failures: Any = None
        self._spread = 1.0
        _models()  # now, not when a worker waits for the first fit

    def asked(self, identifier: int, genome: G) -> None:
        """A genome whose evaluation begins."""
        self._pending[identifier] = self._space.features([genome])[0]
        self._running = None

    def add(self, identifier: int, values: Values | None) -> None:
        """Its evaluation ended; `values` are None if it failed for a reason of its own."""
        self._rows[identifier] = len(self._points)
        self._points.append(self._pending.pop(identifier))
        self._running = None
        self._values.append(values)
        if len(self._points) == self._due:
            self._select()
            self._due += max(1, self._due // REFIT_SHARE)

    def forget(self, identifier: int) -> None:
        """Its evaluation ended, and says nothing about it."""
        del self._pending[identifier]
        self._running = None

    def revise(self, identifier: int, values: Values) -> None:
        """Other values of a genome that had some, from the next fit on."""
        self._values[self._rows[identifier]] = values

    def judge(self, genomes: Sequence[G]) -> Judgement | None:
        """None while too little is known."""
        with _libraries().limit(limits=1, user_api="blas"):
            return self._judged(genomes)

    def _judged(self, genomes: Sequence[G]) -> Judgement | None:
        if self._unfitted is not None:
            self._fit(*self._unfitted)
            self._unfitted = self._running = None
        if self._model is None:
            return None
        x = self._space.features(genomes)
        if self._running is None and self._pending:
            newest = islice(reversed(self._pending.values()), MOST_PENDING)
            self._running = self._model.running(np.array(list(newest)))
        mean, deviation = self._model.predict(x, self._running)
        fails = np.zeros(len(x), dtype=bool)
        if self._failures is not None:
            fails = self._failures.predict(x).astype(bool)
        return Judgement(0.5 + self._spread * mean, self._spread * deviation, fails)

    def _select(self) -> None:
        """Note what the next fit is of: all while there is little, else the best and the newest."""
        new = range(self._seen, len(self._points))
        self._seen = len(self._points)
        known = self._kept + list(new)
        failed = [row for row in known if self._values[row] is None][-MOST_FITTED // 2 :]
        rows = [row for row in known if self._values[row] is not None]
        if len(rows) < LEAST_FITTED:
            self._kept = known
            return
        ranks = _ranks([self._values[row] or () for row in rows])
        if len(rows) > MOST_FITTED:
            newest = len(rows) - MOST_FITTED // 2
            best = np.argsort(ranks[:newest], kind="stable")[: MOST_FITTED // 2]
            chosen = [*np.sort(best).tolist(), *range(newest, len(rows))]
            rows, ranks = [rows[i] for i in chosen], ranks[chosen]
        self._kept = sorted(rows + failed)
        self._unfitted = (rows, ranks, failed)

    def _fit(self, rows: list[int], ranks: Vector, failed: list[int]) -> None:
        x = np.array([self._points[row] for row in rows])
        places = (_ranked(ranks) - 0.5) / len(ranks)
        self._spread = float(places.std()) or 1.0
        regression, classifier = _models()
        self._model = regression(x, (places - 0.5) / self._spread)
        self._failures = None
        if failed:
            both = np.concatenate([x, [self._points[row] for row in failed]])
            label = np.arange(len(both)) >= len(x)
            self._failures = classifier(C=PENALTY, class_weight="balanced", gamma=_gamma(both))
            self._failures.fit(both, label)


@cache
def _models() -> tuple[type[Regression], Any]:
    """Regression and classifier. Workers come upon this module too, by way of evolution's types; they
    do without scipy and scikit-learn, a quarter of the time that they take to start."""
    from sklearn.svm import SVC

    from search.evolution.regression import Regression

    return Regression, SVC


@cache
def _libraries() -> ThreadpoolController:
    """Of this process, to keep BLAS at one thread: for matrices this small more are slower, beside
    busy workers by a factor of ten; and what it finds does not depend on the number of cores."""
    return ThreadpoolController()


def _ranks(values: Sequence[Values]) -> Vector:
    """(n,) places; several objectives: by NSGA-II's order."""
    if max(map(len, values)) > 1:
        return order(np.array(values)).astype(np.float64)
    return _ranked(np.array([fitness for (fitness,) in values]))


def _ranked(values: Vector) -> Vector:
    """(n,) places from 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    found: Vector = (np.cumsum(counts) - 0.5 * (counts - 1))[which]
    return found


def _gamma(x: Vector) -> float:
    """Kernel width by the typical squared distance of two points, which is twice the variance."""
    variance = float(x.var(axis=0).sum())
    return 1.0 / variance if variance > 0 else 1.0
