"""Two-point statistics against counting, and the regression against the rule of mixtures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.errors import DMIError
from dmi_hpc.physics.bounds import voigt
from dmi_hpc.physics.elasticity import Material, solve
from dmi_hpc.physics.microstructure import GaussianField, sample
from dmi_hpc.physics.statistics import TwoPointRegression, two_point

SOFT, STIFF = Material(2.4, 0.3), Material(120.0, 0.3)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), lag=st.tuples(*[st.integers(-6, 6)] * 3))
def test_every_lag_equals_the_count_of_pairs(seed: int, lag: tuple[int, int, int]) -> None:
    phase = np.random.default_rng(seed).integers(0, 2, (2, 5, 6, 4), dtype=np.uint8)
    s2 = two_point(phase)
    shifted = np.roll(phase, [-d for d in lag], (1, 2, 3))
    index = tuple(d % n for d, n in zip(lag, phase.shape[1:], strict=True))
    np.testing.assert_allclose(s2[:, *index], (phase * shifted).mean((1, 2, 3)), atol=1e-12)
    np.testing.assert_allclose(s2[:, 0, 0, 0], phase.mean((1, 2, 3)), atol=1e-12)


def test_statistics_forget_position_and_inversion() -> None:
    phase = sample(GaussianField(7), 0, 0)[None]
    for image in (np.roll(phase, (1, 2, 3), (1, 2, 3)), phase[:, ::-1, ::-1, ::-1]):
        np.testing.assert_allclose(two_point(image), two_point(phase), atol=1e-12)


@pytest.fixture(scope="module")
def solved() -> tuple[np.ndarray, np.ndarray]:
    """160 solved microstructures of 9^3 voxels at contrast 50: phase and C1111 in GPa."""
    phase = np.stack(
        [sample(GaussianField(9, correlation_voxels=(0.5, 2)), 0, i) for i in range(160)]
    )
    return phase, solve(phase, (SOFT, STIFF), (1.0, 0, 0, 0, 0, 0), tolerance=1e-3).stress_GPa[:, 0]


def mean_absolute_error(predicted: np.ndarray, target: np.ndarray) -> float:
    return float(np.abs(predicted - target).mean())


def test_regression_is_far_better_than_the_rule_of_mixtures(
    solved: tuple[np.ndarray, np.ndarray],
) -> None:
    phase, target = solved
    model = TwoPointRegression().fit(phase[:120], target[:120])
    error = mean_absolute_error(model.predict(phase[120:]), target[120:])
    mixtures = mean_absolute_error(voigt(phase[120:].mean((1, 2, 3)), SOFT, STIFF), target[120:])
    assert error < mixtures / 8
    assert error < 2 * model.choice.error  # cross-validation told the truth
    again = TwoPointRegression().fit(phase[:120], target[:120]).predict(phase[120:])
    np.testing.assert_allclose(again, model.predict(phase[120:]), rtol=1e-9)


def test_symmetrised_regression_gives_symmetric_volumes_one_value(
    solved: tuple[np.ndarray, np.ndarray],
) -> None:
    phase, target = solved
    model = TwoPointRegression(symmetrise=True).fit(phase[:120], target[:120])
    held_out = phase[120:]
    expected = model.predict(held_out)
    assert mean_absolute_error(expected, target[120:]) < 0.15 * target.mean()
    for image in (held_out.swapaxes(2, 3), held_out[:, ::-1], np.rot90(held_out, 1, (2, 3))):
        np.testing.assert_allclose(model.predict(image), expected, rtol=1e-4)


def test_logarithmic_target_is_chosen_where_it_fits() -> None:
    """A target that is exponential in the volume fraction is linear after the logarithm."""
    phase = np.stack([sample(GaussianField(6), 1, i) for i in range(80)])
    target = np.exp(12 * phase.mean((1, 2, 3)))
    model = TwoPointRegression(components=(1, 2, 5)).fit(phase, target)
    assert model.choice.log_target
    assert np.abs(model.predict(phase) / target - 1).mean() < 0.1


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (np.ones(19), "20 microstructures and 19 targets"),
        (np.zeros(20), "expected one positive target each"),
    ],
)
def test_targets_that_cannot_be_fitted(target: np.ndarray, message: str) -> None:
    phase = np.stack([sample(GaussianField(4), 0, i) for i in range(20)])
    with pytest.raises(DMIError, match=message):
        TwoPointRegression().fit(phase, target)


def test_prediction_on_another_grid_is_refused() -> None:
    phase = np.stack([sample(GaussianField(4), 0, i) for i in range(20)])
    model = TwoPointRegression(components=(5,)).fit(phase, phase.mean((1, 2, 3)))
    with pytest.raises(DMIError, match=r"fitted to \(4, 4, 4\)"):
        model.predict(np.zeros((2, 5, 5, 5), np.uint8))
