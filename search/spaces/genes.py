"""The genes of a network and its training hyper-parameters, and their way to and from JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from dmi_hpc.models.space import DecoderName, HyperValue, Kernel, ReadoutChoice, SkipName
from dmi_hpc.models.spec import (
    ActivationName,
    CellName,
    GraphConvName,
    GraphReadoutName,
    NormName,
    PaddingName,
    PoolName,
)

KERNELS: tuple[Kernel, ...] = (1, 3, 5, 7)

# Fields with a default came later: JSON has them only where they differ from it, so that genomes of
# earlier versions are read, and hashed, as they always were.


@dataclass(frozen=True, slots=True)
class ConvGene:
    """Convolution, [norm], activation, [pool by 2], [dropout]; ``None`` and 0 mean "without".

    branches: kernels of convolutions beside that with `kernel`, which share the filters with it;
    skip: the connection around convolution, norm and activation.
    """

    filters: int
    kernel: Kernel
    padding: PaddingName
    norm: NormName | None
    activation: ActivationName
    pool: PoolName | None
    dropout: float
    skip: SkipName | None = None
    branches: tuple[Kernel, ...] = ()

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Of all its convolutions."""
        return parallel_kernels((self.kernel, *self.branches), self.filters)


def parallel_kernels(kernels: Sequence[Kernel], filters: int) -> tuple[Kernel, ...]:
    """`kernels` in ascending order; equal ones are one, and each has a filter at least."""
    return tuple(sorted(set(kernels)))[:filters] if len(kernels) > 1 else tuple(kernels)


@dataclass(frozen=True, slots=True)
class RecurrentGene:
    """GRU or LSTM, [dropout]."""

    cell: CellName
    units: int
    bidirectional: bool
    dropout: float


@dataclass(frozen=True, slots=True)
class DenseGene:
    """Dense, [norm], activation, [dropout]; skip: the connection around the first three."""

    units: int
    norm: NormName | None
    activation: ActivationName
    dropout: float
    skip: SkipName | None = None


@dataclass(frozen=True, slots=True)
class GraphGene:
    """Graph convolution, [norm], activation, [dropout]; skip: the connection around the first two."""

    op: GraphConvName
    channels: int
    norm: NormName | None
    activation: ActivationName
    dropout: float
    skip: SkipName | None = None


Gene = ConvGene | RecurrentGene | DenseGene | GraphGene


@dataclass(frozen=True, slots=True)
class GraphPart:
    """Of a network of graphs, from its input to its readout; embedding: units on each node."""

    embedding: int
    blocks: tuple[GraphGene, ...]
    readout: GraphReadoutName


@dataclass(frozen=True, slots=True)
class Genome:
    """Convolution blocks, readout, dense blocks, hyper-parameters, and since a later version
    recurrent blocks (before the readout), the decoder, and what is before the dense blocks of networks
    of graphs, which have nothing else there.

    readout: ``None`` for vector inputs and map outputs. hyper: (name, value) pairs, sorted by name.
    decoder: of networks with a map as output, else ``None``.
    """

    conv: tuple[ConvGene, ...]
    readout: ReadoutChoice | None
    dense: tuple[DenseGene, ...]
    hyper: tuple[tuple[str, HyperValue], ...]
    recurrent: tuple[RecurrentGene, ...] = ()
    decoder: DecoderName | None = None
    graph: GraphPart | None = None


def to_json(genome: Genome) -> dict[str, Any]:
    """Plain data, read back by `from_json`."""
    data: dict[str, Any] = {
        "conv": [_written(gene) for gene in genome.conv],
        "readout": genome.readout,
        "dense": [_written(gene) for gene in genome.dense],
        "hyper": dict(genome.hyper),
    }
    if genome.recurrent:
        data["recurrent"] = [_written(gene) for gene in genome.recurrent]
    if genome.decoder is not None:
        data["decoder"] = genome.decoder
    if genome.graph is not None:
        part = genome.graph
        blocks = [_written(gene) for gene in part.blocks]
        data["graph"] = {
            "embedding": part.embedding,
            "blocks": blocks,
            "readout": part.readout,
        }
    return data


def from_json(data: Mapping[str, Any]) -> Genome:
    """Inverse of `to_json`. Raises KeyError or TypeError if a gene is missing or unknown."""
    return Genome(
        tuple(_conv_gene(**gene) for gene in data["conv"]),
        data["readout"],
        tuple(DenseGene(**gene) for gene in data["dense"]),
        tuple(sorted(data["hyper"].items())),
        tuple(RecurrentGene(**gene) for gene in data.get("recurrent", ())),
        data.get("decoder"),
        _graph_part(**data["graph"]) if "graph" in data else None,
    )


def _written(gene: Gene) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for field in fields(gene):
        value = getattr(gene, field.name)
        if field.default is MISSING or value != field.default:
            written[field.name] = list(value) if isinstance(value, tuple) else value
    return written


def _graph_part(*, embedding: int, blocks: Any, readout: GraphReadoutName) -> GraphPart:
    return GraphPart(embedding, tuple(GraphGene(**gene) for gene in blocks), readout)


def _conv_gene(*, branches: Any = (), **others: Any) -> ConvGene:
    return ConvGene(**others, branches=tuple(branches))
