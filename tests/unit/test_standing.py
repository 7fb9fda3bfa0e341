"""Fitness of trials stopped early: by comparison where both were."""

from itertools import pairwise

import numpy as np
import pytest

from search.evolution.standing import Curve, Standing


def curve(*scores, ended=False, every=1):
    return Curve(tuple(float(every * (i + 1)) for i in range(len(scores))), scores, ended)


def test_whole_trials_keep_their_scores():
    standing, rng = Standing(), np.random.default_rng(0)
    scores = rng.normal(size=50)
    for score in (*scores, scores[7]):
        assert standing.add(curve(1.0, score, ended=True)) == score


def test_a_stopped_trial_counts_by_what_the_others_were_then():
    standing = Standing()
    slow = standing.add(curve(0.9, 0.5, 0.1, ended=True))
    good = standing.add(curve(0.8, 0.4, 0.05, ended=True))
    stopped = standing.add(curve(0.85))  # far worse than 0.1 as it is, but better at iteration 1
    worse = standing.add(curve(0.95))
    assert good < stopped < slow < worse
    assert slow == 0.1
    # a fast start does not overrule the end
    assert standing.add(curve(0.1, 0.1, 0.2, ended=True)) > slow


def test_whole_trials_are_in_the_order_of_their_scores_whatever_was_stopped():
    rng, standing, whole = np.random.default_rng(1), Standing(), []
    for _ in range(200):
        start, end = rng.uniform(0.5, 1.0), rng.uniform(0.0, 0.5)
        scores = tuple(np.linspace(start, end, 9))
        reach = int(rng.choice([1, 3, 9]))
        fitness = standing.add(curve(*scores[:reach]))
        if reach == 9:
            whole.append((end, fitness))
    assert len(whole) > 30
    ordered = sorted(whole)
    assert all(a[1] < b[1] for a, b in pairwise(ordered))


def test_one_that_ended_by_itself_stands_for_later_iterations():
    standing = Standing()
    long = standing.add(curve(0.9, 0.8, 0.7, 0.2))
    assert standing.add(curve(0.5, ended=True)) > long
    assert standing.add(curve(0.5)) < long  # stopped: compared with 0.9


def test_reports_at_other_iterations_are_compared_with_the_last_before():
    rare = curve(0.6, 0.2, every=5)
    assert (rare.at(4), rare.at(5), rare.at(9), rare.at(10), rare.at(99)) == (
        0.6,
        0.6,
        0.6,
        0.2,
        0.2,
    )


def test_restored_trials_count_like_added_ones():
    first, second = Standing(), Standing()
    for given in (curve(0.9, 0.1), curve(0.8)):
        second.restore(given, first.add(given))
    assert first.add(curve(0.85)) == second.add(curve(0.85))


@pytest.mark.parametrize("scores", [(0.5,), (0.5, 0.5)])
def test_equal_is_equal(scores):
    standing = Standing()
    assert standing.add(curve(*scores)) == standing.add(curve(*scores))
