"""The search space at work: random genomes and repair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, log
from typing import TypeVar

import numpy as np

from dmi_hpc.errors import NetworkError
from dmi_hpc.models.space import (
    Choice,
    HyperValue,
    IntRange,
    NetworkSpace,
    Parameter,
    SearchSpace,
)
from search.spaces.draw import pick, within
from search.spaces.genome import ConvGene, DenseGene, Genome, RecurrentGene, as_number, canonical
from search.spaces.graph_blocks import random_graph, repaired_graph, require_graph_space

T = TypeVar("T")


def require_consistent(space: SearchSpace) -> None:
    """Raises NetworkError if no genome of `space` could be built."""
    network = space.network
    if network.graph is not None:
        require_graph_space(network)
    axes = len(network.input_shape) - 1
    if axes and network.standardize:
        raise NetworkError(f"standardize needs a vector as input, found {network.input_shape}")
    if axes == 0 and network.conv_blocks[1] > 0:
        raise NetworkError(
            f"conv_blocks {network.conv_blocks} need a map over space, the input is a vector of "
            f"{network.input_shape[0]}: set conv_blocks = (0, 0)"
        )
    if axes != 1 and network.recurrent_blocks[1] > 0:
        raise NetworkError(
            f"recurrent_blocks {network.recurrent_blocks} need a sequence (channels, steps), the "
            f"input is {network.input_shape}: set recurrent_blocks = (0, 0)"
        )
    for name in ("conv_blocks", "dense_blocks", "recurrent_blocks"):
        least, most = getattr(network, name)
        if not 0 <= least <= most:
            raise NetworkError(f"{name}: expected 0 <= least <= most, found {least}, {most}")
    if set(network.readouts) == {"last"} and network.recurrent_blocks[0] == 0:
        raise NetworkError(
            'readouts offer "last" alone, which needs a recurrent block: set the least of '
            "recurrent_blocks to 1, or add a readout"
        )
    if network.map_output and (axes == 0 or network.dense_blocks[1] + network.recurrent_blocks[1]):
        raise NetworkError(
            f"map_output needs a map over space (found the input {network.input_shape}) and "
            f"dense_blocks = recurrent_blocks = (0, 0) (found {network.dense_blocks} and "
            f"{network.recurrent_blocks})"
        )


def random_conv(network: NetworkSpace, rng: np.random.Generator) -> ConvGene:
    """A convolution block, each field uniform over its choices."""
    return ConvGene(
        pick(network.filters, rng),
        pick(network.kernels, rng),
        pick(network.paddings, rng),
        pick(network.norms, rng),
        pick(network.activations, rng),
        pick(network.pools, rng),
        pick(network.dropouts, rng),
        _pick_of_several(network.skips, rng),
        _pick_of_several(network.branches, rng),
    )


def random_dense(network: NetworkSpace, rng: np.random.Generator) -> DenseGene:
    """A dense block, each field uniform over its choices."""
    return DenseGene(
        pick(network.units, rng),
        pick(network.norms, rng),
        pick(network.activations, rng),
        pick(network.dropouts, rng),
        _pick_of_several(network.dense_skips, rng),
    )


def random_recurrent(network: NetworkSpace, rng: np.random.Generator) -> RecurrentGene:
    """A recurrent block, each field uniform over its choices."""
    return RecurrentGene(
        pick(network.cells, rng),
        pick(network.recurrent_units, rng),
        pick(network.bidirectional, rng),
        pick(network.dropouts, rng),
    )


def _pick_of_several(values: Sequence[T], rng: np.random.Generator) -> T:
    """As `pick`, but what leaves no choice draws nothing: searches of a space without it, recorded
    when there was no such field, continue as they began."""
    return pick(values, rng) if len(values) > 1 else values[0]


def random_value(parameter: Parameter, rng: np.random.Generator) -> HyperValue:
    """A hyper-parameter, uniform over its range (of the logarithm, if it says so) or choices."""
    if isinstance(parameter, Choice):
        return pick(parameter.values, rng)
    low, high = float(parameter.low), float(parameter.high)
    if isinstance(parameter, IntRange):  # each integer stands for the numbers that round to it
        low, high = low - 0.5, high + 0.5
    found = exp(rng.uniform(log(low), log(high))) if parameter.log else rng.uniform(low, high)
    return _clipped(found, parameter)


def random_genome(space: SearchSpace, rng: np.random.Generator) -> Genome:
    """A valid genome in canonical form: depths uniform, then every field uniform."""
    network = space.network
    convolutions = int(rng.integers(network.conv_blocks[0], network.conv_blocks[1] + 1))
    denses = int(rng.integers(network.dense_blocks[0], network.dense_blocks[1] + 1))
    graphs = network.graph is not None
    reads = len(network.input_shape) > 1 and not network.map_output and not graphs
    genome = Genome(
        tuple(random_conv(network, rng) for _ in range(convolutions)),
        pick(network.readouts, rng) if reads else None,
        tuple(random_dense(network, rng) for _ in range(denses)),
        completed({}, space, rng),
        _random_recurrents(network, rng),
        pick(network.decoders, rng) if network.map_output else None,
        random_graph(network, rng) if graphs else None,
    )
    return canonical(genome, space)


def _random_recurrents(
    network: NetworkSpace, rng: np.random.Generator
) -> tuple[RecurrentGene, ...]:
    least, most = network.recurrent_blocks
    if most == 0:
        return ()
    return tuple(random_recurrent(network, rng) for _ in range(rng.integers(least, most + 1)))


def completed(
    hyper: Mapping[str, HyperValue], space: SearchSpace, rng: np.random.Generator
) -> tuple[tuple[str, HyperValue], ...]:
    """`hyper` with values of all hyper-parameters: those without one are drawn, though some may have
    no effect (the canonical form drops them)."""
    return tuple(
        (name, hyper[name] if name in hyper else random_value(space.hyper[name], rng))
        for name in sorted(space.hyper)
    )


def repair(genome: Genome, space: SearchSpace) -> Genome:
    """The nearest valid genome, in canonical form.

    Depths come within their limits (the last blocks go, or are repeated); numbers within their range.
    Sizes that came from a founder outside the choices are kept.
    """
    network = space.network
    conv = within(genome.conv, network.conv_blocks, _plain_conv(network))
    dense = within(genome.dense, network.dense_blocks, _plain_dense(network))
    recurrent = within(genome.recurrent, network.recurrent_blocks, _plain_recurrent(network))
    hyper = tuple((name, _clipped(value, space.hyper[name])) for name, value in genome.hyper)
    graph = repaired_graph(genome.graph, network) if genome.graph is not None else None
    whole = Genome(conv, genome.readout, dense, hyper, recurrent, genome.decoder, graph)
    return canonical(whole, space)


def _plain_conv(network: NetworkSpace) -> ConvGene:
    return ConvGene(
        network.filters[0],
        network.kernels[0],
        network.paddings[0],
        network.norms[0],
        network.activations[0],
        network.pools[0],
        network.dropouts[0],
        network.skips[0],
        network.branches[0],
    )


def _plain_dense(network: NetworkSpace) -> DenseGene:
    return DenseGene(
        network.units[0],
        network.norms[0],
        network.activations[0],
        network.dropouts[0],
        network.dense_skips[0],
    )


def _plain_recurrent(network: NetworkSpace) -> RecurrentGene:
    return RecurrentGene(
        network.cells[0],
        network.recurrent_units[0],
        network.bidirectional[0],
        network.dropouts[0],
    )


def _clipped(value: HyperValue, parameter: Parameter) -> HyperValue:
    if isinstance(parameter, Choice):
        return value
    number = as_number(value)
    if isinstance(parameter, IntRange):
        number = round(number)
    return min(max(number, parameter.low), parameter.high)


def position_of(value: HyperValue, ascending: Sequence[HyperValue]) -> float:
    """Index of `value`; half way between its neighbours if it is a number outside the choices."""
    if value in ascending:
        return float(ascending.index(value))
    return sum(as_number(v) < as_number(value) for v in ascending) - 0.5
