"""Genomes as numbers, for the distances between them that the surrogate learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log, log2, log10
from typing import Generic, get_args

import numpy as np

from dmi_hpc.models.space import Choice, HyperValue, Parameter, SearchSpace, SkipName
from dmi_hpc.models.spec import (
    ActivationName,
    CellName,
    GraphConvName,
    GraphReadoutName,
    NormName,
    PoolName,
    ReadoutName,
)
from search.base import G, Vector
from search.spaces.genes import KERNELS
from search.spaces.genome import ConvGene, DenseGene, Genome, GraphGene, RecurrentGene, as_number
from search.spaces.sizes import Sizes
from search.spaces.space import position_of

# relative scales of the surrogate's features, about [0, 1] else (benchmarks/search_tables.py and the
# objective of tests/unit/test_evolve.py)
SLOT_WEIGHT = 0.1
HYPER_WEIGHT = 2.0

# softplus, its shifted form and attention came later: they are none of these
_ACTIVATIONS: tuple[str, ...] = tuple(n for n in get_args(ActivationName) if "softplus" not in n)
_NORMS: tuple[str, ...] = get_args(NormName)
_POOLS: tuple[str, ...] = get_args(PoolName)
_READOUTS: tuple[str, ...] = get_args(ReadoutName)
_CELLS: tuple[str, ...] = get_args(CellName)
_SKIPS: tuple[str, ...] = get_args(SkipName)
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


# of what came later: behind all else, and only in spaces that offer it
_CONV_SHAPES = (*(f"skip_{n}" for n in _SKIPS), "branches", "log2_widest")
_DENSE_SHAPES = tuple(f"skip_{n}" for n in _SKIPS)
_RECURRENT_NAMES = (
    "present",
    "log2_units",
    "dropout",
    *(f"cell_{n}" for n in _CELLS),
    "bidirectional",
)
_GRAPH_CONVS: tuple[str, ...] = tuple(n for n in get_args(GraphConvName) if n != "attention")
_GRAPH_READOUTS: tuple[GraphReadoutName, ...] = ("mean", "sum", "max")
_GRAPH_NAMES = (
    "present",
    "log2_channels",
    "dropout",
    *(f"norm_{n}" for n in _NORMS),
    *(f"activation_{n}" for n in _ACTIVATIONS),
    *(f"op_{n}" for n in _GRAPH_CONVS),
    *(f"skip_{n}" for n in _SKIPS),
)


class Features:
    """A fixed-length description of any genome of a space, for distances between genomes.

    `names` says what each entry is. Blocks enter twice: summed over all blocks, and (with little
    weight, as there are many of them) each slot by itself, counted from the input.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space, network = space, space.network
        conv, dense = network.conv_blocks[1], network.dense_blocks[1]
        self._depths = max(1, conv), max(1, dense)
        self._conv = [_Blocks("conv", conv, _CONV_NAMES, _conv_numbers)]
        self._dense = [_Blocks("dense", dense, _DENSE_NAMES, _dense_numbers)]
        self._recurrent: list[_Blocks[RecurrentGene]] = []
        self._graph: list[_Blocks[GraphGene]] = []
        if network.graph is not None:
            most = network.graph_blocks[1]
            self._graph.append(_Blocks("graph", most, _GRAPH_NAMES, _graph_numbers))
        if len(network.skips) > 1 or len(network.branches) > 1:
            self._conv.append(_Blocks("conv", conv, _CONV_SHAPES, _conv_shape))
        if len(network.dense_skips) > 1:
            self._dense.append(_Blocks("dense", dense, _DENSE_SHAPES, _dense_shape))
        if most := network.recurrent_blocks[1]:
            self._recurrent.append(_Blocks("recurrent", most, _RECURRENT_NAMES, _recurrent_numbers))
        self._sizes = Sizes(network)
        self._hyper = _Hyper(space)
        self.names = self._names()

    def __call__(self, genome: Genome) -> Vector:
        """(len(names),) float64."""
        found: Vector = self.matrix([genome])[0]
        return found

    def matrix(self, genomes: Sequence[Genome]) -> Vector:
        """(len(genomes), len(names)) float64."""
        if not genomes:
            return np.empty((0, len(self.names)))
        conv = [part([genome.conv for genome in genomes]) for part in self._conv]
        dense = [part([genome.dense for genome in genomes]) for part in self._dense]
        recurrent = [part([genome.recurrent for genome in genomes]) for part in self._recurrent]
        parts = [genome.graph.blocks if genome.graph else () for genome in genomes]
        graph = [part(parts) for part in self._graph]
        whole = np.array([self._whole(genome) for genome in genomes])
        hyper = np.array([self._hyper(genome) for genome in genomes])
        later = np.array([self._later(genome) for genome in genomes])
        return np.hstack(
            [whole, conv[0], dense[0], hyper, *conv[1:], *dense[1:], *recurrent, *graph, later]
        )

    def _names(self) -> tuple[str, ...]:
        names = ["conv_blocks", "dense_blocks", "log_parameters", "log_flops", "log_activations"]
        names += [f"readout_{name}" for name in _READOUTS]
        names += [*self._conv[0].names, *self._dense[0].names]
        names += self._hyper.names
        for later in (self._conv[1:], self._dense[1:], self._recurrent, self._graph):
            names += [name for part in later for name in part.names]
        network = self._space.network
        names += ["readout_last"] * ("last" in network.readouts)
        names += ["decoder_skip"] * network.map_output
        if network.graph is not None:
            names += ["graph_blocks", "log2_embedding"]
            names += [f"graph_readout_{name}" for name in _GRAPH_READOUTS]
            names += ["graph_readout_set2set"] * ("set2set" in network.graph_readouts)
        return tuple(names)

    def _whole(self, genome: Genome) -> list[float]:
        found = self._sizes(genome)
        blocks = zip((genome.conv, genome.dense), self._depths, strict=True)
        depths = [len(genes) / most for genes, most in blocks]
        sizes = [log10(n) / 10 for n in (found.parameters, found.flops, found.activations)]
        return [*depths, *sizes, *_one_hot(genome.readout, _READOUTS)]

    def _later(self, genome: Genome) -> list[float]:
        network = self._space.network
        numbers = [float(genome.readout == "last")] * ("last" in network.readouts)
        numbers += [float(genome.decoder == "skip")] * network.map_output
        if (part := genome.graph) is not None:
            depth = len(part.blocks) / max(1, network.graph_blocks[1])
            numbers += [depth, log2(part.embedding) / 10, *_one_hot(part.readout, _GRAPH_READOUTS)]
            numbers += [float(part.readout == "set2set")] * ("set2set" in network.graph_readouts)
        return numbers


