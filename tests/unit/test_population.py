"""The population keeps the best, by one objective or by several."""

import numpy as np
import pytest

from search.evolution.population import Population


def test_the_worst_makes_room_and_equals_stay_by_age():
    population = Population(3)
    for identifier, fitness in enumerate([5.0, 3.0, 4.0, 9.0, 1.0, 3.0]):
        population.add(identifier, fitness)
    assert population.members == ((1.0, 4), (3.0, 1), (3.0, 5))


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
