"""Two-point statistics, and the regression on them that networks are compared with."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from dmi_hpc.errors import DMIError

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

_FOLDS = 5
# Microstructures transformed at a time: bounds the memory of the complex spectra.
_BLOCK = 128


def two_point(phase: Array) -> FloatArray:
    """Periodic autocorrelation S2 of the stiff phase (value 1), (B, N1, N2, N3).

    S2[b, r] is the probability that two voxels a vector r apart are both stiff; index 0 is zero
    lag, where it equals the volume fraction (Torquato, Random Heterogeneous Materials, chapter 2).
    """
    axes = (1, 2, 3)
    stiff = (np.asarray(phase) == 1).astype(np.float64)
    power = np.abs(scipy.fft.rfftn(stiff, axes=axes)) ** 2
    return np.asarray(scipy.fft.irfftn(power, s=stiff.shape[1:], axes=axes) / stiff[0].size)


@dataclass(frozen=True)
class RegressionChoice:
    """What cross-validation selected, with its mean absolute error in the target's unit."""

    components: int
    degree: int
    ridge: float
    log_target: bool
    error: float


class TwoPointRegression:
    """Positive property from two-point statistics: PCA, polynomial of degree 1 or 2, ridge.

    The baseline of Gupta et al. (Acta Mater. 91 (2015) 239) and Yang et al. (Comput. Mater. Sci.
    151 (2018) 278) in its strongest form: number of components (at most 40), degree, ridge and the
    target's scale (plain or logarithm) are those of the least mean absolute error in five-fold
    cross-validation on the training rows.

    symmetrise: average S2 over the symmetries that keep axis 0 (mirrors and the exchange of axes 1
    and 2), which leave a response along axis 0 unchanged. Needs N2 = N3. Not in the publications.
    """

    def __init__(
        self,
        *,
        components: tuple[int, ...] = (5, 10, 15, 20, 30, 40),
        ridges: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0),
        symmetrise: bool = False,
    ) -> None:
        self._components = components
        self._ridges = ridges
        self._symmetrise = symmetrise

    def fit(self, phase: Array, target: Array) -> TwoPointRegression:
        """phase: (B, N1, N2, N3), 1 = stiff; target: (B,) positive."""
        values = np.asarray(target, dtype=np.float64)
        if len(phase) != len(values) or len(values) < 2 * _FOLDS or not (values > 0).all():
            raise DMIError(
                f"{len(phase)} microstructures and {len(values)} targets, the least "
                f"{values.min(initial=np.inf):.4g}; expected one positive target each, at least "
                f"{2 * _FOLDS}"
            )
        self._shape = phase.shape[1:]
        statistics = self._features(phase)
        most = min(*statistics.shape, max(self._components))
        self._pca = PCA(most, whiten=True, svd_solver="randomized", random_state=0).fit(statistics)
        scores = self._pca.transform(statistics).astype(np.float64)
        targets = np.stack([values, np.log(values)], axis=1)
        self.choice = self._choose(scores, targets, most)
        self._model = _polynomial(self.choice.degree, self.choice.ridge)
        self._model.fit(scores[:, : self.choice.components], targets)
        return self

    def predict(self, phase: Array) -> FloatArray:
        """(B,) in the target's unit."""
        if phase.shape[1:] != self._shape:
            raise DMIError(f"volumes are {phase.shape[1:]}; fitted to {self._shape}")
        scores = self._pca.transform(self._features(phase)).astype(np.float64)
        outputs = self._model.predict(scores[:, : self.choice.components])
        return _in_target_units(outputs)[:, int(self.choice.log_target)]

    def _features(self, phase: Array) -> npt.NDArray[np.float32]:
        """(B, features): S2(r) = S2(-r), so half the lags hold everything."""
        half = phase.shape[3] // 2 + 1
        blocks = []
        for start in range(0, len(phase), _BLOCK):
            statistics = two_point(phase[start : start + _BLOCK])
            if self._symmetrise:
                statistics = _average_over_symmetries(statistics)
            blocks.append(statistics[..., :half].reshape(len(statistics), -1).astype(np.float32))
        return np.concatenate(blocks)

    def _choose(self, scores: Array, targets: FloatArray, most: int) -> RegressionChoice:
        splits = list(KFold(_FOLDS, shuffle=True, random_state=0).split(scores))
        counts = sorted({min(count, most) for count in self._components})
        choices = []
        for count, degree, ridge in itertools.product(counts, (1, 2), self._ridges):
            inputs = scores[:, :count]
            errors = np.zeros(2)
            for fitted, held_out in splits:
                model = _polynomial(degree, ridge).fit(inputs[fitted], targets[fitted])
                predicted = _in_target_units(model.predict(inputs[held_out]))
                errors += np.abs(predicted - targets[held_out, :1]).sum(0)
            for log_target, error in zip((False, True), errors / len(targets), strict=True):
                choices.append(RegressionChoice(count, degree, ridge, log_target, float(error)))
        return min(choices, key=lambda choice: choice.error)


def _polynomial(degree: int, ridge: float) -> Pipeline:
    return make_pipeline(
        PolynomialFeatures(degree, include_bias=False), StandardScaler(), Ridge(ridge)
    )


def _in_target_units(outputs: FloatArray) -> FloatArray:
    """(B, 2) from the columns (plain, logarithm)."""
    return np.stack([outputs[:, 0], np.exp(outputs[:, 1])], axis=1)


def _average_over_symmetries(statistics: FloatArray) -> FloatArray:
    for axis in (2, 3):
        mirrored = np.roll(np.flip(statistics, axis), 1, axis)  # lag r -> -r
        statistics = (statistics + mirrored) / 2
    return (statistics + statistics.swapaxes(2, 3)) / 2
