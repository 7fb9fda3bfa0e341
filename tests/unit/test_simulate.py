"""The simulated cluster keeps its clock, its workers and its budget."""

import numpy as np
import pytest

from dmi_hpc.models.space import Choice, FloatRange, NetworkSpace, SearchSpace
from search.evolution.evolve import Evolution, EvolutionConfig, Failure, Success
from search.evolution.simulate import Costs, Exchange, simulate, simulate_islands
from search.spaces.networks import Networks

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


def costly(durations, workers, evaluations, costs, **options):
    evolution = Evolution(Networks(SPACE), EvolutionConfig(surrogate=False))
    given = iter(durations)

    def evaluate(genome):
        seconds = next(given)
        return (Success(1.0) if seconds > 0 else Failure("nan")), abs(seconds)

    return simulate(evolution, evaluate, workers, evaluations, costs=costs, **options)


def test_workers_queue_at_the_driver():
    """Asks at 0-1 and 1-2; the first ends at 5, is told (1 s) and asks (1 s) until 7."""
    costs = Costs(ask_s=lambda told: 1.0, tell_s=lambda told: 1.0)
    trace = costly([4.0, 4.0, 3.0], 2, 3, costs)
    assert trace.times.tolist() == [5.0, 6.0, 10.0]
    assert trace.utilisation == pytest.approx(11 / 20)
    assert trace.driver == pytest.approx(6 / 10)


def test_a_driver_that_is_too_slow_bounds_the_rate():
    trace = costly([1.0] * 200, 50, 200, Costs(ask_s=lambda told: 0.1))
    assert trace.times[-1] == pytest.approx(200 * 0.1 + 1.0)
    assert trace.utilisation == pytest.approx(200 / (50 * 21.0))


def test_the_cost_depends_on_the_history():
    trace = costly([1.0] * 4, 1, 4, Costs(ask_s=lambda told: 10.0 * told))
    assert trace.times.tolist() == [1.0, 12.0, 33.0, 64.0]


def test_workers_arrive_one_by_one_and_come_back_after_failures():
    trace = costly([4.0, 4.0], 2, 2, Costs(arrival_s=2.0))
    assert trace.times.tolist() == [4.0, 5.0]
    trace = costly([-1.0, 1.0], 1, 2, Costs(restart_s=10.0))
    assert trace.times.tolist() == [1.0, 12.0]


def test_a_limit_cuts_what_runs():
    trace = costly([2.0] * 10, 2, 10, Costs(), limit_s=5.0)
    assert trace.times.tolist() == [2.0, 2.0, 4.0, 4.0]
    assert trace.utilisation == pytest.approx(1.0)
    assert trace.finished == pytest.approx(0.8)


def archipelago(exchange, count=2):
    evolutions = [
        Evolution(Networks(SPACE), EvolutionConfig(seed=seed, surrogate=False, initial=4))
        for seed in range(count)
    ]

    def evaluate(genome):
        return Success(dict(genome.hyper)["rate"]), 1.0

    return evolutions, simulate_islands(evolutions, evaluate, 5, 101, exchange)


def test_islands_share_workers_and_evaluations():
    evolutions, traces = archipelago(None)
    assert [len(trace.ids) for trace in traces] == [51, 50]
    assert traces[0].times[-1] == pytest.approx(17.0)  # 3 workers, 51 evaluations
    assert all(min(e.proposals) == 0 for e in evolutions)


def test_islands_take_in_the_best_of_each_other_as_foreign_proposals():
    evolutions, traces = archipelago(Exchange(interval_s=2.0, per_own=0.5), count=3)
    for evolution, trace in zip(evolutions, traces, strict=True):
        foreign = [p for number, p in evolution.proposals.items() if number < 0]
        assert 0 < len(foreign) <= 0.5 * len(trace.ids)
        assert {p.origin for p in foreign} == {"migrant"}
        hashes = [p.hash for p in evolution.proposals.values()]
        assert len(set(hashes)) == len(hashes)  # what is known here is neither taken in nor asked
    best = {evolution.best()[1] for evolution in evolutions}
    assert len(best) == 1  # the best of all came to all


def test_a_migrant_costs_its_island_a_tell():
    evolutions = [
        Evolution(Networks(SPACE), EvolutionConfig(seed=seed, surrogate=False)) for seed in (0, 1)
    ]
    traces = simulate_islands(
        evolutions,
        lambda genome: (Success(1.0), 10.0),
        2,
        2,
        Exchange(interval_s=10.5, per_own=1.0),
        costs=Costs(tell_s=lambda told: 2.0),
    )
    assert [trace.driver for trace in traces] == pytest.approx([0.4, 0.4])
