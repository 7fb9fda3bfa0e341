"""Seconds of a trial, foretold from trials that finished."""

import numpy as np
import pytest

from dmi_hpc.models.cost import cost
from dmi_hpc.models.space import Choice, NetworkSpace, SearchSpace
from search.spaces.genome import decode
from search.spaces.networks import Networks
from search.trials.pace import ENOUGH, JUDGED, Load, Pace, load_of

SPACE = SearchSpace(
    network=NetworkSpace(input_shape=(1, 9, 9, 9), conv_blocks=(1, 3), filters=(4, 8, 16, 32)),
    hyper={"batch_size": Choice(values=(8, 32, 128), ordered=True)},
)


def loads(count, amount=2.0, seed=0):
    nets, rng = Networks(SPACE), np.random.default_rng(seed)
    return [load_of(nets.random(rng), SPACE.network, amount) for _ in range(count)]


def machine(load, rng=None, noise=0.3):
    """A second for each trial, 2e-8 for each FLOP of an epoch, 3 for each epoch's steps; busy at
    times."""
    seconds = 1.0 + load.amount * (2e-8 * load.flops + 3.0 / load.batch_size)
    return seconds * (1.0 if rng is None else float(np.exp(noise * rng.standard_normal())))


def learned(count, rng=None, seed=0):
    pace = Pace()
    for load in loads(count, seed=seed):
        pace.learn(load, machine(load, rng))
    return pace


def test_the_load_is_what_the_shapes_say():
    genome = Networks(SPACE).random(np.random.default_rng(1))
    found, load = cost(decode(genome, SPACE.network)), load_of(genome, SPACE.network, 3.0)
    batch_size = dict(genome.hyper)["batch_size"]
    assert load == Load(3.0, found.flops, found.activations, found.parameters, batch_size)


def test_nothing_is_foretold_before_it_could_be_checked():
    for count in range(ENOUGH + JUDGED):
        assert learned(count).seconds(loads(1)[0]) is None
    assert learned(ENOUGH + JUDGED).seconds(loads(1)[0]) > 0


def test_a_machine_that_follows_the_law_is_known_exactly():
    pace = learned(40)
    for load in loads(30, seed=1):
        assert pace.seconds(load) == pytest.approx(machine(load), rel=0.02)


def test_costlier_networks_and_longer_trainings_take_longer_than_any_seen():
    pace, largest = learned(40, np.random.default_rng(0)), max(loads(40), key=machine)
    wide = Load(2.0, 30 * largest.flops, largest.activations, largest.parameters, 8)
    assert pace.seconds(wide) == pytest.approx(machine(wide), rel=0.4)
    assert pace.seconds(wide) > 10 * pace.seconds(largest)


def test_quantiles_hold_for_trials_that_were_not_seen():
    rng, within = np.random.default_rng(3), []
    for seed in range(20):
        pace = learned(60, rng, seed=seed)
        for load in loads(20, seed=1000 + seed):
            seconds = machine(load, rng)
            within.append([seconds <= pace.seconds(load, q) for q in (0.05, 0.5, 0.9)])
    low, half, high = np.mean(within, axis=0)
    assert low < 0.12
    assert 0.4 < half < 0.6
    assert 0.83 < high < 0.97


def test_a_few_trials_that_were_held_up_change_little():
    pace = Pace()
    for number, load in enumerate(loads(60)):
        pace.learn(load, machine(load) * (20.0 if number % 10 == 9 else 1.0))
    errors = [abs(np.log(pace.seconds(load) / machine(load))) for load in loads(30, seed=1)]
    assert np.median(errors) < 0.15


def test_a_machine_that_became_slower_is_followed():
    pace = Pace()
    for load in loads(40):
        pace.learn(load, machine(load))
    for load in loads(60, seed=1):
        pace.learn(load, 3 * machine(load))
    ratios = [pace.seconds(load) / machine(load) for load in loads(20, seed=2)]
    assert 2.0 < np.median(ratios) < 3.6
