"""What is learned of how curves go on."""

import numpy as np
import pytest

from search.evolution.curves import LEAST, Continuation, features


def curve(rng):
    """(12,) errors: a fast or a slow start, and a floor that is the lower, the slower the start."""
    rate = rng.uniform(0.5, 2.0)
    return (0.1 * rate + np.arange(1, 13) ** -rate) * np.exp(0.01 * rng.standard_normal(12))


def taught(count, seed=0, unit=1.0):
    """A continuation that has seen so many curves of 12 epochs after 4, and 100 more: at 4, at 12."""
    rng, learner = np.random.default_rng(seed), Continuation()
    for number in range(count + 100):
        errors = unit * curve(rng)
        learner.arrived(number, float(errors[:4].min()), errors[:4].tolist())
        if number < count:
            learner.went_on(number, float(errors.min()))
        else:
            yield learner.expected(number), float(errors[:4].min()), float(errors.min())


def agreement(first, second):
    return np.corrcoef(np.argsort(np.argsort(first)), np.argsort(np.argsort(second)))[0, 1]


def test_until_enough_went_on_the_error_is_what_is_expected():
    for expected, now, _ in taught(LEAST - 1):
        assert expected == pytest.approx(now)


def test_how_curves_went_on_says_who_will_be_ahead():
    expected, now, end = map(np.array, zip(*taught(40), strict=True))
    assert agreement(expected, end) > 0.8 > agreement(now, end) + 0.2


def test_the_unit_of_the_error_does_not_matter():
    plain = [expected for expected, *_ in taught(20)]
    other = [expected for expected, *_ in taught(20, unit=1e3)]
    assert other == pytest.approx([1e3 * value for value in plain])


def test_predictions_change_at_fits_alone():
    rng, learner = np.random.default_rng(1), Continuation()
    changed = []
    for number in range(30):
        errors = curve(rng)
        learner.arrived(number, float(errors[:4].min()), errors[:4].tolist())
        changed.append(learner.went_on(number, float(errors.min())))
    assert changed.index(True) == LEAST - 1
    assert all(changed[LEAST:19])
    assert not all(changed[20:])


@pytest.mark.parametrize(
    ("known", "expected"),
    [((), (0, 0)), ((1.0,), (0, 0)), ((np.e, 1.0), (1, 0)), ((np.e**2, np.e, 3.0, 1.0), (1, 1))],
)
def test_features_are_falls_of_the_logarithm(known, expected):
    now, *falls = features(1.0, known)
    assert now == 0
    assert falls == pytest.approx(expected)
