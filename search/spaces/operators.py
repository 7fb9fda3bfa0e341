"""Crossover and mutations: plain callables from parents to one valid child in canonical form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp, log
from typing import Any, TypeVar

import numpy as np

from dmi_hpc.models.space import (
    Choice,
    HyperValue,
    IntRange,
    NetworkSpace,
    Parameter,
    SearchSpace,
)
from search.spaces.draw import pick
from search.spaces.genes import Gene
from search.spaces.genome import (
    ConvGene,
    DenseGene,
    Genome,
    GraphGene,
    GraphPart,
    RecurrentGene,
    as_number,
)
from search.spaces.graph_blocks import random_graph_block
from search.spaces.space import (
    completed,
    position_of,
    random_conv,
    random_dense,
    random_recurrent,
    repair,
)

Operator = Callable[[Sequence[Genome], SearchSpace, np.random.Generator], Genome]
T = TypeVar("T")
G = TypeVar("G", bound=Gene | GraphPart)

# shares of the kinds of mutation; parametric has the rest
STRUCTURAL_SHARE = 0.3
READOUT_SHARE = 0.05
# chance that a parametric mutation changes one more gene, and that a step goes one choice further
AGAIN = 0.4
FURTHER = 0.25


def crossover(parents: Sequence[Genome], space: SearchSpace, rng: np.random.Generator) -> Genome:
    """Blocks of two parents mixed position by position, hyper-parameters one by one.

    Convolutions and recurrent blocks are aligned at the input and dense blocks at the output, where
    they have like parts; the child has the depth of one of the parents.
    """
    first, second = parents
    dense = _mixed(first.dense[::-1], second.dense[::-1], rng)[::-1]
    hyper = _either(dict(first.hyper), dict(second.hyper), rng)
    readout = pick((first.readout, second.readout), rng)
    conv = _mixed(first.conv, second.conv, rng)
    recurrent, decoder = first.recurrent, first.decoder
    if recurrent or second.recurrent:
        recurrent = _mixed(recurrent, second.recurrent, rng)
    if decoder != second.decoder:
        decoder = pick((decoder, second.decoder), rng)
    graph = first.graph
    if graph is not None and second.graph is not None:
        graph = GraphPart(
            pick((graph.embedding, second.graph.embedding), rng),
            _mixed(graph.blocks, second.graph.blocks, rng),
            pick((graph.readout, second.graph.readout), rng),
        )
    values = completed(hyper, space, rng)
    return repair(Genome(conv, readout, dense, values, recurrent, decoder, graph), space)


def _either(
    first: Mapping[str, HyperValue], second: Mapping[str, HyperValue], rng: np.random.Generator
) -> dict[str, HyperValue]:
    """Each hyper-parameter from one of the parents that have it."""
    both = (first, second)
    return {
        name: pick([values[name] for values in both if name in values], rng)
        for name in sorted({*first, *second})
    }


def _mixed(first: tuple[T, ...], second: tuple[T, ...], rng: np.random.Generator) -> tuple[T, ...]:
    shape, other = (first, second) if rng.random() < 0.5 else (second, first)
    return tuple(
        other[i] if i < len(other) and rng.random() < 0.5 else block
        for i, block in enumerate(shape)
    )


def mutate(parents: Sequence[Genome], space: SearchSpace, rng: np.random.Generator) -> Genome:
    """One of the mutations below of the only parent."""
    kind = rng.random()
    if kind < STRUCTURAL_SHARE:
        return structural(parents, space, rng)
    if kind < STRUCTURAL_SHARE + READOUT_SHARE:
        return change_readout(parents, space, rng)
    return parametric(parents, space, rng)


def restructure(parents: Sequence[Genome], space: SearchSpace, rng: np.random.Generator) -> Genome:
    """One of the mutations that `parametric` is not, in the shares that `mutate` gives them."""
    if rng.random() * (STRUCTURAL_SHARE + READOUT_SHARE) < STRUCTURAL_SHARE:
        return structural(parents, space, rng)
    return change_readout(parents, space, rng)


def structural(parents: Sequence[Genome], space: SearchSpace, rng: np.random.Generator) -> Genome:
    """Insert, delete, duplicate or swap a block; parametric where the space has one depth of 0."""
    (genome,) = parents
    network = space.network
    limits = {
        "conv": network.conv_blocks,
        "dense": network.dense_blocks,
        "recurrent": network.recurrent_blocks,
        "graph": network.graph_blocks if network.graph is not None else (0, 0),
    }
    parts = [part for part, (_, most) in limits.items() if most > 0]
    if not parts:
        return parametric(parents, space, rng)
    match pick(parts, rng):
        case "conv":
            conv = _moved(genome.conv, limits["conv"], random_conv(network, rng), rng)
            return repair(replace(genome, conv=conv), space)
        case "dense":
            dense = _moved(genome.dense, limits["dense"], random_dense(network, rng), rng)
            return repair(replace(genome, dense=dense), space)
        case "graph":
            graph = _graph_of(genome)
            block = random_graph_block(network, rng)
            graph = replace(graph, blocks=_moved(graph.blocks, limits["graph"], block, rng))
            return repair(replace(genome, graph=graph), space)
        case _:
            new = random_recurrent(network, rng)
            recurrent = _moved(genome.recurrent, limits["recurrent"], new, rng)
            return repair(replace(genome, recurrent=recurrent), space)


def _moved(
    blocks: tuple[G, ...], limits: tuple[int, int], new: G, rng: np.random.Generator
) -> tuple[G, ...]:
    """`blocks` after one structural move that keeps the depth within `limits` (least, most)."""
    depth = len(blocks)
    grows, shrinks = depth < limits[1], depth > limits[0]
    moves = ["insert"] * grows + ["delete"] * shrinks
    moves += ["duplicate"] * (grows and depth > 0) + ["swap"] * (depth > 1)
    if not moves:  # one block that must stay
        return (new,)
    at = int(rng.integers(depth + 1)) if depth else 0
    inside = min(at, depth - 1)
    match pick(moves, rng):
        case "insert":
            return (*blocks[:at], new, *blocks[at:])
        case "delete":
            return blocks[:inside] + blocks[inside + 1 :]
        case "duplicate":
            return (*blocks[:inside], blocks[inside], *blocks[inside:])
        case _:
            left = min(inside, depth - 2)
            return (*blocks[:left], blocks[left + 1], blocks[left], *blocks[left + 2 :])


def change_readout(
    parents: Sequence[Genome], space: SearchSpace, rng: np.random.Generator
) -> Genome:
    """Another readout, decoder or embedding of nodes; parametric where there is no other one."""
    (genome,) = parents
    if genome.graph is not None:
        ends = _stepped(genome.graph, _graph_fields(space.network), rng)
        if ends != genome.graph:
            return repair(replace(genome, graph=ends), space)
    decoders = [d for d in space.network.decoders if d != genome.decoder]
    if genome.decoder is not None and decoders:
        return repair(replace(genome, decoder=pick(decoders, rng)), space)
    others = [r for r in space.network.readouts if r != genome.readout]
    if genome.readout is None or not others:
        return parametric(parents, space, rng)
    return repair(replace(genome, readout=pick(others, rng)), space)


def parametric(parents: Sequence[Genome], space: SearchSpace, rng: np.random.Generator) -> Genome:
    """Change at least one field of a block or hyper-parameter.

    Ordered choices step to a neighbour, sets to another member, real numbers by a normal step (of
    their logarithm, if they are sampled so) whose width is drawn over a decade and a half.
    """
    (genome,) = parents
    genes: list[Gene] = [*genome.conv, *genome.dense, *genome.recurrent]
    genes += genome.graph.blocks if genome.graph is not None else ()
    hyper = list(genome.hyper)
    sites = len(genes) + len(hyper)
    while sites:
        site = int(rng.random() * sites)
        if site < len(genes):
            genes[site] = _stepped(genes[site], _fields(genes[site], space.network), rng)
        else:
            name, value = hyper[site - len(genes)]
            hyper[site - len(genes)] = (name, step(value, space.hyper[name], rng))
        if rng.random() >= AGAIN:
            break
    child = replace(
        genome,
        conv=tuple(gene for gene in genes if isinstance(gene, ConvGene)),
        dense=tuple(gene for gene in genes if isinstance(gene, DenseGene)),
        recurrent=tuple(gene for gene in genes if isinstance(gene, RecurrentGene)),
        graph=genome.graph
        and replace(genome.graph, blocks=tuple(g for g in genes if isinstance(g, GraphGene))),
        hyper=completed(dict(hyper), space, rng),
    )
    return repair(child, space)


_Fields = dict[str, tuple[Sequence[Any], bool]]  # name -> choices, whether they are ordered


def _fields(gene: Gene, network: NetworkSpace) -> _Fields:
    match gene:
        case ConvGene():
            return {
                "filters": (network.filters, True),
                "kernel": (network.kernels, True),
                "padding": (network.paddings, False),
                "norm": (network.norms, False),
                "activation": (network.activations, False),
                "pool": (network.pools, False),
                "dropout": (network.dropouts, True),
                "skip": (network.skips, False),
                "branches": (network.branches, False),
            }
        case DenseGene():
            return {
                "units": (network.units, True),
                "norm": (network.norms, False),
                "activation": (network.activations, False),
                "dropout": (network.dropouts, True),
                "skip": (network.dense_skips, False),
            }
        case RecurrentGene():
            return {
                "cell": (network.cells, False),
                "units": (network.recurrent_units, True),
                "bidirectional": (network.bidirectional, False),
                "dropout": (network.dropouts, True),
            }
        case GraphGene():
            return {
                "op": (network.graph_convs, False),
                "channels": (network.channels, True),
                "norm": (network.graph_norms, False),
                "activation": (network.graph_activations, False),
                "dropout": (network.dropouts, True),
                "skip": (network.graph_skips, False),
            }


def _graph_fields(network: NetworkSpace) -> _Fields:
    return {"embedding": (network.embeddings, True), "readout": (network.graph_readouts, False)}


def _graph_of(genome: Genome) -> GraphPart:
    assert genome.graph is not None, "a genome of a space of graphs"
    return genome.graph


def _stepped(gene: G, fields: _Fields, rng: np.random.Generator) -> G:
    open_fields = [name for name, (choices, _) in fields.items() if len(choices) > 1]
    if not open_fields:
        return gene
    name = pick(open_fields, rng)
    choices, ordered = fields[name]
    return replace(gene, **{name: _another(getattr(gene, name), choices, ordered, rng)})


def step(value: HyperValue, parameter: Parameter, rng: np.random.Generator) -> HyperValue:
    """A value near `value`, inside the range or among the choices of `parameter`."""
    if isinstance(parameter, Choice):
        another: HyperValue = _another(value, parameter.values, parameter.ordered, rng)
        return another
    low, high = parameter.low, parameter.high
    number = min(max(as_number(value), low), high)
    width = 10.0 ** rng.uniform(-2.0, -0.5) * float(rng.standard_normal())
    if parameter.log:
        number *= exp(width * log(high / low))
    else:
        number += width * (high - low)
    if isinstance(parameter, IntRange):
        return _another_integer(round(as_number(value)), number, parameter, rng)
    return min(max(number, low), high)


def _another_integer(
    value: int, wanted: float, parameter: IntRange, rng: np.random.Generator
) -> int:
    """The integer nearest to `wanted`, but never `value`: then one of those beside it."""
    found = round(min(max(wanted, parameter.low), parameter.high))
    if found != value:
        return found
    beside = [n for n in (value - 1, value + 1) if parameter.low <= n <= parameter.high]
    return pick(beside, rng)


def _another(value: Any, choices: Sequence[Any], ordered: bool, rng: np.random.Generator) -> Any:
    """Another choice: a neighbour if they are ordered, else any; `value` if there is no other."""
    others = [choice for choice in choices if choice != value]
    if not others:
        return value
    if not ordered:
        return pick(others, rng)
    place = position_of(value, choices)
    below = [c for i, c in enumerate(choices) if i < place][::-1]
    above = [c for i, c in enumerate(choices) if i > place]
    side = pick([s for s in (below, above) if s], rng)
    distance = 0
    while distance < len(side) - 1 and rng.random() < FURTHER:
        distance += 1
    return side[distance]
