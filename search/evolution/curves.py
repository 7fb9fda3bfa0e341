"""How learning curves go on, learned from those that went on: what a trial may come to at the next rung.

Which network is ahead after a few epochs depends on how fast it still falls. Laws of one form for all
curves (Domhan et al., "Speeding up automatic hyperparameter optimization of deep neural networks by
extrapolation of learning curves", IJCAI 2015) say it badly from few epochs. But a search has seen how
its own curves went on: a ridge regression of the logarithm of an error's further fall on its recent
falls, which is nothing but the last error until enough is known.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from search.base import Vector

LEAST = 8  # curves that went on, until anything is learned from them
REFIT_SHARE = 10  # a new fit after 1/10 more of them
SHRINKAGE = (
    1.0  # of the coefficients of standardised features, towards no difference between curves
)
_TINY = 1e-12  # smaller errors are none


class Continuation:
    """Of the curves that came to one rung; their errors are positive, lower is better."""

    def __init__(self) -> None:
        self._features: dict[int, Vector] = {}
        self._went_on: dict[int, float] = {}  # id -> change of the logarithm until the next rung
        self._due = LEAST
        self._mean, self._weights = np.zeros(3), np.zeros(3)

    def arrived(self, identifier: int, error: float, curve: Sequence[float]) -> float:
        """The error to be expected at the next rung, up to a factor that is the same for all.

        error: lowest one up to this rung; curve: after each epoch so far.
        """
        self._features[identifier] = features(error, curve)
        return self.expected(identifier)

    def went_on(self, identifier: int, error: float) -> bool:
        """One of them has `error` at the next rung; True if that changes what `expected` says."""
        self._went_on[identifier] = _log(error) - self._features[identifier][0]
        if len(self._went_on) < self._due:
            return False
        self._fit()
        self._due += max(1, self._due // REFIT_SHARE)
        return True

    def expected(self, identifier: int) -> float:
        """As `arrived`."""
        known = self._features[identifier]
        return float(np.exp(known[0] + (known - self._mean) @ self._weights))

    def _fit(self) -> None:
        x = np.array([self._features[number] for number in self._went_on])
        y = np.array(list(self._went_on.values()))
        self._mean, scale = x.mean(axis=0), x.std(axis=0) + _TINY
        z = (x - self._mean) / scale
        ridge = z.T @ z + SHRINKAGE * np.eye(z.shape[1])
        self._weights = np.linalg.solve(ridge, z.T @ (y - y.mean())) / scale


def features(error: float, curve: Sequence[float]) -> Vector:
    """(3,) logarithm of the error; its falls since a half and three quarters of the curve."""
    now = _log(error)
    if not curve:
        return np.array([now, 0.0, 0.0])
    ends = (max(1, round(share * len(curve))) for share in (0.5, 0.75))
    return np.array([now, *(_log(min(curve[:end])) - now for end in ends)])


def _log(error: float) -> float:
    return float(np.log(max(error, _TINY)))
