"""Genes, their normal form, and their way to and from network specifications."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.errors import NetworkError, RunError
from dmi_hpc.models.cost import cost
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import (
    Activation,
    Conv,
    Dense,
    Dropout,
    Layer,
    NetworkSpec,
    Norm,
    Pool,
    Readout,
    shapes,
)
from search.spaces.features import Features
from search.spaces.genome import (
    ConvGene,
    DenseGene,
    Genome,
    canonical,
    decode,
    encode,
    founder_genome,
    from_json,
    structural_hash,
    to_json,
)
from search.spaces.space import random_genome, require_consistent

HYPER = {
    "batch_size": Choice(values=(8, 16, 32), ordered=True),
    "learning_rate": FloatRange(low=1e-5, high=1e-1, log=True),
    "optimizer": Choice(values=("adam", "sgd")),
}


def volume_space(voxels, **network):
    return SearchSpace(
        network=NetworkSpace(
            input_shape=(1, voxels, voxels, voxels),
            **{"conv_blocks": (1, 6), "kernels": (1, 3, 5, 7), **network},
        ),
        hyper=HYPER,
    )


VECTOR_SPACE = SearchSpace(
    network=NetworkSpace(input_shape=(86,), dense_blocks=(3, 20)), hyper=HYPER
)
SPACES = [volume_space(15), volume_space(21), volume_space(51), VECTOR_SPACE]
spaces = st.sampled_from(SPACES)
seeds = st.integers(0, 2**32)


def yang(voxels):
    """The network of Yang et al. 2018; pools only while there is something to pool."""
    layers: list[Layer] = []
    extent = voxels
    for filters in (16, 32, 64, 128, 256):
        layers += [Conv(filters=filters, kernel=3), Activation()]
        if extent > 1:
            layers.append(Pool())
            extent //= 2
    layers.append(Readout())
    for units in (2048, 1024):
        layers += [Dense(units=units), Activation()]
    return NetworkSpec(input_shape=(1, voxels, voxels, voxels), layers=tuple(layers))


def elemnet():
    layers: list[Layer] = []
    for count, units, rate in ((4, 1024, 0.2), (3, 512, 0.1), (3, 256, 0.3), (3, 128, 0.2)):
        layers += [Dense(units=units), Activation()] * count
        layers.append(Dropout(rate=rate))
    for units in (64, 64, 32):
        layers += [Dense(units=units), Activation()]
    return NetworkSpec(input_shape=(86,), layers=tuple(layers))


@given(spaces, seeds)
@settings(deadline=None, max_examples=150)
def test_random_genomes_build_and_survive_the_round_trip(space, seed):
    genome = random_genome(space, np.random.default_rng(seed))
    spec = decode(genome, space.network)
    shapes(spec)
    assert encode(spec, space.network, dict(genome.hyper)) == genome
    assert decode(encode(spec, space.network), space.network) == spec
    assert from_json(json.loads(json.dumps(to_json(genome)))) == genome
    assert space.network.dense_blocks[0] <= len(genome.dense) <= space.network.dense_blocks[1]


conv_genes = st.builds(
    ConvGene,
    filters=st.sampled_from([4, 16]),
    kernel=st.sampled_from([1, 3, 5, 7]),
    padding=st.sampled_from(["zeros", "circular"]),
    norm=st.sampled_from([None, "batch"]),
    activation=st.just("relu"),
    pool=st.sampled_from([None, "max", "mean"]),
    dropout=st.sampled_from([0.0, 0.1]),
)


@given(
    st.lists(conv_genes, min_size=1, max_size=6),
    st.tuples(*[st.integers(1, 20)] * 3),
    st.floats(1e-6, 1.0),
)
@settings(deadline=None, max_examples=300)
def test_canonical_form_is_idempotent_and_buildable_on_any_map(conv, extents, rate):
    space = SearchSpace(
        network=NetworkSpace(input_shape=(2, *extents), conv_blocks=(1, 6)), hyper=HYPER
    )
    hyper = (("batch_size", 8), ("learning_rate", rate), ("optimizer", "sgd"))
    genome = Genome(tuple(conv), "mean", (), hyper)
    normal = canonical(genome, space)
    assert canonical(normal, space) == normal
    assert structural_hash(normal, space) == structural_hash(genome, space)
    shapes(decode(normal, space.network))


def genome_of(*conv, readout="mean", rate=1e-3):
    dense = (DenseGene(16, None, "relu", 0.0),)
    return Genome(
        conv, readout, dense, (("batch_size", 8), ("learning_rate", rate), ("optimizer", "sgd"))
    )


WIDE = ConvGene(16, 3, "zeros", None, "relu", "max", 0.0)


def test_networks_of_one_function_family_share_a_hash():
    space = volume_space(5)  # extents 5, 2, 1
    one_voxel = (WIDE, WIDE)
    same = [
        genome_of(*one_voxel, WIDE),
        genome_of(*one_voxel, replace(WIDE, pool=None)),  # nothing left to pool
        genome_of(*one_voxel, replace(WIDE, pool="mean")),
        genome_of(*one_voxel, replace(WIDE, kernel=1)),  # the rest of the kernel sees padding
        genome_of(*one_voxel, replace(WIDE, kernel=7, padding="circular")),
        genome_of(*one_voxel, WIDE, readout="flatten"),  # flattening one voxel
        genome_of(*one_voxel, WIDE, rate=1e-3 * (1 + 1e-5)),
    ]
    different = [
        genome_of(replace(WIDE, kernel=1), WIDE, WIDE),
        genome_of(replace(WIDE, padding="circular"), WIDE, WIDE),
        genome_of(WIDE, WIDE, replace(WIDE, filters=8)),
        genome_of(WIDE, WIDE, WIDE, rate=1.1e-3),
    ]
    assert len({structural_hash(genome, space) for genome in same}) == 1
    assert len({structural_hash(genome, space) for genome in [same[0], *different]}) == 5


def test_rounding_keeps_a_hyper_parameter_in_its_range():
    space = SearchSpace(
        network=VECTOR_SPACE.network, hyper={"rate": FloatRange(low=0.12345, high=0.99999)}
    )
    for value in (0.12345, 0.99999):
        ((_, found),) = canonical(Genome((), None, (), (("rate", value),)), space).hyper
        assert found == value


@pytest.mark.parametrize("voxels", [15, 21, 51])
def test_yang_network_is_in_the_space(voxels):
    space, spec = volume_space(voxels), yang(voxels)
    genome = encode(spec, space.network)
    assert decode(genome, space.network) == spec
    assert [gene.units for gene in genome.dense] == [2048, 1024]
    assert sum(gene.pool is not None for gene in genome.conv) == (3 if voxels == 15 else 4) + (
        voxels == 51
    )
    if voxels == 51:
        assert 3.7e6 < cost(decode(genome, space.network)).parameters < 3.9e6


def test_elemnet_is_in_the_space_with_its_dropouts():
    genome = encode(elemnet(), VECTOR_SPACE.network)
    assert decode(genome, VECTOR_SPACE.network) == elemnet()
    assert len(genome.dense) == 16
    rates = {i: gene.dropout for i, gene in enumerate(genome.dense) if gene.dropout}
    assert rates == {3: 0.2, 6: 0.1, 9: 0.3, 12: 0.2}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([Conv(filters=4), Readout()], r"layer 2: expected an activation, found 'readout'"),
        ([Conv(filters=4, stride=2), Activation(), Readout()], "stride 1"),
        ([Conv(filters=4), Activation(), Pool(size=3), Readout()], "size 2"),
        ([Norm(), Conv(filters=4), Activation(), Readout()], "layer 1"),
        ([Conv(filters=4), Activation(), Dropout(rate=0.1), Pool(), Readout()], "layer 4"),
        ([Readout(), Dense(units=4)], "found the end"),
        ([Conv(filters=4), Activation()], "add a readout"),
    ],
)
def test_networks_outside_the_block_grammar_are_refused(layers, message):
    space = volume_space(15)
    spec = NetworkSpec(input_shape=space.network.input_shape, layers=tuple(layers))
    with pytest.raises(NetworkError, match=message):
        encode(spec, space.network)


def test_a_network_of_another_input_is_refused():
    with pytest.raises(NetworkError, match="input_shape"):
        encode(yang(21), volume_space(15).network)


def test_founders_take_open_hyper_parameters_from_the_recipe():
    founder = Founder(name="ElemNet", network=elemnet(), hyper={"learning_rate": 1e-4})
    defaults = {"batch_size": 64, "optimizer": "adam"}
    genome = founder_genome(founder, VECTOR_SPACE, defaults)
    assert dict(genome.hyper) == {**defaults, "learning_rate": 1e-4}
    with pytest.raises(RunError, match=r"ElemNet.*batch_size, optimizer"):
        founder_genome(founder, VECTOR_SPACE, {})


@pytest.mark.parametrize(
    ("hyper", "message"),
    [({"momentum": 0.5}, r"sets momentum.*learning_rate"), ({"batch_size": "big"}, "number")],
)
def test_founders_with_impossible_hyper_parameters_are_refused(hyper, message):
    founder = Founder(name="ElemNet", network=elemnet(), hyper=hyper)
    defaults = {"batch_size": 64, "optimizer": "adam", "learning_rate": 1.0}
    with pytest.raises(RunError, match=message):
        founder_genome(founder, VECTOR_SPACE, defaults)


def test_inconsistent_spaces_are_refused():
    network = NetworkSpace(input_shape=(86,), conv_blocks=(1, 2))
    with pytest.raises(NetworkError, match="vector of 86"):
        require_consistent(SearchSpace(network=network, hyper={}))
    network = NetworkSpace(input_shape=(86,), dense_blocks=(3, 2))
    with pytest.raises(NetworkError, match="dense_blocks"):
        require_consistent(SearchSpace(network=network, hyper={}))


@pytest.mark.parametrize("space", SPACES)
def test_features_are_finite_named_and_tell_genomes_apart(space):
    rng = np.random.default_rng(0)
    genomes = [random_genome(space, rng) for _ in range(100)]
    features = Features(space)
    matrix = features.matrix(genomes)
    assert matrix.shape == (100, len(features.names))
    assert len(set(features.names)) == len(features.names)
    assert np.isfinite(matrix).all()
    assert len(np.unique(matrix, axis=0)) == len({structural_hash(g, space) for g in genomes})


def test_features_take_founders_from_outside_the_space():
    founder = encode(
        elemnet(), VECTOR_SPACE.network, {"batch_size": 24, "learning_rate": 0, "optimizer": "adam"}
    )
    narrow = SearchSpace(network=NetworkSpace(input_shape=(86,), dense_blocks=(1, 4)), hyper=HYPER)
    features = Features(narrow)
    by_name = dict(zip(features.names, features(founder), strict=True))
    assert by_name["dense_blocks"] == 4.0
    assert by_name["batch_size"] == 1.5  # between 16 and 32, at twice the scale
    assert by_name["learning_rate"] == 0.0
