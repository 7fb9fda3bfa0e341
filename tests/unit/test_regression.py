"""The regression predicts, knows how well, and finds what matters."""

import numpy as np
import pytest

from search.evolution.regression import Regression


def data(n, d, seed=0, noise=0.05):
    rng = np.random.default_rng(seed)
    x = rng.random((n, d))
    y = np.sin(6 * x[:, 0]) + 2 * x[:, 1] + noise * rng.standard_normal(n)
    return x, (y - y.mean()) / y.std()


@pytest.mark.parametrize(("features", "least"), [(4, 0.99), (20, 0.85)])
def test_it_predicts_what_it_has_not_seen(features, least):
    """With a width for each feature, and with one for all."""
    x, y = data(400, features, noise=0.0)
    mean, deviation = Regression(x[:200], y[:200]).predict(x[200:])
    assert np.corrcoef(mean, y[200:])[0, 1] > least
    typical = np.median(np.abs(mean - y[200:]) / deviation)
    assert 0.1 < typical < 2  # its deviation is about what it says


def test_widths_of_their_own_see_through_features_that_do_not_matter():
    x, y = data(120, 16)
    test, truth = data(300, 16, seed=1)
    assert np.corrcoef(Regression(x, y).predict(test)[0], truth)[0, 1] > 0.97
    padded = np.concatenate([x, np.zeros((len(x), 1))], axis=1)  # one too many for that
    found = Regression(padded, y).predict(np.concatenate([test, np.zeros((300, 1))], axis=1))[0]
    assert np.corrcoef(found, truth)[0, 1] < 0.97


def test_uncertainty_is_small_at_known_points_and_around_those_that_run():
    x, y = data(60, 3)
    model = Regression(x, y)
    far = np.full((1, 3), 3.0)
    (_, known), (_, unknown) = model.predict(x), model.predict(far)
    assert known.max() < 0.6 * unknown[0]
    mean, alone = model.predict(far + 0.01)
    same, running = model.predict(far + 0.01, model.running(far))
    assert running[0] < 0.5 * alone[0]
    assert same == mean  # nothing is known of it yet
    _, elsewhere = model.predict(x, model.running(far))
    assert elsewhere == pytest.approx(known, rel=1e-3)


def test_equal_points_and_equal_targets_do_no_harm():
    x = np.ones((12, 3))
    y = np.linspace(-1.5, 1.5, 12)
    mean, deviation = Regression(x, y).predict(x[:1])
    assert abs(mean[0]) < 0.1
    assert np.isfinite(deviation).all()
    mean, deviation = Regression(np.random.default_rng(0).random((12, 3)), np.zeros(12)).predict(x)
    assert np.isfinite(mean).all() and np.isfinite(deviation).all()


def test_a_long_history_is_fitted_whole_though_its_widths_are_chosen_by_a_part():
    x, y = data(300, 2)
    mean, _ = Regression(x, y).predict(x)
    assert np.abs(mean - y).max() < 0.3
