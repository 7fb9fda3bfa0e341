"""Graph networks: any chain of operators builds and runs; permutations make no difference."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dmi_hpc.errors import NetworkError
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import cost, training_flops
from dmi_hpc.models.graphs import Graphs, inputs_of
from dmi_hpc.models.space import Choice, FloatRange, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import (
    Activation,
    Conv,
    Dense,
    GraphConv,
    GraphInput,
    GraphReadout,
    NetworkSpec,
    Norm,
    Parallel,
    Readout,
    Residual,
)
from search.spaces.features import Features
from search.spaces.genome import decode, encode, from_json, structural_hash, to_json
from search.spaces.networks import Networks
from search.spaces.sizes import Sizes
from search.spaces.space import repair, require_consistent

GRAPH = GraphInput(edge_features=4, edges=20)
SPACE = SearchSpace(
    network=NetworkSpace(
        input_shape=(5, 6),
        graph=GRAPH,
        graph_blocks=(0, 4),
        embeddings=(3, 8),
        channels=(3, 8, 16),
        dense_blocks=(0, 2),
        units=(4, 8),
        dense_skips=(None, "residual", "dense"),
        activations=("softplus", "relu"),
    ),
    hyper={"learning_rate": FloatRange(low=1e-4, high=1e-1, log=True), "b": Choice(values=(1, 2))},
)


def cgcnn(channels=8, units=16):
    block = (
        Residual(layers=(GraphConv(channels=channels, norm="batch"), Norm())),
        Activation(function="softplus"),
    )
    layers = (Dense(units=channels), *3 * block, GraphReadout(), Dense(units=units))
    return NetworkSpec(
        input_shape=(5, 6), graph=GRAPH, layers=(*layers, Activation(function="softplus"))
    )


def graphs(sizes, edges, seed=0):
    """Random graphs with these numbers of nodes and edges."""
    rng = torch.Generator().manual_seed(seed)
    ends, first = [], 0
    for n, e in zip(sizes, edges, strict=True):
        ends.append(torch.randint(n, (e, 2), generator=rng) + first)
        first += n
    return Graphs(
        torch.randn(first, 5, generator=rng),
        torch.randn(sum(edges), 4, generator=rng),
        torch.cat(ends),
        torch.tensor([0, *sizes]).cumsum(0),
        torch.tensor([0, *edges]).cumsum(0),
    )


BATCHES = {
    "several": graphs([3, 1, 6, 2], [7, 0, 12, 3]),
    "one graph": graphs([4], [9]),
    "one node": graphs([1], [0]),
    "one edge": graphs([2, 1], [1, 0]),
    "no edges": graphs([2, 3], [0, 0]),
}


def chain(seed, length):
    """Genomes of random chains of all operators, in a small population."""
    nets, rng = Networks(SPACE), np.random.default_rng(seed)
    population = [nets.random(rng) for _ in range(4)]
    for _ in range(length):
        first, second = (population[int(i)] for i in rng.integers(4, size=2))
        child = [
            lambda f=first: nets.mutated(f, rng),
            lambda f=first, s=second: nets.crossed(f, s, rng),
            lambda f=first: nets.stepped(f, rng),
            lambda f=first: nets.restructured(f, rng),
        ][int(rng.integers(4))]()
        population[int(rng.integers(4))] = child
        yield child


def trained(network):
    """With running statistics and weights that are not those of a new one."""
    torch.manual_seed(1)
    module = build(network)
    for _ in range(3):
        module(BATCHES["several"])
    return module.eval()


@pytest.mark.parametrize("seed", range(3))
def test_whatever_operators_make_runs_forward_and_backward(seed):
    for number, genome in enumerate(chain(seed, 60)):
        network = decode(genome, SPACE.network)
        module = build(network)
        assert cost(network).parameters == sum(p.numel() for p in module.parameters())
        for batch in BATCHES.values() if number % 4 == 0 else [BATCHES["several"]]:
            module.train()
            if len(batch) == 1:  # as the trainer does with a single row
                module.eval()
            output = module(batch)
            assert output.shape == (len(batch), 1) and output.isfinite().all()
            module.zero_grad()
            output.sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
            states = [b for b in module.buffers() if b.is_floating_point()]
            assert all(each.isfinite().all() for each in states)


def test_genomes_go_to_json_and_to_networks_and_back():
    sizes, seen = Sizes(SPACE.network), set()
    for genome in (genome for seed in range(12) for genome in chain(seed, 40)):
        part = genome.graph
        assert 0 <= len(part.blocks) <= 4
        assert from_json(to_json(genome)) == genome == repair(genome, SPACE)
        network = decode(genome, SPACE.network)
        assert encode(network, SPACE.network, dict(genome.hyper)) == genome
        assert NetworkSpec.model_validate_json(network.model_dump_json()) == network
        assert sizes(genome) == cost(network)
        seen |= {(b.op, b.norm, b.skip) for b in part.blocks} | {part.readout, part.embedding}
    assert len(seen) == 27 + 3 + 2  # operators reach all choices
    assert len({structural_hash(g, SPACE) for g in chain(7, 100)}) > 60


def test_features_tell_genomes_apart():
    features, genomes = Features(SPACE), list(dict.fromkeys(chain(5, 60)))
    rows = features.matrix(genomes)
    assert rows.shape == (len(genomes), len(features.names))
    assert len({row.tobytes() for row in rows.round(9)}) == len(genomes)


def test_one_graph_is_predicted_as_in_a_batch():
    batch = BATCHES["several"]
    for genome in chain(11, 25):
        module = trained(decode(genome, SPACE.network))
        together = module(batch)
        alone = torch.cat([module(batch[i : i + 1]) for i in range(len(batch))])
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(module(batch[1:3]), together[1:3], atol=1e-5, rtol=1e-5)


def test_permutations_of_nodes_and_edges_make_no_difference():
    batch = BATCHES["one graph"]
    nodes, edges = torch.tensor([2, 0, 3, 1]), torch.randperm(9)
    new = nodes.argsort()
    other = replace(
        batch,
        nodes=batch.nodes[nodes],
        edges=batch.edges[edges],
        ends=new[batch.ends[edges]],
    )
    for genome in chain(13, 25):
        module = trained(decode(genome, SPACE.network))
        torch.testing.assert_close(module(other), module(batch), atol=1e-5, rtol=1e-5)


def test_the_gated_convolution_is_that_of_the_paper():
    batch = BATCHES["several"]
    layers = (GraphConv(channels=3), GraphReadout(op="sum"))
    module = build(NetworkSpec(input_shape=(5, 6), graph=GRAPH, layers=layers))
    conv = module[0]
    here, there = batch.ends.unbind(1)
    z = torch.cat([batch.nodes[here], batch.nodes[there], batch.edges], 1)
    gate, core = conv.linear(z).chunk(2, 1)
    expected = torch.zeros(len(batch.nodes), 3)
    for node, message in zip(
        here, gate.sigmoid() * torch.nn.functional.softplus(core), strict=True
    ):
        expected[node] += message
    torch.testing.assert_close(conv(batch.nodes, batch), expected)


@pytest.mark.parametrize("op", ["sum", "mean"])
def test_the_plain_convolution_adds_or_averages_neighbours(op):
    batch = BATCHES["several"]
    layers = (GraphConv(channels=3, op=op), GraphReadout())
    conv = build(NetworkSpec(input_shape=(5, 6), graph=GRAPH, layers=layers))[0]
    own, other, edge = conv.linear.weight.split([5, 5, 4], 1)
    found = conv(batch.nodes, batch)
    for node, values in enumerate(batch.nodes):
        mine = (batch.ends[:, 0] == node).nonzero()[:, 0]
        messages = batch.nodes[batch.ends[mine, 1]] @ other.T + batch.edges[mine] @ edge.T
        total = messages.sum(0) / (max(1, len(mine)) if op == "mean" else 1)
        torch.testing.assert_close(found[node], own @ values + conv.linear.bias + total)


def test_readouts_are_of_each_graph_alone():
    batch = BATCHES["several"]
    for op, reduce in (("sum", torch.sum), ("mean", torch.mean), ("max", torch.amax)):
        layers = (GraphReadout(op=op),)
        readout = build(NetworkSpec(input_shape=(5, 6), graph=GRAPH, layers=layers))[0]
        bounds = batch.node_offsets.tolist()
        expected = [reduce(batch.nodes[a:b], 0) for a, b in pairwise(bounds)]
        torch.testing.assert_close(readout(batch.nodes, batch), torch.stack(expected))


def test_batches_travel_as_named_tensors():
    batch = BATCHES["several"]
    back = inputs_of(batch.tensors())
    assert isinstance(back, Graphs) and len(back) == 4
    assert all(torch.equal(getattr(back, n), getattr(batch, n)) for n in ("nodes", "edges", "ends"))


def test_costs_of_cgcnn():
    network = cgcnn()
    found = cost(network)
    gates = 16 * (2 * 6 * 8 + 20 * 4) + 2 * 16 * 20 + 8 * 20
    uses = 5 * 8 * 6 + 3 * (gates + 2 * 8 * 6) + 8 * 16 + 16
    assert found.flops == 2 * uses
    assert found.parameters == sum(p.numel() for p in build(network).parameters())
    assert training_flops(network) == 3 * found.flops - 2 * 5 * 8 * 6
    assert encode(network, SPACE.network).graph.blocks[0].skip == "residual"


def test_networks_of_graphs_alone_have_no_graph_in_their_json():
    assert "graph" not in NetworkSpec(input_shape=(3,), layers=()).model_dump()
    assert not {n for n in NetworkSpace(input_shape=(3,)).model_dump() if "graph" in n}


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ((GraphConv(channels=3),), "add a graph_readout"),
        ((Conv(filters=3), GraphReadout()), r"layer 1 \(conv\): cannot follow values on the nodes"),
        ((Readout(op="mean"),), r"layer 1 \(readout\)"),
        (
            (GraphReadout(), GraphConv(channels=3)),
            r"layer 2 \(graph_conv\): needs values on the nodes",
        ),
        ((Parallel(branches=((), (GraphReadout(),))),), "different extents"),
    ],
)
def test_layers_that_cannot_follow_are_refused(layers, told):
    with pytest.raises(NetworkError, match=told):
        build(NetworkSpec(input_shape=(5, 6), graph=GRAPH, layers=layers))


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ((GraphReadout(),), "expected a dense layer, the embedding"),
        ((Dense(units=3), Activation(), GraphReadout()), "expected a graph block or graph_readout"),
        ((Dense(units=3), GraphConv(channels=3), GraphReadout()), "expected an activation"),
        (
            (Dense(units=3), GraphConv(channels=3), Norm(), Activation(), GraphReadout()),
            "layer 3: a searchable graph block is",
        ),
    ],
)
def test_networks_outside_the_grammar_are_refused(layers, told):
    network = NetworkSpec(input_shape=(5, 6), graph=GRAPH, layers=layers)
    with pytest.raises(NetworkError, match=told):
        encode(network, SPACE.network)


@pytest.mark.parametrize(
    "changes",
    [
        {"conv_blocks": (0, 1)},
        {"recurrent_blocks": (0, 1)},
        {"input_shape": (5,)},
        {"graph_blocks": (2, 1)},
    ],
)
def test_spaces_without_sense_are_refused(changes):
    network = SPACE.network.model_copy(update=changes)
    with pytest.raises(NetworkError, match="graph"):
        require_consistent(SPACE.model_copy(update={"network": network}))


def test_a_norm_inside_a_convolution_without_gates_is_refused():
    with pytest.raises(ValidationError, match="has none"):
        GraphConv(op="sum", channels=3, norm="batch")


def test_a_graph_conv_outside_a_graph_network_is_refused():
    network = NetworkSpec(input_shape=(5, 6), layers=(GraphConv(channels=3), Readout()))
    with pytest.raises(NetworkError, match="needs values on the nodes of a graph"):
        build(network)
