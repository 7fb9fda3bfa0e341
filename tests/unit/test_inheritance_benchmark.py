"""How the benchmark of inherited weights counts epochs."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from search_inheritance import EPOCHS, HALF, LENGTHS, Pair, row
from searching.tasks import stiffness


def pair(ends, within=None):
    """ends: error with inherited weights after a training of each of LENGTHS; from scratch it is 1."""
    anew = [2.0] * (EPOCHS - 2) + [1.0, 1.0]
    inherits = dict(zip(LENGTHS, ([end] for end in ends), strict=True))
    return Pair(inherits | {EPOCHS: within or [ends[-1]] * EPOCHS}, {HALF: [1.5], EPOCHS: anew})


def test_a_ratio_is_of_the_shortest_training_that_is_as_good():
    assert pair([3.0, 2.0, 1.0, 0.9, 0.8, 0.7]).own_schedules == pytest.approx(4 / 12)
    assert pair([3.0, 2.0, 1.5, 1.4, 1.3, 1.2]).own_schedules == 2.0
    assert pair([0.9, 2.0, 1.5, 1.4, 1.3, 1.2]).own_schedules == pytest.approx(2 / 12)


def test_within_one_schedule_it_is_by_the_epoch_of_the_other_one():
    late = [3.0] * 5 + [0.9] * 7
    assert pair([1.0] * 6, late).one_schedule == pytest.approx(6 / 11)
    assert pair([1.0] * 6, [1.1] * EPOCHS).one_schedule == pytest.approx(24 / 11)


def test_a_row_counts_all_children_and_means_those_that_inherit():
    case = stiffness(50.0, samples=600, epochs=EPOCHS, test=0.05)
    good = pair([3.0, 2.0, 1.0, 0.8, 0.8, 0.5])
    assert row(case, "all", [good, None, good]) == [
        *("stiffness, contrast 50", "all", "2 of 3", "0.33", "0.33", "0"),
        *("0.800", "1.500", "0.500", "0.09"),
    ]
    assert row(case, "all", [None])[2:4] == ["0 of 1", "-"]
