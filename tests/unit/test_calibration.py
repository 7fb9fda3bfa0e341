"""Uncertainty of an ensemble: recovered where it is known, and judged honestly."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dmi_hpc.ensemble import Calibration
from search.results.calibration import calibrated, judged, nll


def drawn(scale, floor, rows=20_000, unit=1.0, seed=0):
    """(errors, spreads) whose standard deviation is hypot(scale spread, floor)."""
    rng = np.random.default_rng(seed)
    spread = unit * rng.lognormal(-1, 0.8, rows)
    return rng.normal(0, np.hypot(scale * spread, floor * unit)), spread


@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e12])
@pytest.mark.parametrize(("scale", "floor"), [(2.0, 0.3), (0.5, 1.0), (3.0, 0.02)])
def test_scale_and_floor_are_found_in_any_unit(scale, floor, unit):
    found = calibrated(*drawn(scale, floor, unit=unit))
    assert found.scale == pytest.approx(scale, rel=0.1)
    assert found.floor / unit == pytest.approx(floor, rel=0.15, abs=0.02)


def test_calibrated_uncertainty_covers_what_it_promises_on_other_rows():
    found = calibrated(*drawn(4.0, 0.2, rows=400, seed=1))
    scores = judged(*drawn(4.0, 0.2, seed=2), found)
    assert scores["coverage_1"] == pytest.approx(0.683, abs=0.04)
    assert scores["coverage_2"] == pytest.approx(0.954, abs=0.03)
    assert scores["raw"]["coverage_1"] < 0.4
    assert scores["nll"] < scores["raw"]["nll"] - 1


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.01, 30), st.floats(0.01, 3))
@example(440, 0.01171875, 0.01171875)  # spreads of a hundred times the errors
def test_calibration_never_makes_its_own_rows_less_likely(seed, scale, floor):
    error, spread = drawn(scale, floor, rows=60, seed=seed)
    found = calibrated(error, spread)
    alone = np.full(60, np.sqrt(np.mean(error**2)))
    assert nll(error, found.sigma(spread)) <= min(nll(error, spread), nll(error, alone)) + 1e-3


def test_useless_spread_becomes_a_constant():
    rng = np.random.default_rng(3)
    error, spread = rng.normal(0, 2.0, 5000), rng.lognormal(0, 1, 5000)
    found = calibrated(error, spread)
    assert found.sigma(spread).std() < 0.2
    assert found.sigma(spread).mean() == pytest.approx(2.0, rel=0.05)


def test_likelihood_by_hand():
    assert nll(np.array([1.0, 0.0]), np.array([1.0, 2.0])) == pytest.approx(
        np.mean([0.5 * np.log(2 * np.pi) + 0.5, 0.5 * np.log(2 * np.pi) + np.log(2)])
    )


@pytest.mark.parametrize("error", [np.zeros(5), np.array([0.0, 1.0, 0.0, 0.0, 0.0])])
def test_members_that_agree_are_no_division_by_zero(error):
    scores = judged(error, np.zeros(5), calibrated(error, np.zeros(5)))
    assert np.isfinite([scores["nll"], scores["raw"]["nll"]]).all()
    assert scores["rank_correlation"] is None
    assert Calibration(scale=2.0, floor=3.0).sigma(np.array([2.0])) == 5.0
