"""Skip connections, branches, recurrent blocks, encoder-decoders: any chain of operators is valid."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dmi_hpc.errors import NetworkError
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import cost
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import (
    Activation,
    Conv,
    Dense,
    NetworkSpec,
    Norm,
    Parallel,
    Pool,
    Readout,
    Recurrent,
    Residual,
    Upsample,
)
from search.evolution.evolve import Evolution, EvolutionConfig, Success
from search.spaces.features import Features
from search.spaces.genome import (
    ConvGene,
    DenseGene,
    Genome,
    RecurrentGene,
    canonical,
    decode,
    encode,
    from_json,
    structural_hash,
    to_json,
)
from search.spaces.networks import Networks
from search.spaces.space import require_consistent

HYPER = {
    "batch_size": Choice(values=(8, 16, 32), ordered=True),
    "learning_rate": FloatRange(low=1e-5, high=1e-1, log=True),
    "optimizer": Choice(values=("adam", "sgd")),
    "momentum": FloatRange(low=0.0, high=0.99, when={"optimizer": ("sgd",)}),
}
SKIPS = (None, "residual", "dense")
CONV = {
    "filters": (3, 4, 8),
    "kernels": (1, 3, 5, 7),
    "skips": SKIPS,
    "branches": ((), (5,), (1, 3), (7, 5)),
    "units": (4, 8),
    "dense_skips": SKIPS,
}
MAP = {**CONV, "map_output": True, "dense_blocks": (0, 0)}
NETWORKS = {
    "vector": NetworkSpace(input_shape=(6,), dense_blocks=(0, 4), units=(4, 8), dense_skips=SKIPS),
    "sequence": NetworkSpace(
        input_shape=(3, 11),
        conv_blocks=(0, 3),
        recurrent_blocks=(0, 3),
        recurrent_units=(2, 4, 8),
        readouts=("flatten", "mean", "last"),
        **CONV,
    ),
    "image": NetworkSpace(input_shape=(2, 9, 6), outputs=3, conv_blocks=(1, 5), **CONV),
    "volume": NetworkSpace(input_shape=(1, 5, 6, 7), conv_blocks=(0, 4), **CONV),
    "map of a sequence": NetworkSpace(input_shape=(2, 13), conv_blocks=(0, 4), **MAP),
    "map of an image": NetworkSpace(input_shape=(2, 9, 7), outputs=3, conv_blocks=(1, 5), **MAP),
    "map of a volume": NetworkSpace(input_shape=(1, 5, 6, 4), conv_blocks=(0, 4), **MAP),
}


def chain(nets, seed, length):
    """Genomes of random chains of all operators, in a small population."""
    rng = np.random.default_rng(seed)
    members = [nets.random(rng) for _ in range(6)]
    for _ in range(length):
        first, second = (members[i] for i in rng.integers(6, size=2))
        match rng.integers(4):
            case 0:
                child = nets.random(rng)
            case 1:
                child = nets.crossed(first, second, rng)
            case 2:
                child = nets.stepped(first, rng)
            case _:
                child = nets.mutated(first, rng)
        members[rng.integers(6)] = child
        yield child


def runs(spec):
    """The module after one forward and backward pass."""
    module = build(spec)
    output = module(torch.randn(2, *spec.input_shape))
    assert output.shape[:2] == (2, spec.outputs)
    assert output.shape[2:] == (spec.input_shape[1:] if spec.map_output else ())
    output.square().sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    return module


@pytest.mark.parametrize("name", NETWORKS)
def test_genomes_of_any_chain_of_operators_run_and_come_back(name):
    torch.manual_seed(0)
    network = NETWORKS[name]
    nets = Networks(SearchSpace(network=network, hyper=HYPER))
    seen = set()
    for genome in chain(nets, seed=1, length=80):
        assert canonical(genome, nets.space) == genome
        assert from_json(json.loads(json.dumps(to_json(genome)))) == genome
        spec = decode(genome, network)
        assert encode(spec, network, dict(genome.hyper)) == genome
        assert NetworkSpec.model_validate_json(spec.model_dump_json()) == spec
        assert network.conv_blocks[0] <= len(genome.conv) <= network.conv_blocks[1]
        assert len(genome.recurrent) <= network.recurrent_blocks[1]
        assert ("momentum" in dict(genome.hyper)) == (dict(genome.hyper)["optimizer"] == "sgd")
        module = runs(spec)
        assert cost(spec).parameters == sum(p.numel() for p in module.parameters())
        seen.add(nets.identity(genome))
    assert len(seen) > 60


@pytest.mark.parametrize("name", NETWORKS)
def test_isomorphic_genomes_have_one_identity(name):
    network = NETWORKS[name]
    nets = Networks(SearchSpace(network=network, hyper=HYPER))
    rng = np.random.default_rng(5)
    changed = 0
    for genome in chain(nets, seed=2, length=60):
        twin = disguised(genome, network, rng)
        changed += twin != genome
        assert canonical(twin, nets.space) == genome
        assert nets.identity(twin) == nets.identity(genome)
    assert changed > 20


def disguised(genome, network, rng):
    """The same function in other words: branches in another order and repeated, pools of single
    voxels, hyper-parameters and genes without effect."""
    conv, extents = [], network.input_shape[1:]
    for gene in genome.conv:
        kernels = rng.permutation([*gene.kernels, rng.choice(gene.kernels)]).tolist()
        pool = gene.pool
        if min(extents) < 2:
            pool = ("max", "mean", None)[rng.integers(3)]
        elif pool:
            extents = tuple(n // 2 for n in extents)
        conv.append(replace(gene, kernel=kernels[0], branches=tuple(kernels[1:]), pool=pool))
    values = dict(genome.hyper)
    if rng.random() < 0.5:
        values.setdefault("momentum", float(rng.uniform(0, 0.99)))
    decoder, readout = genome.decoder, genome.readout
    if decoder and not any(gene.pool for gene in genome.conv):
        decoder = ("skip", "plain")[rng.integers(2)]
    if readout and max(extents) == 1:
        readout = ("flatten", "mean")[rng.integers(2)]
    hyper = tuple(sorted(values.items()))
    return replace(genome, conv=tuple(conv), hyper=hyper, decoder=decoder, readout=readout)


def gene(skip=None, branches=(), kernel=3):
    return ConvGene(6, kernel, "zeros", None, "tanh", None, 0.0, skip, branches)


def space_of(*shape, **network):
    return SearchSpace(network=NetworkSpace(input_shape=shape, **network), hyper={})


def test_branches_cut_to_a_small_map_compute_the_same():
    """Kernels of 5 and 7 on a map of 3 feel the same: the canonical form has one convolution."""
    space = space_of(2, 3, 3, conv_blocks=(1, 1))
    wide = Genome((gene(kernel=7, branches=(5,), skip="residual"),), "mean", (), ())
    normal = canonical(wide, space)
    assert (normal.conv[0].kernel, normal.conv[0].branches) == (5, ())
    torch.manual_seed(0)
    theirs, ours = (build(decode(genome, space.network)) for genome in (wide, normal))
    five, seven = (branch[0] for branch in theirs[0].layers[0].branches)
    with torch.no_grad():
        one = ours[0].layers[0]
        one.weight.copy_(torch.cat([five.weight, seven.weight[..., 1:-1, 1:-1]]))
        one.bias.copy_(torch.cat([five.bias, seven.bias]))
        ours[0].projection.weight.copy_(theirs[0].projection.weight)
        ours[2].load_state_dict(theirs[2].state_dict())
    x = torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("readout", ["flatten", "mean", "last"])
def test_readouts_of_a_single_step_compute_the_same(readout):
    space = space_of(3, 1, recurrent_blocks=(1, 1), readouts=("flatten", "mean", "last"))
    cells = (RecurrentGene("lstm", 4, True, 0.0),)
    genomes = [Genome((), which, (), (), cells) for which in ("flatten", readout)]
    assert len({structural_hash(genome, space) for genome in genomes}) == 1
    torch.manual_seed(0)
    first, second = (build(decode(genome, space.network)) for genome in genomes)
    second[0].load_state_dict(first[0].state_dict())
    second[-1].load_state_dict(first[-1].state_dict())
    x = torch.randn(4, 3, 1)
    torch.testing.assert_close(second(x), first(x))


def test_every_new_gene_makes_another_network():
    space = space_of(2, 9, conv_blocks=(1, 2), recurrent_blocks=(0, 2), readouts=("mean", "last"))
    dense, cell = DenseGene(4, None, "relu", 0.0), RecurrentGene("gru", 4, False, 0.0)
    genomes = [
        Genome((changed,), "mean", (dense,), (), (cell,))
        for changed in (
            gene(),
            gene(skip="residual"),
            gene(skip="dense"),
            gene(branches=(5,)),
            gene(branches=(5, 7)),
        )
    ]
    genomes += [
        replace(genomes[0], **fields)
        for fields in (
            {"readout": "last"},
            {"recurrent": ()},
            {"recurrent": (replace(cell, cell="lstm"),)},
            {"recurrent": (replace(cell, bidirectional=True),)},
            {"recurrent": (cell, cell)},
            {"dense": (replace(dense, skip="dense"),)},
            {"dense": (replace(dense, skip="residual"),)},
        )
    ]
    assert len({structural_hash(genome, space) for genome in genomes}) == len(genomes)
    assert len({decode(genome, space.network) for genome in genomes}) == len(genomes)


def test_a_final_state_without_recurrent_blocks_becomes_another_readout():
    space = space_of(2, 9, recurrent_blocks=(0, 2), readouts=("last", "mean"))
    assert canonical(Genome((), "last", (), ()), space).readout == "mean"


BLOCK = (Conv(filters=4), Norm(), Activation())
U_NET = (
    *BLOCK,
    Parallel(branches=((), (Pool(), *BLOCK, Residual(layers=BLOCK), Upsample(size=(8, 8))))),
    *BLOCK,
)


def test_known_networks_are_read_as_genes():
    space = space_of(1, 8, 8, conv_blocks=(0, 4), map_output=True, dense_blocks=(0, 0))
    spec = NetworkSpec(input_shape=(1, 8, 8), layers=U_NET, map_output=True)
    genome = encode(spec, space.network)
    assert [(g.pool, g.skip) for g in genome.conv] == [
        ("max", None),
        (None, None),
        (None, "residual"),
    ]
    assert genome.decoder == "skip" and decode(genome, space.network) == spec
    inception = Parallel(branches=((Conv(filters=3, kernel=1),), (Conv(filters=2, kernel=5),)))
    layers = (
        Residual(layers=(inception, Activation())),
        Recurrent(units=4, last=True),
        Parallel(branches=((), (Dense(units=4), Activation()))),
    )
    sequences = space_of(3, 9, conv_blocks=(0, 2), recurrent_blocks=(0, 2))
    genome = encode(NetworkSpec(input_shape=(3, 9), layers=layers), sequences.network)
    assert (genome.conv[0].filters, genome.conv[0].kernels) == (5, (1, 5))
    assert (genome.conv[0].skip, genome.readout, genome.dense[0].skip) == (
        "residual",
        "last",
        "dense",
    )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((*U_NET[:-3], Conv(filters=5), Norm(), Activation()), "block before the pool once more"),
        (
            (*BLOCK, Pool(), Upsample(size=(8, 8)), *BLOCK, *BLOCK),
            "layer 9: expected the next block",
        ),
        (
            (*BLOCK, Pool(), Upsample(size=(4, 4)), Upsample(size=(8, 8)), *BLOCK),
            "block before the pool once more, found 'upsample'",
        ),
        ((*BLOCK, Pool(size=4), Upsample(size=(8, 8)), *BLOCK), "symmetric encoder-decoder"),
        ((Residual(layers=(*BLOCK, *BLOCK)),), "expected the next block, found 'conv'"),
        (
            (
                Parallel(branches=((Conv(filters=2, kernel=5),), (Conv(filters=2, kernel=1),))),
                Activation(),
            ),
            "ascending kernels",
        ),
    ],
)
def test_maps_outside_the_grammar_are_refused(layers, message):
    space = space_of(1, 8, 8, map_output=True, dense_blocks=(0, 0))
    spec = NetworkSpec(input_shape=(1, 8, 8), layers=layers, map_output=True)
    with pytest.raises(NetworkError, match=message):
        encode(spec, space.network)


@pytest.mark.parametrize(
    ("shape", "network", "message"),
    [
        ((3, 4, 4), {"recurrent_blocks": (0, 1)}, "need a sequence"),
        ((3, 4), {"readouts": ("last",), "recurrent_blocks": (0, 1)}, '"last" alone'),
        ((3, 4), {"map_output": True}, r"dense_blocks = recurrent_blocks = \(0, 0\)"),
        ((3,), {"map_output": True, "dense_blocks": (0, 0)}, "map_output needs a map"),
    ],
)
def test_spaces_that_hold_no_network_are_refused(shape, network, message):
    with pytest.raises(NetworkError, match=message):
        require_consistent(space_of(*shape, **network))


@pytest.mark.parametrize("name", NETWORKS)
def test_features_of_wide_genomes_are_named_and_tell_them_apart(name):
    space = SearchSpace(network=NETWORKS[name], hyper=HYPER)
    genomes = list(dict.fromkeys(chain(Networks(space), seed=3, length=100)))
    features = Features(space)
    matrix = features.matrix(genomes)
    assert matrix.shape == (len(genomes), len(features.names))
    assert len(set(features.names)) == len(features.names)
    assert np.isfinite(matrix).all() and np.abs(matrix).max() <= 2
    assert len(np.unique(matrix, axis=0)) >= 0.95 * len(genomes)


def test_evolution_finds_the_connections_that_pay():
    space = space_of(2, 16, conv_blocks=(1, 4), recurrent_blocks=(0, 2), **CONV)

    def loss(genome):
        residual = sum(gene.skip == "residual" for gene in genome.conv)
        return len(genome.recurrent) - residual - 0.5 * sum(bool(g.branches) for g in genome.conv)

    evolution = Evolution(Networks(space), EvolutionConfig(seed=1, initial=12, surrogate=False))
    for _ in range(150):
        proposal = evolution.ask()
        evolution.tell(proposal.id, Success(loss(proposal.genome)))
    assert len({p.hash for p in evolution.proposals.values()}) == 150
    rng, nets = np.random.default_rng(0), Networks(space)
    assert evolution.best()[1] < min(loss(nets.random(rng)) for _ in range(150))


# what the version before these genes made: journals of its searches continue as they began
OLD = {
    "volume": (
        NetworkSpace(input_shape=(1, 15, 15, 15), conv_blocks=(1, 6), kernels=(1, 3, 5, 7)),
        "c0c41a36953b8ba5f9b0a64ee3c50887",
        "6361799c97fbaa067871377254694f31",
    ),
    "image": (
        NetworkSpace(input_shape=(3, 9, 30), conv_blocks=(0, 3)),
        "a51b523a6de9452bd3afa5428c82fce8",
        "bf9015b385c797d228efac44aa5debbf",
    ),
    "vector": (
        NetworkSpace(input_shape=(86,), dense_blocks=(3, 20)),
        "197395323f74a1cce4bb09bee6e11efe",
        "63a5f458b0936582259cc40eeba67061",
    ),
}
OLD_HYPER = {name: HYPER[name] for name in ("batch_size", "learning_rate", "optimizer")}


@pytest.mark.parametrize("name", OLD)
def test_spaces_and_genomes_of_the_earlier_version_are_what_they_were(name):
    network, fingerprint, digest = OLD[name]
    nets = Networks(SearchSpace(network=network, hyper=OLD_HYPER))
    assert nets.fingerprint() == fingerprint
    found = hashlib.sha256()
    for seed in range(40):
        rng = np.random.default_rng([7, seed])
        first, second = nets.random(rng), nets.random(rng)
        children = nets.mutated(first, rng), nets.crossed(first, second, rng)
        for genome in (first, *children, nets.stepped(second, rng)):
            found.update(nets.identity(genome).encode())
            found.update(json.dumps(nets.to_json(genome), sort_keys=True).encode())
    assert found.hexdigest()[:32] == digest


def test_a_genome_of_a_journal_of_the_earlier_version_is_read():
    block = {"kernel": 5, "padding": "circular", "norm": None, "activation": "elu", "pool": "max"}
    data = {
        "conv": [
            {"filters": 24, **block, "dropout": 0.0},
            {
                "filters": 128,
                "kernel": 1,
                "padding": "zeros",
                "norm": "batch",
                "activation": "elu",
                "pool": "max",
                "dropout": 0.3,
            },
            {
                "filters": 256,
                "kernel": 1,
                "padding": "zeros",
                "norm": "group",
                "activation": "leaky_relu",
                "pool": None,
                "dropout": 0.5,
            },
        ],
        "readout": "flatten",
        "dense": [],
        "hyper": {"batch_size": 8, "learning_rate": 0.0369, "optimizer": "sgd"},
    }
    nets = Networks(SearchSpace(network=OLD["image"][0], hyper=OLD_HYPER))
    genome = nets.from_json(data)
    assert nets.to_json(genome) == data
    assert nets.identity(genome) == "854e01ab3d2f090b786d42c1413421b6"


def test_founders_may_have_the_new_layers():
    network = NETWORKS["image"]
    layers = (Residual(layers=(Conv(filters=4), Activation())), Readout(op="mean"))
    spec = NetworkSpec(input_shape=network.input_shape, outputs=3, layers=layers)
    space = SearchSpace(network=network, hyper={}, founders=(Founder(name="R", network=spec),))
    (genome,) = Networks(space).founders()
    assert genome.conv[0].skip == "residual"
    assert decode(genome, network) == spec