class _Blocks(Generic[G]):
    """Numbers of all blocks of one kind: their sum, then each slot."""

    def __init__(
        self, kind: str, slots: int, fields: Sequence[str], numbers: Callable[[G], list[float]]
    ) -> None:
        self.names = [f"{kind}_{slot}_{f}" for slot in ("sum", *range(slots)) for f in fields]
        self._slots, self._width, self._numbers = slots, len(fields), numbers
        self._known: dict[G, Vector] = {}

    def __call__(self, chains: Sequence[Sequence[G]]) -> Vector:
        """(len(chains), len(names)): of the blocks of each network."""
        depths = np.array([len(genes) for genes in chains])
        blocks = np.zeros((len(chains), max(self._slots, depths.max()), self._width))
        vectors = [self._vector(gene) for genes in chains for gene in genes]
        if vectors:
            present = np.arange(blocks.shape[1]) < depths[:, None]
            blocks[present] = np.array(vectors)
        total = blocks.sum(axis=1, keepdims=True) / max(1, self._slots)
        # a founder may be deeper than the space: its last blocks show in the sum alone
        shown = SLOT_WEIGHT * blocks[:, : self._slots]
        return np.concatenate([total, shown], axis=1).reshape(len(chains), -1)

    def _vector(self, gene: G) -> Vector:
        vector = self._known.get(gene)
        if vector is None:
            vector = self._known[gene] = np.array(self._numbers(gene))
        return vector


