"""What is found block by block is the cost of the whole network."""

import subprocess
import sys

import numpy as np
import pytest

from dmi_hpc.models.cost import cost
from dmi_hpc.models.space import FloatRange, NetworkSpace, SearchSpace
from search.spaces import sizes
from search.spaces.features import Features
from search.spaces.genome import decode
from search.spaces.networks import Networks
from search.spaces.sizes import Sizes

SKIPS = (None, "residual", "dense")
WIDE = {"skips": SKIPS, "branches": ((), (5,), (1, 7)), "dense_skips": SKIPS}
SPACES = {
    "vectors": NetworkSpace(input_shape=(12,), outputs=3, dense_blocks=(0, 5)),
    "volumes": NetworkSpace(input_shape=(1, 9, 9, 9), conv_blocks=(1, 6)),
    "branches": NetworkSpace(input_shape=(3, 24, 20), outputs=2, conv_blocks=(0, 5), **WIDE),
    "sequences": NetworkSpace(
        input_shape=(4, 30),
        conv_blocks=(0, 3),
        recurrent_blocks=(0, 3),
        readouts=("flatten", "mean", "last"),
    ),
    "maps": NetworkSpace(
        input_shape=(1, 20, 18),
        outputs=3,
        map_output=True,
        conv_blocks=(1, 6),
        dense_blocks=(0, 0),
        skips=SKIPS,
    ),
}


def chain_of(space, count):
    """Random genomes, and what mutations and crossovers make of them."""
    rng = np.random.default_rng(1)
    found = [space.random(rng) for _ in range(20)]
    while len(found) < count:
        first, second = rng.integers(len(found), size=2)
        found.append(space.mutated(space.crossed(found[first], found[second], rng), rng))
    return found


def space_of(name):
    hyper = {"learning_rate": FloatRange(low=1e-4, high=1e-1, log=True)}
    return Networks(SearchSpace(network=SPACES[name], hyper=hyper))


@pytest.mark.parametrize("name", SPACES)
def test_a_network_costs_what_its_layers_cost(name):
    space = space_of(name)
    found = Sizes(SPACES[name])
    for genome in chain_of(space, 300):
        assert found(genome) == cost(decode(genome, SPACES[name]))


@pytest.mark.parametrize("name", ["volumes", "maps"])
def test_what_is_forgotten_is_found_again(name, monkeypatch):
    monkeypatch.setattr(sizes, "KEPT", 7)
    found = Sizes(SPACES[name])
    for genome in chain_of(space_of(name), 60):
        assert found(genome) == cost(decode(genome, SPACES[name]))


@pytest.mark.parametrize("name", SPACES)
def test_features_of_many_are_those_of_each_alone(name):
    space = space_of(name)
    genomes = chain_of(space, 80)
    alone = [Features(space.space)(genome) for genome in genomes]
    assert np.array_equal(space.features(genomes), np.array(alone))
    assert space.features([]).shape == (0, len(alone[0]))


def test_a_worker_starts_without_what_only_the_search_needs():
    program = "import sys, search.trials.trial; print(*{'scipy.stats', 'sklearn'} & {*sys.modules})"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert found.stdout.split() == []
