"""Every child is valid, in canonical form, and near its parents."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.models.space import Choice, FloatRange, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import shapes
from search.evolution.population import Population
from search.spaces.genome import ConvGene, DenseGene, Genome, canonical, decode
from search.spaces.operators import (
    change_readout,
    crossover,
    mutate,
    parametric,
    restructure,
    step,
    structural,
)
from search.spaces.space import random_genome, repair

HYPER = {
    "batch_size": Choice(values=(8, 16, 32), ordered=True),
    "learning_rate": FloatRange(low=1e-5, high=1e-1, log=True),
    "optimizer": Choice(values=("adam", "sgd")),
}


def space_of(*shape, **network):
    return SearchSpace(network=NetworkSpace(input_shape=shape, **network), hyper=HYPER)


SPACES = [
    *(space_of(1, n, n, n, conv_blocks=(2, 6), kernels=(1, 3, 5, 7)) for n in (15, 21, 51)),
    space_of(3, 9, 30, conv_blocks=(0, 3)),
    space_of(86, dense_blocks=(3, 20)),
    space_of(4, dense_blocks=(0, 0)),
]
CONV = ConvGene(16, 3, "zeros", None, "relu", None, 0.0)
DENSE = DenseGene(64, None, "relu", 0.0)
VALUES = (("batch_size", 16), ("learning_rate", 1e-3), ("optimizer", "adam"))


def require_valid(genome, space):
    network = space.network
    shapes(decode(genome, network))
    assert canonical(genome, space) == genome
    assert network.conv_blocks[0] <= len(genome.conv) <= network.conv_blocks[1]
    assert network.dense_blocks[0] <= len(genome.dense) <= network.dense_blocks[1]
    assert [name for name, _ in genome.hyper] == sorted(space.hyper)
    values = dict(genome.hyper)
    assert 1e-5 <= values["learning_rate"] <= 1e-1
    assert values["batch_size"] in (8, 16, 32)
    for gene in genome.conv:
        assert gene.filters in network.filters and gene.pool in network.pools
    for gene in genome.dense:
        assert gene.units in network.units and gene.dropout in network.dropouts


@given(st.sampled_from(SPACES), st.integers(0, 2**32))
@settings(deadline=None, max_examples=200)
def test_children_of_any_operator_are_valid(space, seed):
    rng = np.random.default_rng(seed)
    first, second = random_genome(space, rng), random_genome(space, rng)
    require_valid(first, space)
    require_valid(crossover([first, second], space, rng), space)
    for operator in (mutate, structural, parametric, change_readout, restructure):
        child = first
        for _ in range(4):
            child = operator([child], space, rng)
            require_valid(child, space)


def test_operators_depend_on_the_generator_alone():
    space = SPACES[0]
    parents = [random_genome(space, np.random.default_rng(seed)) for seed in (1, 2)]
    children = [crossover(parents, space, np.random.default_rng(7)) for _ in range(2)]
    assert children[0] == children[1]
    children = [mutate(parents[:1], space, np.random.default_rng(7)) for _ in range(2)]
    assert children[0] == children[1]


def test_crossover_takes_every_part_from_one_of_the_parents():
    space = space_of(1, 51, 51, 51, conv_blocks=(1, 6))
    low = Genome((CONV,) * 3, "mean", (DENSE,), VALUES)
    other_conv = ConvGene(32, 3, "circular", "batch", "gelu", "max", 0.1)
    other_values = (("batch_size", 8), ("learning_rate", 1e-2), ("optimizer", "sgd"))
    high = Genome((other_conv,) * 5, "flatten", (DenseGene(16, "batch", "elu", 0.1),), other_values)
    children = [crossover([low, high], space, np.random.default_rng(seed)) for seed in range(60)]
    assert {len(child.conv) for child in children} == {3, 5}
    assert {gene for child in children for gene in child.conv} == {CONV, other_conv}
    assert all(child.conv[3:] in ((), (other_conv,) * 2) for child in children)
    assert {pair for child in children for pair in child.hyper} == {*VALUES, *other_values}
    assert {child.readout for child in children} == {"mean", "flatten"}
    assert len(set(children)) > 40


def test_structural_mutation_inserts_deletes_duplicates_and_swaps():
    space = space_of(86, dense_blocks=(1, 6))
    parent = Genome((), None, tuple(DenseGene(n, None, "relu", 0.0) for n in (16, 32, 64)), VALUES)
    children = [
        [gene.units for gene in structural([parent], space, np.random.default_rng(seed)).dense]
        for seed in range(200)
    ]
    assert [16, 64] in children
    assert [32, 16, 64] in children
    assert [16, 32, 32, 64] in children
    assert any(len(c) == 4 and [u for u in c if u != 2048] == [16, 32, 64] for c in children)
    assert {len(child) for child in children} == {2, 3, 4}


def test_restructuring_leaves_hyper_parameters_alone_and_changes_the_readout_too():
    space = space_of(1, 15, 15, 15, conv_blocks=(1, 6))
    parent = Genome((CONV, CONV), "mean", (DENSE,), VALUES)
    children = [restructure([parent], space, np.random.default_rng(seed)) for seed in range(300)]
    assert {child.hyper for child in children} == {parent.hyper}
    readouts = np.mean([child.readout != parent.readout for child in children])
    assert readouts == pytest.approx(1 / 7, abs=0.07)
    assert {len(child.conv) for child in children} > {len(parent.conv)}


def test_structural_mutation_renews_a_block_that_must_stay():
    space = space_of(86, dense_blocks=(1, 1))
    parent = Genome((), None, (DENSE,), VALUES)
    found = {structural([parent], space, np.random.default_rng(seed)) for seed in range(20)}
    assert len(found) > 10


def test_ordered_choices_mostly_step_to_neighbours():
    rng = np.random.default_rng(0)
    sizes = Choice(values=(1, 2, 4, 8, 16, 32, 64), ordered=True)
    steps = [step(8, sizes, rng) for _ in range(400)]
    assert 8 not in steps
    assert 0.6 < np.mean([value in (4, 16) for value in steps]) < 0.9
    assert set(steps) == {1, 2, 4, 16, 32, 64}
    outside = [step(12, sizes, rng) for _ in range(100)]  # a founder's value
    assert np.mean([value in (8, 16) for value in outside]) > 0.6


def test_real_numbers_step_on_their_own_scale():
    rng = np.random.default_rng(0)
    rate = FloatRange(low=1e-6, high=1.0, log=True)
    logs = np.log10([step(1e-3, rate, rng) for _ in range(2000)])
    assert abs(logs.mean() + 3) < 0.1
    assert 0.3 < logs.std() < 2
    assert -6 <= logs.min() < -4 and -2 < logs.max() <= 0
    share = FloatRange(low=0.0, high=1.0)
    assert abs(np.mean([step(0.5, share, rng) for _ in range(2000)]) - 0.5) < 0.02
    assert 1e-6 <= step(0.0, rate, rng) <= 1e-2  # a founder's value from outside


def test_repair_brings_depths_and_values_within_limits():
    space = space_of(1, 15, 15, 15, conv_blocks=(2, 3), dense_blocks=(2, 2))
    values = (("batch_size", 64), ("learning_rate", 5.0), ("optimizer", "sgd"))
    deep = repair(Genome((CONV,) * 5, "mean", (), values), space)
    assert (len(deep.conv), len(deep.dense)) == (3, 2)
    assert dict(deep.hyper) == {"batch_size": 64, "learning_rate": 0.1, "optimizer": "sgd"}
    shallow = repair(Genome((CONV,), "mean", (DENSE,), values), space)
    assert shallow.conv == (CONV, CONV) and shallow.dense == (DENSE, DENSE)


def test_population_keeps_the_best_and_prefers_them_in_tournaments():
    population = Population(3)
    for identifier, fitness in enumerate([5.0, 3.0, 4.0, 9.0, 1.0, 3.0]):
        population.add(identifier, fitness)
    assert population.members == ((1.0, 4), (3.0, 1), (3.0, 5))
    rng = np.random.default_rng(0)
    winners = [population.tournament(2, rng) for _ in range(600)]
    shares = [winners.count(identifier) / 600 for identifier in (4, 1, 5)]
    assert shares == pytest.approx([5 / 9, 3 / 9, 1 / 9], abs=0.06)
