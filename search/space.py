"""The search space at work: random genomes, repair, numbers for the surrogate."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log, log2, log10
from typing import TypeVar, get_args

import numpy as np

from dmi_hpc.errors import NetworkError
from dmi_hpc.models.cost import cost
from dmi_hpc.models.space import (
    Choice,
    FloatRange,
    HyperValue,
    NetworkSpace,
    Parameter,
    SearchSpace,
)
from dmi_hpc.models.spec import ActivationName, NormName, PoolName, ReadoutName
from search.base import Vector
from search.genome import ConvGene, DenseGene, Genome, canonical, decode

T = TypeVar("T")

# relative scales of the surrogate's features, about [0, 1] else (benchmarks/search_tables.py and the
# objective of tests/unit/test_evolve.py)
SLOT_WEIGHT = 0.1
HYPER_WEIGHT = 2.0


def require_consistent(space: SearchSpace) -> None:
    """Raises NetworkError if no genome of `space` could be built."""
    network = space.network
    if len(network.input_shape) == 1 and network.conv_blocks[1] > 0:
        raise NetworkError(
            f"conv_blocks {network.conv_blocks} need a map over space, the input is a vector of "
            f"{network.input_shape[0]}: set conv_blocks = (0, 0)"
        )
    for name, (least, most) in (("conv", network.conv_blocks), ("dense", network.dense_blocks)):
        if not 0 <= least <= most:
            raise NetworkError(f"{name}_blocks: expected 0 <= least <= most, found {least}, {most}")


def pick(values: Sequence[T], rng: np.random.Generator) -> T:
    """One of `values`, uniformly (much faster than ``rng.choice``)."""
    return values[int(rng.random() * len(values))]


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
    )


def random_dense(network: NetworkSpace, rng: np.random.Generator) -> DenseGene:
    """A dense block, each field uniform over its choices."""
    return DenseGene(
        pick(network.units, rng),
        pick(network.norms, rng),
        pick(network.activations, rng),
        pick(network.dropouts, rng),
    )


def random_value(parameter: Parameter, rng: np.random.Generator) -> HyperValue:
    """A hyper-parameter, uniform over its range (of the logarithm, if it says so) or choices."""
    if isinstance(parameter, Choice):
        return pick(parameter.values, rng)
    if parameter.log:
        return exp(rng.uniform(log(parameter.low), log(parameter.high)))
    return float(rng.uniform(parameter.low, parameter.high))


def random_genome(space: SearchSpace, rng: np.random.Generator) -> Genome:
    """A valid genome in canonical form: depths uniform, then every field uniform."""
    network = space.network
    convolutions = int(rng.integers(network.conv_blocks[0], network.conv_blocks[1] + 1))
    denses = int(rng.integers(network.dense_blocks[0], network.dense_blocks[1] + 1))
    genome = Genome(
        tuple(random_conv(network, rng) for _ in range(convolutions)),
        pick(network.readouts, rng) if len(network.input_shape) > 1 else None,
        tuple(random_dense(network, rng) for _ in range(denses)),
        tuple((name, random_value(space.hyper[name], rng)) for name in sorted(space.hyper)),
    )
    return canonical(genome, space)


def repair(genome: Genome, space: SearchSpace) -> Genome:
    """The nearest valid genome, in canonical form.

    Depths come within their limits (the last blocks go, or are repeated); real hyper-parameters
    within their range. Sizes that came from a founder outside the choices are kept.
    """
    network = space.network
    conv = _within(genome.conv, network.conv_blocks, _plain_conv(network))
    dense = _within(genome.dense, network.dense_blocks, _plain_dense(network))
    hyper = tuple((name, _clipped(value, space.hyper[name])) for name, value in genome.hyper)
    return canonical(Genome(conv, genome.readout, dense, hyper), space)


def _within(blocks: tuple[T, ...], limits: tuple[int, int], plain: T) -> tuple[T, ...]:
    least, most = limits
    missing = least - len(blocks)
    if missing > 0:
        return blocks + (blocks[-1] if blocks else plain,) * missing
    return blocks[:most]


def _plain_conv(network: NetworkSpace) -> ConvGene:
    return ConvGene(
        network.filters[0],
        network.kernels[0],
        network.paddings[0],
        network.norms[0],
        network.activations[0],
        network.pools[0],
        network.dropouts[0],
    )


def _plain_dense(network: NetworkSpace) -> DenseGene:
    return DenseGene(
        network.units[0], network.norms[0], network.activations[0], network.dropouts[0]
    )


def _clipped(value: HyperValue, parameter: Parameter) -> HyperValue:
    if isinstance(parameter, Choice):
        return value
    return min(max(float(value), parameter.low), parameter.high)


_ACTIVATIONS: tuple[str, ...] = get_args(ActivationName)
_NORMS: tuple[str, ...] = get_args(NormName)
_POOLS: tuple[str, ...] = get_args(PoolName)
_READOUTS: tuple[str, ...] = get_args(ReadoutName)
_DENSE_NAMES = (
    "present",
    "log2_units",
    "dropout",
    *(f"norm_{n}" for n in _NORMS),
    *(f"activation_{n}" for n in _ACTIVATIONS),
)
_CONV_NAMES = (
    "present",
    "log2_filters",
    "dropout",
    *(f"norm_{n}" for n in _NORMS),
    *(f"activation_{n}" for n in _ACTIVATIONS),
    "log2_kernel",
    "circular",
    *(f"pool_{n}" for n in _POOLS),
)


def _one_hot(value: HyperValue | None, values: Sequence[HyperValue]) -> list[float]:
    return [float(value == v) for v in values]


class Features:
    """A fixed-length description of any genome of a space, for distances between genomes.

    `names` says what each entry is. Blocks enter twice: summed over all blocks, and (with little
    weight, as there are many of them) each slot by itself, counted from the input.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._conv_slots = space.network.conv_blocks[1]
        self._dense_slots = space.network.dense_blocks[1]
        self._vectors: dict[ConvGene | DenseGene, Vector] = {}
        self.names = self._names()

    def __call__(self, genome: Genome) -> Vector:
        """(len(names),) float64."""
        conv = self._blocks(genome.conv, self._conv_slots, len(_CONV_NAMES))
        dense = self._blocks(genome.dense, self._dense_slots, len(_DENSE_NAMES))
        return np.concatenate([self._whole(genome), conv, dense, self._hyper(genome)])

    def matrix(self, genomes: Sequence[Genome]) -> Vector:
        """(len(genomes), len(names)) float64."""
        return np.array([self(genome) for genome in genomes]).reshape(-1, len(self.names))

    def _names(self) -> tuple[str, ...]:
        names = ["conv_blocks", "dense_blocks", "log_parameters", "log_flops", "log_activations"]
        names += [f"readout_{name}" for name in _READOUTS]
        for part, slots, fields in (
            ("conv", self._conv_slots, _CONV_NAMES),
            ("dense", self._dense_slots, _DENSE_NAMES),
        ):
            for where in ("sum", *range(slots)):
                names += [f"{part}_{where}_{field}" for field in fields]
        for name, parameter in sorted(self._space.hyper.items()):
            if isinstance(parameter, Choice) and not parameter.ordered:
                names += [f"{name}_{value}" for value in parameter.values]
            else:
                names.append(name)
        return tuple(names)

    def _whole(self, genome: Genome) -> list[float]:
        found = cost(decode(genome, self._space.network))
        depths = [
            len(genome.conv) / max(1, self._conv_slots),
            len(genome.dense) / max(1, self._dense_slots),
        ]
        sizes = [log10(n) / 10 for n in (found.parameters, found.flops, found.activations)]
        return [*depths, *sizes, *_one_hot(genome.readout, _READOUTS)]

    def _blocks(self, genes: Sequence[ConvGene | DenseGene], slots: int, width: int) -> Vector:
        result = np.zeros((slots + 1, width))
        if genes:
            vectors = np.array([self._vector(gene) for gene in genes])
            result[0] = vectors.sum(axis=0) / max(1, slots)
            # a founder may be deeper than the space: its last blocks show in the sum alone
            shown = vectors[:slots]
            result[1 : 1 + len(shown)] = SLOT_WEIGHT * shown
        return result.ravel()

    def _vector(self, gene: ConvGene | DenseGene) -> Vector:
        vector = self._vectors.get(gene)
        if vector is None:
            vector = self._vectors[gene] = np.array(_gene_numbers(gene))
        return vector

    def _hyper(self, genome: Genome) -> list[float]:
        numbers: list[float] = []
        for name, value in genome.hyper:
            numbers += _hyper_numbers(value, self._space.hyper[name])
        return numbers


