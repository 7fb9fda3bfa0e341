"""The simulated cluster keeps its clock, its workers and its budget."""

import numpy as np
import pytest

from dmi_hpc.models.space import Choice, FloatRange, NetworkSpace, SearchSpace
from search.evolve import Evolution, EvolutionConfig, Failure, Success
from search.networks import Networks
from search.simulate import simulate

NETWORK = NetworkSpace(input_shape=(4,), dense_blocks=(0, 2))
SPACE = SearchSpace(network=NETWORK, hyper={"rate": FloatRange(low=0.0, high=1.0)})


def run(durations, workers, evaluations, space=SPACE):
    evolution = Evolution(Networks(space), EvolutionConfig(surrogate=False, initial=4))
    given = iter(durations)

    def evaluate(genome):
        return Success(dict(genome.hyper).get("rate", 0.0)), next(given)

    return evolution, simulate(evolution, evaluate, workers, evaluations)


def test_workers_never_wait_for_each_other():
    _, trace = run([4.0, 1.0, 1.0, 1.0, 1.0], workers=2, evaluations=5)
    assert trace.times.tolist() == [1.0, 2.0, 3.0, 4.0, 4.0]
    assert trace.ids.tolist() == [1, 2, 3, 0, 4]
    assert trace.utilisation == pytest.approx(1.0)


def test_utilisation_counts_idle_workers():
    _, trace = run([3.0, 1.0], workers=2, evaluations=2)
    assert trace.utilisation == pytest.approx(4 / 6)


def test_best_so_far_starts_with_the_first_success():
    evolution = Evolution(Networks(SPACE), EvolutionConfig(initial=6))
    outcomes = iter([Failure("timeout"), Success(3.0), Success(4.0), Failure("nan"), Success(1.0)])
    trace = simulate(evolution, lambda genome: (next(outcomes), 1.0), 1, 5)
    assert trace.best.tolist() == [np.inf, 3.0, 3.0, 3.0, 1.0]


def test_an_exhausted_space_ends_the_simulation_with_what_runs():
    network = NetworkSpace(input_shape=(4,), dense_blocks=(0, 0))
    space = SearchSpace(network=network, hyper={"n": Choice(values=(1, 2, 3))})
    _, trace = run([1.0, 2.0, 3.0], workers=2, evaluations=10, space=space)
    assert sorted(trace.ids.tolist()) == [0, 1, 2]


def test_hundreds_of_workers():
    durations = np.random.default_rng(0).lognormal(0.0, 0.5, 3000)
    evolution, trace = run(durations, workers=300, evaluations=3000)
    assert len(evolution.outcomes) == 3000
    assert trace.utilisation > 0.75
    assert (np.diff(trace.times) >= 0).all()
