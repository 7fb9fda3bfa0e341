"""Fronts, crowding, order and hypervolume against definitions taken at their word."""

from __future__ import annotations

import numpy as np
import pytest

from search.evolution.pareto import crowding, front, hypervolume, nondominated_ranks, order


def dominates(a, b):
    return all(x <= y for x, y in zip(a, b, strict=True)) and any(
        x < y for x, y in zip(a, b, strict=True)
    )


def peeled(values):
    """Fronts by peeling."""
    ranks, left, rank = {}, set(range(len(values))), 0
    while left:
        best = {i for i in left if not any(dominates(values[j], values[i]) for j in left)}
        ranks.update(dict.fromkeys(best, rank))
        left, rank = left - best, rank + 1
    return [ranks[i] for i in range(len(values))]


@pytest.fixture(params=range(24), ids=str)
def values(request):
    """Points in 1 to 4 objectives; every second set has ties and duplicates."""
    rng = np.random.default_rng(request.param)
    shape = (int(rng.integers(1, 40)), 1 + request.param % 4)
    return rng.random(shape) if request.param % 2 else rng.integers(0, 4, shape).astype(float)


def test_ranks_are_those_of_peeling(values):
    assert nondominated_ranks(values).tolist() == peeled(values)


def test_front_is_rank_zero(values):
    assert front(values).tolist() == np.flatnonzero(nondominated_ranks(values) == 0).tolist()


def test_ranks_do_not_depend_on_the_order_of_points(values):
    shuffled = np.random.default_rng(0).permutation(len(values))
    assert (nondominated_ranks(values)[shuffled] == nondominated_ranks(values[shuffled])).all()


def test_crowding_of_a_front_by_hand():
    points = np.array([[0.0, 10.0], [1.0, 4.0], [3.0, 3.0], [4.0, 0.0]])
    expected = [np.inf, 3 / 4 + 7 / 10, 3 / 4 + 4 / 10, np.inf]
    assert crowding(points).tolist() == pytest.approx(expected)


def test_crowding_within_fronts_is_crowding_of_each(values):
    ranks = nondominated_ranks(values)
    together = crowding(values, ranks)
    for rank in range(ranks.max() + 1):
        assert together[ranks == rank].tolist() == crowding(values[ranks == rank]).tolist()


def test_an_objective_that_is_constant_in_a_front_says_nothing():
    points = np.array([[0.0, 5.0], [1.0, 5.0], [4.0, 5.0]])
    assert crowding(points)[1] == 1.0


def test_order_is_by_front_then_lonelier(values):
    ranks = nondominated_ranks(values)
    distance = crowding(values, ranks)
    best_first = np.argsort(order(values))
    keys = [(ranks[i], -distance[i]) for i in best_first]
    assert keys == sorted(keys)
    assert sorted(order(values)) == list(range(len(values)))


def test_what_breaks_constraints_comes_last_the_least_first(values):
    breach = np.random.default_rng(1).integers(-2, 3, len(values)).astype(float)
    places = order(values, breach)
    keeps = breach <= 0
    assert (places[keeps] == order(values[keeps])).all()
    after = np.argsort(places)[keeps.sum() :]
    assert (np.diff(breach[after]) >= 0).all()


def monte_carlo(values, reference, rng, draws=40_000):
    low = values.min(0)
    samples = low + rng.random((draws, values.shape[1])) * (reference - low)
    covered = (values[None] <= samples[:, None]).all(2).any(1)
    return covered.mean() * np.prod(reference - low)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_hypervolume_is_the_dominated_share_of_the_box(objectives):
    rng = np.random.default_rng(objectives)
    values, reference = rng.random((12, objectives)), np.full(objectives, 1.1)
    drawn = monte_carlo(values, reference, rng)
    assert hypervolume(values, reference) == pytest.approx(drawn, rel=0.02)


def test_hypervolume_by_hand():
    staircase = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]])
    assert hypervolume(staircase, np.array([4.0, 4.0])) == 6.0
    assert hypervolume(np.array([[1.0, 1.0, 1.0]]), np.array([2.0, 3.0, 4.0])) == 6.0
    assert hypervolume(np.array([[1.0, 5.0]]), np.array([4.0, 4.0])) == 0.0


def test_dominated_points_and_points_beyond_the_reference_add_nothing(values):
    reference = np.full(values.shape[1], 0.9 * values.max() + 0.1)
    expected = hypervolume(values[front(values)], reference)
    beyond = np.vstack([values, reference + 1])
    assert hypervolume(beyond, reference) == pytest.approx(expected)


def test_nothing_has_no_front():
    nothing = np.empty((0, 2))
    assert not front(nothing).size and not order(nothing).size
    assert hypervolume(nothing, np.ones(2)) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    values = np.array([[1.0, bad], [0.0, 1.0]])
    for function in (nondominated_ranks, front, crowding, order):
        with pytest.raises(ValueError, match="not finite"):
            function(values)
    with pytest.raises(ValueError, match="violation"):
        order(np.ones((2, 2)), np.array([0.0, bad]))
    with pytest.raises(ValueError, match="reference"):
        hypervolume(np.ones((2, 2)), np.array([1.0, bad]))
    with pytest.raises(ValueError, match="expected"):
        front(np.ones(3))