def _gene_numbers(gene: ConvGene | DenseGene) -> list[float]:
    width = gene.filters if isinstance(gene, ConvGene) else gene.units
    numbers = [1.0, log2(width) / 10, 2 * gene.dropout, *_one_hot(gene.norm or "", _NORMS)]
    numbers += _one_hot(gene.activation, _ACTIVATIONS)
    if isinstance(gene, ConvGene):
        numbers += [log2(gene.kernel) / 3, float(gene.padding == "circular")]
        numbers += _one_hot(gene.pool or "", _POOLS)
    return numbers


def _hyper_numbers(value: HyperValue, parameter: Parameter) -> list[float]:
    if isinstance(parameter, FloatRange):
        low, high = parameter.low, parameter.high
        number = min(max(float(value), low), high)  # a founder's may lie outside
        if parameter.log:
            low, high, number = log(low), log(high), log(number)
        return [HYPER_WEIGHT * (number - low) / (high - low)]
    if not parameter.ordered:
        return [HYPER_WEIGHT * n for n in _one_hot(value, parameter.values)]
    last = max(1, len(parameter.values) - 1)
    return [HYPER_WEIGHT * position_of(value, parameter.values) / last]


def position_of(value: HyperValue, ascending: Sequence[HyperValue]) -> float:
    """Index of `value`; half way between its neighbours if it is a number outside the choices."""
    if value in ascending:
        return float(ascending.index(value))
    return sum(float(v) < float(value) for v in ascending) - 0.5
