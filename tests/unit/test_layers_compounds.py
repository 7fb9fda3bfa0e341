"""Layers of networks of compositions and molecules: branches, embeddings, attention, messages."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from dmi_hpc import checkpoint
from dmi_hpc.config import StartConfig
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import NetworkError
from dmi_hpc.models import graph_layers
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import cost
from dmi_hpc.models.graphs import Graphs, graphs_of, inputs_of, nominal_graphs
from dmi_hpc.models.space import FloatRange, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import (
    Activation,
    Conv,
    Dense,
    Dropout,
    Embedding,
    GraphConv,
    GraphInput,
    GraphReadout,
    MessagePassing,
    NetworkSpec,
    Parallel,
    Readout,
    Residual,
    Take,
    UnitLength,
    shapes,
)
from dmi_hpc.models.vectors import Standardize, set_standardization
from dmi_hpc.targets import TargetScale
from dmi_hpc.transfer import layer_scales, start_from
from search.spaces.features import Features
from search.spaces.genome import decode, encode, from_json, to_json
from search.spaces.networks import Networks
from search.spaces.sizes import Sizes
from search.spaces.space import require_consistent
from search.trials.inherit import inherited

GRAPH = GraphInput(edge_features=4, edges=20)
READS = {
    "attention": (Dense(units=6), GraphConv(op="attention", channels=6), GraphReadout()),
    "messages": (Dense(units=6), MessagePassing(units=6, steps=2, hidden=5), GraphReadout()),
    "attention readout": (Dense(units=6), GraphReadout(op="attention"), Dense(units=3)),
    "set2set": (Dense(units=6), GraphReadout(op="set2set", steps=3), Activation()),
    "residual": (
        Dense(units=6),
        Residual(layers=(GraphConv(op="attention", channels=8),)),
        GraphReadout(op="set2set"),
    ),
}


def on_graphs(layers, graph=GRAPH, **others):
    return NetworkSpec(input_shape=(5, 6), graph=graph, layers=layers, **others)


def graphs(sizes=(3, 1, 6, 2), edges=(7, 0, 12, 3), kinds=None, seed=0):
    """Random graphs; kinds: of edges with different features."""
    rng = torch.Generator().manual_seed(seed)
    ends, first = [], 0
    for n, e in zip(sizes, edges, strict=True):
        ends.append(torch.randint(n, (e, 2), generator=rng) + first)
        first += n
    features = torch.randn(sum(edges), 4, generator=rng)
    if kinds is not None:
        features = features[torch.randint(kinds, (len(features),), generator=rng)]
    return Graphs(
        torch.randn(first, 5, generator=rng),
        features,
        torch.cat(ends),
        torch.tensor([0, *sizes]).cumsum(0),
        torch.tensor([0, *edges]).cumsum(0),
        weights=torch.rand(first, 1, generator=rng) + 0.1,
        forces=torch.randn(first, 3, generator=rng),
    )


def built(spec):
    torch.manual_seed(0)
    return build(spec).eval()


# of vectors

BRANCHES = NetworkSpec(
    input_shape=(30,),
    layers=(
        Parallel(
            branches=(
                (Take(start=0, stop=10), Embedding(entries=9, units=4), Conv(filters=3), Readout()),
                (Take(start=10, stop=30), UnitLength(), Dense(units=7)),
            )
        ),
        Activation(),
    ),
)


def test_branches_over_parts_of_one_vector_see_their_parts_alone():
    module = built(BRANCHES)
    assert shapes(BRANCHES)[0] == (37,)
    words, numbers = torch.randint(9, (6, 10)).float(), torch.randn(6, 20)
    first = module[0](torch.cat([words, numbers], dim=1))
    assert first.shape == (6, 37)
    assert torch.equal(first[:, :30], module[0](torch.cat([words, 0 * numbers], dim=1))[:, :30])
    torch.testing.assert_close(
        first[:, 30:], module[0](torch.cat([0 * words, 3 * numbers], dim=1))[:, 30:]
    )
    assert cost(BRANCHES).parameters == sum(p.numel() for p in module.parameters())


def test_an_embedding_has_a_vector_of_each_whole_number():
    module = built(NetworkSpec(input_shape=(3,), layers=(Embedding(entries=5, units=2), Readout())))
    found = module[0](torch.tensor([[4.0, 0.0, 4.0]]))
    assert torch.equal(found[0].T, module[0].table.weight[[4, 0, 4]])
    with pytest.raises(IndexError):
        module(torch.tensor([[5.0, 0.0, 0.0]]))


def test_zeros_of_unit_length_stay_zero_and_have_small_gradients():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    found = built(NetworkSpec(input_shape=(2,), layers=(UnitLength(),)))[0](x)
    assert found.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    found.sum().backward()
    assert x.grad.abs().max() <= 1


def test_values_on_nodes_can_have_unit_length():
    module = built(on_graphs((Dense(units=4), UnitLength(), GraphReadout())))
    found = module[1](module[0](graphs().nodes))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(12))


@pytest.mark.parametrize(
    ("shape", "layers", "told"),
    [
        ((5,), (Take(start=2, stop=6),), r"layer 1 .take.: takes up to 6 of a vector of 5"),
        ((2, 5), (Take(start=0, stop=1),), r"needs a vector, found \(2, 5\)"),
        ((2, 5), (Embedding(entries=3, units=2),), "needs a vector"),
        ((2, 5), (UnitLength(),), "needs a vector"),
        ((5,), (Embedding(entries=3, units=2),), "add a readout"),
    ],
)
def test_layers_of_vectors_that_cannot_follow_are_refused(shape, layers, told):
    with pytest.raises(NetworkError, match=told):
        build(NetworkSpec(input_shape=shape, layers=layers))


def test_an_empty_part_is_refused():
    with pytest.raises(ValidationError, match="start < stop"):
        Take(start=3, stop=3)


# standardized inputs

PLAIN = NetworkSpec(input_shape=(4,), layers=(Dense(units=3), Activation()))
STANDARDIZED = PLAIN.model_copy(update={"standardize": True})


def rows_of_features():
    rng = np.random.default_rng(3)
    rows = rng.normal([1e4, 0.0, -3.0, 0.1], [2.0, 1e-3, 5.0, 0.0], (1000, 4)).astype(np.float32)
    return torch.from_numpy(rows)


def test_standardization_is_that_of_all_rows_whatever_the_batches():
    rows = rows_of_features()
    module = built(STANDARDIZED)
    set_standardization(module, rows.split([1, 0, 700, 299]))
    mean, std = rows.double().mean(0), rows.double().std(0, correction=0)
    torch.testing.assert_close(module.standardize.mean, mean.float())
    torch.testing.assert_close(module.standardize.std[:3], std[:3].float())
    assert module.standardize.std[3] == 1  # the same everywhere, but for rounding
    found = module.standardize(rows)
    torch.testing.assert_close(found.std(0)[:3], torch.ones(3), atol=1e-3, rtol=0)
    assert found[:, 3].abs().max() < 1e-6
    torch.testing.assert_close(module(rows), module[-1](module[2](module[1](found))))


def test_standardization_changes_no_other_names_and_travels_with_the_weights():
    plain, module = build(PLAIN), build(STANDARDIZED)
    assert {*plain.state_dict(), "standardize.mean", "standardize.std"} == {*module.state_dict()}
    set_standardization(module, [rows_of_features()])
    other = build(STANDARDIZED)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(rows_of_features()), module(rows_of_features()))
    assert not {"standardize", "basis", "forces"} & PLAIN.model_dump().keys()
    assert not {"standardize"} & NetworkSpace(input_shape=(3,)).model_dump().keys()
    assert cost(STANDARDIZED) == cost(PLAIN)


@pytest.mark.parametrize(
    ("network", "told"),
    [
        (NetworkSpec(input_shape=(2, 4), layers=(Readout(),), standardize=True), "needs a vector"),
        (on_graphs((GraphReadout(),), standardize=True), "needs a vector"),
        (BRANCHES.model_copy(update={"standardize": True}), "whole numbers"),
    ],
)
def test_what_cannot_be_standardized_is_refused(network, told):
    with pytest.raises(NetworkError, match=told):
        build(network)


def test_a_search_of_standardized_networks():
    network = NetworkSpace(input_shape=(4,), dense_blocks=(1, 2), units=(3, 8), standardize=True)
    genome = encode(STANDARDIZED, network)
    assert decode(genome, network) == STANDARDIZED
    assert Sizes(network)(genome) == cost(STANDARDIZED)
    with pytest.raises(NetworkError, match="standardize of the network is False"):
        encode(PLAIN, network)
    with pytest.raises(NetworkError, match="standardize needs a vector"):
        space = NetworkSpace(input_shape=(1, 4), standardize=True)
        require_consistent(SearchSpace(network=space, hyper={}))


def test_a_child_inherits_the_standardization():
    torch.manual_seed(0)
    parent, wider = (
        build(STANDARDIZED),
        STANDARDIZED.model_copy(update={"layers": (Dense(units=6), Activation())}),
    )
    set_standardization(parent, [rows_of_features()])
    fresh, rng = build(wider).state_dict(), np.random.default_rng(0)
    weights, report = inherited(wider, fresh, STANDARDIZED, parent.state_dict(), rng, noise=0.0)
    child = build(wider)
    child.load_state_dict(weights)
    torch.testing.assert_close(child(rows_of_features()), parent(rows_of_features()))
    assert report.exact and report.parameters == cost(wider).parameters
    assert isinstance(child.standardize, Standardize)


def test_a_transfer_matches_layers_by_place_and_brings_the_standardization(tmp_path):
    torch.manual_seed(0)
    source = build(STANDARDIZED)
    set_standardization(source, [rows_of_features()])
    scale = TargetScale(transform="identity", mean=1.0, std=2.0)
    meta = checkpoint.Meta(
        step=1,
        epoch=0,
        network=STANDARDIZED,
        scale=scale,
        task={"name": "toy_task:Toy"},
        metrics={"validation_error": 0.1},
    )
    state = {"counters": {}, "optimizer": {}, "order": {}, "ranks": []}
    path = checkpoint.save(tmp_path, meta, source.state_dict(), state)
    layers = (Dense(units=3), Activation(), Dropout(rate=0.5))  # the head has another number
    new = build(STANDARDIZED.model_copy(update={"layers": layers})).eval()
    report = start_from(new, StartConfig(path=path), scale, print)
    assert len(report.copied) == 6 and not report.new
    torch.testing.assert_close(new(rows_of_features()), source(rows_of_features()))
    plain = build(PLAIN)
    assert set(start_from(plain, StartConfig(path=path), scale, print).unused) == {
        "standardize.mean",
        "standardize.std",
    }
    assert [*layer_scales(source, 0.5).values()] == [0.5, 0.5, 1.0, 1.0]


# of graphs


@pytest.mark.parametrize("name", READS)
def test_what_is_inferred_of_layers_on_graphs_is_true_of_their_module(name):
    spec, batch = on_graphs(READS[name], outputs=2), graphs()
    module, values = built(spec), batch.nodes
    for layer, shape in zip(module[:-1], shapes(spec), strict=True):
        values = layer(values, batch) if isinstance(layer, graph_layers.OnGraphs) else layer(values)
        assert values.shape == ((len(batch.nodes) if len(shape) > 1 else 4), shape[0])
    assert module(batch).shape == (4, 2)
    assert cost(spec).parameters == sum(p.numel() for p in module.parameters())
    assert module(nominal_graphs(spec, 3)).shape == (3, 2)
    module(batch).sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("name", READS)
def test_graphs_are_read_alone_as_in_a_batch_and_in_any_order(name):
    module, batch = built(on_graphs(READS[name])), graphs()
    alone = torch.cat([module(batch[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, module(batch), atol=1e-6, rtol=1e-5)
    nodes, edges = torch.tensor([2, 0, 1, 3, *range(11, 3, -1)]), torch.randperm(22)
    nodes[4:] = torch.tensor([9, 8, 7, 6, 5, 4, 11, 10])
    other = replace(
        batch,
        nodes=batch.nodes[nodes],
        weights=batch.weights[nodes],
        edges=batch.edges[edges],
        ends=nodes.argsort()[batch.ends[edges]],
    )
    torch.testing.assert_close(module(other), module(batch), atol=1e-6, rtol=1e-5)


def test_a_weight_of_two_counts_a_node_twice():
    """A complete graph of two nodes, one of them of weight 2, and that of three nodes."""

    def complete(nodes, weights):
        n = len(nodes)
        ends = torch.cartesian_prod(torch.arange(n), torch.arange(n))
        return Graphs(
            nodes,
            torch.ones(n * n, 4),
            ends,
            torch.tensor([0, n]),
            torch.tensor([0, n * n]),
            weights,
        )

    a, b = torch.randn(2, 5)
    twice = complete(torch.stack([a, b]), torch.tensor([[1.0], [2.0]]))
    three = complete(torch.stack([a, b, b]), None)
    for readout in ("mean", "attention", "set2set"):
        layers = (Dense(units=6), GraphConv(op="attention", channels=6), GraphReadout(op=readout))
        module = built(on_graphs(layers))
        torch.testing.assert_close(module(twice), module(three))
        assert not torch.allclose(module(replace(twice, weights=None)), module(three))


def test_attention_is_that_of_its_definition():
    batch = graphs()
    conv = built(on_graphs((GraphConv(op="attention", channels=3), GraphReadout())))[0]
    for node, found in enumerate(conv(batch.nodes, batch)):
        mine = (batch.ends[:, 0] == node).nonzero()[:, 0]
        mean = torch.zeros(3)
        if len(mine):
            others = batch.ends[mine, 1]
            own = batch.nodes[node].expand(len(mine), -1)
            z = conv.linear(torch.cat([own, batch.nodes[others], batch.edges[mine]], 1))
            gates, cores = functional.leaky_relu(z).chunk(2, 1)
            shares = torch.softmax(conv.gate(gates) + batch.weights[others].log(), 0)
            mean = (shares * cores).sum(0)
        torch.testing.assert_close(found, conv.value(mean))


def test_shares_of_large_logits_are_finite():
    logits, groups = torch.tensor([[1e4], [1e4], [-1e4]]), torch.tensor([0, 0, 1])
    found = graph_layers._shares(logits, groups, 3, torch.tensor([[1.0], [3.0], [0.0]]))
    assert found.flatten().tolist() == [0.25, 0.75, 0.0]


@pytest.mark.parametrize("kinds", [None, 1, 2])
def test_messages_are_those_of_the_edge_network(kinds):
    batch = graphs(kinds=kinds)
    batch = replace(batch, edge_weights=torch.rand(len(batch.edges), 1))
    layer = built(on_graphs((Dense(units=4), MessagePassing(units=4, hidden=3), GraphReadout())))[1]
    values = torch.randn(12, 4)
    expected = values
    for _ in range(3):
        sums = torch.zeros(12, 4)
        for (i, j), edge, weight in zip(batch.ends, batch.edges, batch.edge_weights, strict=True):
            sums[i] += weight * (layer.edge(edge).view(4, 4) @ expected[j])
        expected = layer.cell(sums, expected)
    torch.testing.assert_close(layer(values, batch), expected)
    gradients = []
    for shared_by in (1, 10**9):  # kind by kind, and edge by edge
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graph_layers, "SHARED_BY", shared_by)
            layer.zero_grad()
            layer(values, batch).square().sum().backward()
            gradients.append([p.grad.clone() for p in layer.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_set2set_attends_to_the_nodes_of_its_graph():
    batch = replace(graphs(), weights=None)
    layer = built(on_graphs((GraphReadout(op="set2set", steps=1),)))[0]
    query, _ = layer.cell(torch.zeros(4, 10))
    found = layer(batch.nodes, batch)
    bounds = batch.node_offsets.tolist()
    for g in range(4):
        nodes = batch.nodes[bounds[g] : bounds[g + 1]]
        read = torch.softmax(nodes @ query[g], 0) @ nodes
        torch.testing.assert_close(found[g], torch.cat([query[g], read]))


def test_known_kinds_of_edges_cost_less():
    layers = READS["messages"]
    few = on_graphs(layers, GRAPH.model_copy(update={"kinds": 3}))
    assert cost(few).activations < cost(on_graphs(layers)).activations
    assert cost(few).parameters == cost(on_graphs(layers)).parameters
    assert len(nominal_graphs(few, 5).edges.unique(dim=0)) <= 3
    assert "kinds" not in GRAPH.model_dump()


@pytest.mark.parametrize(
    ("layers", "graph", "told"),
    [
        ((MessagePassing(units=3),), GRAPH, "needs 3 channels, as many as units, found 5"),
        (
            (Dense(units=3), MessagePassing(units=3)),
            GraphInput(edge_features=0, edges=4),
            "needs features on the edges",
        ),
        ((GraphReadout(), MessagePassing(units=5)), GRAPH, "needs values on the nodes"),
    ],
)
def test_layers_on_graphs_that_cannot_follow_are_refused(layers, graph, told):
    with pytest.raises(NetworkError, match=told):
        build(on_graphs((*layers, GraphReadout()), graph))


def test_steps_of_a_readout_without_steps_are_refused():
    with pytest.raises(ValidationError, match="steps 3 of op 'mean', which has none"):
        GraphReadout(op="mean", steps=3)
    assert GraphReadout().model_dump() == {"kind": "graph_readout", "op": "mean"}


# what travels with graphs


def test_tensors_that_not_all_graphs_have_come_along():
    batch = replace(graphs(), edge_weights=torch.rand(22, 1))
    part = batch[1:3]
    assert torch.equal(part.weights, batch.weights[3:10])
    assert torch.equal(part.forces, batch.forces[3:10])
    assert torch.equal(part.edge_weights, batch.edge_weights[7:19])
    back = inputs_of(batch.tensors() | {"targets": torch.ones(4)}).to(torch.device("cpu"))
    for name in ("nodes", "weights", "edge_weights", "forces"):
        assert torch.equal(getattr(back, name), getattr(batch, name))
    bare = replace(batch, weights=None, edge_weights=None, forces=None)
    assert inputs_of(bare.tensors())[1:2].weights is None
    assert "inputs.weights" not in bare.tensors()


def test_graphs_of_rows_have_weights_and_forces():
    offsets, numbers = np.array([0, 1, 3]), np.arange(3.0)
    found = graphs_of(
        Ragged(np.zeros((3, 2)), offsets),
        Ragged(np.zeros((0, 1)), np.array([0, 0, 0])),
        Ragged(np.zeros((0, 2), dtype=np.int64), np.array([0, 0, 0])),
        weights=Ragged(numbers[:, None], offsets),
        forces=Ragged(np.tile(numbers, (3, 1)), offsets),
    )
    assert found.weights.dtype == torch.float32
    assert found[1:2].weights.tolist() == [[1.0], [2.0]]
    assert found[0:1].forces.tolist() == [[0.0, 1.0, 2.0]]


# searched

SPACE = SearchSpace(
    network=NetworkSpace(
        input_shape=(5, 6),
        graph=GRAPH,
        graph_blocks=(0, 2),
        embeddings=(3, 8),
        channels=(3, 8),
        graph_convs=("gated", "attention"),
        graph_readouts=("mean", "attention", "set2set"),
        graph_activations=("relu", "shifted_softplus"),
        dense_blocks=(0, 1),
        units=(4, 8),
        activations=("relu",),
    ),
    hyper={"learning_rate": FloatRange(low=1e-4, high=1e-1, log=True)},
)


def test_attention_and_set2set_are_searched():
    space, rng, features = Networks(SPACE), np.random.default_rng(0), Features(SPACE)
    genomes = [space.random(rng) for _ in range(60)]
    seen = set()
    for genome in genomes:
        network = decode(genome, SPACE.network)
        assert encode(network, SPACE.network, dict(genome.hyper)) == genome
        assert from_json(to_json(genome)) == genome
        assert built(network)(graphs()).isfinite().all()
        assert Sizes(SPACE.network)(genome) == cost(network)
        seen |= {genome.graph.readout, *(block.op for block in genome.graph.blocks)}
    assert seen == {"gated", "mean", "attention", "set2set"}
    rows = features.matrix(genomes)
    assert rows.shape[1] == len(features.names)
    assert len({row.tobytes() for row in rows.round(9)}) == len({to_text(g) for g in genomes})


def to_text(genome):
    return str(to_json(genome))


def test_a_set2set_of_other_steps_is_not_searchable():
    network = on_graphs((Dense(units=3), GraphReadout(op="set2set", steps=2)))
    with pytest.raises(NetworkError, match="has 6 steps, found 2"):
        encode(network, SPACE.network)
