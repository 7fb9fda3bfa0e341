"""The population keeps the best, by one objective or by several."""

import numpy as np
import pytest

from search.evolution.population import Population


def test_the_worst_makes_room_and_equals_stay_by_age():
    population = Population(3)
    for identifier, fitness in enumerate([5.0, 3.0, 4.0, 9.0, 1.0, 3.0]):
        population.add(identifier, fitness)
    assert population.members == ((1.0, 4), (3.0, 1), (3.0, 5))


def test_by_age_the_first_to_enter_leaves_however_good():
    population = Population(3, "age")
    for identifier, fitness in [(7, 1.0), (3, 5.0), (5, 4.0), (1, 9.0)]:
        population.add(identifier, fitness)
    assert population.members == ((4.0, 5), (5.0, 3), (9.0, 1))
    population.revise({7: 0.0, 3: 3.0, 5: 2.0, 1: 1.0})
    assert population.members == ((1.0, 1), (2.0, 5), (3.0, 3))


def test_by_age_with_two_objectives_the_oldest_leaves_a_front_too():
    population = Population(2, "age")
    for identifier, fitness in enumerate([1.0, 3.0, 2.0]):
        population.add(identifier, fitness, (4.0 - fitness,))
    assert {number for _, number in population.members} == {1, 2}
    population.add(3, 9.0, (9.0,))
    assert [number for _, number in population.members] == [2, 3]


@pytest.mark.parametrize("others", [(), (1.0,)])
def test_after_a_restart_only_survivors_and_newcomers_count(others):
    population = Population(3)
    for identifier in range(5):
        population.add(identifier, float(identifier), others)
    population.restart(1)
    assert [number for _, number in population.members] == [0]
    population.add(9, 7.0, others)
    assert [number for _, number in population.members] == [0, 9]
    if not others:
        population.revise({0: 3.0, 1: 0.0, 2: 1.0, 9: 2.0})
        assert population.members == ((2.0, 9), (3.0, 0))


def test_tournaments_prefer_the_best():
    population = Population(3)
    for identifier in range(3):
        population.add(identifier, float(identifier))
    rng = np.random.default_rng(0)
    winners = [population.tournament(2, rng) for _ in range(600)]
    shares = [winners.count(identifier) / 600 for identifier in range(3)]
    assert shares == pytest.approx([5 / 9, 3 / 9, 1 / 9], abs=0.06)


def test_a_revision_brings_back_who_had_left():
    population = Population(2)
    for identifier, fitness in enumerate([1.0, 2.0, 3.0]):
        population.add(identifier, fitness)
    population.revise({0: 0.9, 1: 0.5, 2: 0.1})
    assert population.members == ((0.1, 2), (0.5, 1))


def test_with_two_objectives_the_front_comes_first_and_its_ends_stay():
    population = Population(4)
    points = [(1.0, 9.0), (9.0, 1.0), (5.0, 5.0), (5.1, 5.1), (4.9, 5.2), (9.5, 9.5), (2.0, 8.0)]
    for identifier, (fitness, other) in enumerate(points):
        population.add(identifier, fitness, (other,))
    numbers = [identifier for _, identifier in population.members]
    assert set(numbers[:2]) == {0, 1}  # the ends are the loneliest
    assert not set(numbers) & {3, 5}  # dominated
    assert (1.0, 0) in population.members