class _Hyper:
    """Numbers of the hyper-parameters of a genome, those without a value there included."""

    def __init__(self, space: SearchSpace) -> None:
        self._parameters = sorted(space.hyper.items())
        self._absent = [_absent(parameter) for _, parameter in self._parameters]
        self._known: dict[tuple[str, HyperValue], list[float]] = {}  # values have 3 digits: few
        self.names: list[str] = []
        for name, parameter in self._parameters:
            if isinstance(parameter, Choice) and not parameter.ordered:
                self.names += [f"{name}_{value}" for value in parameter.values]
            else:
                self.names.append(name)

    def __call__(self, genome: Genome) -> list[float]:
        values, numbers = dict(genome.hyper), list[float]()
        for (name, parameter), absent in zip(self._parameters, self._absent, strict=True):
            if name not in values:
                numbers += absent
                continue
            known = self._known.get((name, values[name]))
            if known is None:
                known = self._known[name, values[name]] = _hyper_numbers(values[name], parameter)
            numbers += known
        return numbers


def _one_hot(value: HyperValue, values: Sequence[HyperValue]) -> list[float]:
    return [float(value == v) for v in values]


def _size(width: int, gene: ConvGene | DenseGene | GraphGene) -> list[float]:
    numbers = [1.0, log2(width) / 10, 2 * gene.dropout, *_one_hot(gene.norm, _NORMS)]
    return numbers + _one_hot(gene.activation, _ACTIVATIONS)


def _conv_numbers(gene: ConvGene) -> list[float]:
    numbers = _size(gene.filters, gene)
    numbers += [log2(gene.kernel) / 3, float(gene.padding == "circular")]
    return numbers + _one_hot(gene.pool, _POOLS)


def _conv_shape(gene: ConvGene) -> list[float]:
    kernels = gene.kernels
    return [*_one_hot(gene.skip, _SKIPS), len(kernels) / len(KERNELS), log2(kernels[-1]) / 3]


def _dense_numbers(gene: DenseGene) -> list[float]:
    return _size(gene.units, gene)


def _dense_shape(gene: DenseGene) -> list[float]:
    return _one_hot(gene.skip, _SKIPS)


def _recurrent_numbers(gene: RecurrentGene) -> list[float]:
    numbers = [1.0, log2(gene.units) / 10, 2 * gene.dropout, *_one_hot(gene.cell, _CELLS)]
    return [*numbers, float(gene.bidirectional)]


def _graph_numbers(gene: GraphGene) -> list[float]:
    numbers = [*_size(gene.channels, gene), *_one_hot(gene.op, _GRAPH_CONVS)]
    return [*numbers, *_one_hot(gene.skip, _SKIPS)]


def _hyper_numbers(value: HyperValue, parameter: Parameter) -> list[float]:
    if not isinstance(parameter, Choice):
        low, high = float(parameter.low), float(parameter.high)
        number = min(max(as_number(value), low), high)  # a founder's may lie outside
        if parameter.log:
            low, high, number = log(low), log(high), log(number)
        return [HYPER_WEIGHT * (number - low) / (high - low)]
    if not parameter.ordered:
        return [HYPER_WEIGHT * n for n in _one_hot(value, parameter.values)]
    last = max(1, len(parameter.values) - 1)
    return [HYPER_WEIGHT * position_of(value, parameter.values) / last]


def _absent(parameter: Parameter) -> list[float]:
    """Of a hyper-parameter without effect: the middle of its range, or none of its values."""
    if isinstance(parameter, Choice) and not parameter.ordered:
        return [0.0] * len(parameter.values)
    return [HYPER_WEIGHT / 2]
