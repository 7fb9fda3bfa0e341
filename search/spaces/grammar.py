"""From genes to the layers of a network and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from dmi_hpc.errors import NetworkError
from dmi_hpc.models.space import DecoderName, HyperValue, NetworkSpace
from dmi_hpc.models.spec import (
    Activation,
    ActivationName,
    Conv,
    Dense,
    Dropout,
    Layer,
    NetworkSpec,
    Norm,
    NormName,
    Parallel,
    Pool,
    Readout,
    Recurrent,
    Shape,
    Upsample,
    shapes,
)
from search.spaces.cursor import GRAMMAR, Layers, around
from search.spaces.genes import ConvGene, DenseGene, Genome, RecurrentGene
from search.spaces.graph_grammar import graph_layers, graph_part

POOL_SIZE = 2
GENES_KEPT = 4096  # whose layers are not made again: children share most genes with their parents


def decode(genome: Genome, network: NetworkSpace) -> NetworkSpec:
    """The network of `genome`. Its layers fit each other if `genome` is in canonical form."""
    if network.map_output:
        layers = _encoder_decoder(genome.conv, genome.decoder, network.input_shape[1:])
    else:
        layers = _to_vector(genome)
    return NetworkSpec(
        input_shape=network.input_shape,
        layers=tuple(layers),
        outputs=network.outputs,
        map_output=network.map_output,
        graph=network.graph,
        standardize=network.standardize,
    )


def _to_vector(genome: Genome) -> list[Layer]:
    layers: list[Layer] = []
    for conv in genome.conv:
        layers += _conv_layers(conv)
        if conv.pool:
            layers.append(Pool(op=conv.pool, size=POOL_SIZE))
        layers += _dropout(conv.dropout)
    for number, cell in enumerate(genome.recurrent, start=1):
        last = genome.readout == "last" and number == len(genome.recurrent)
        layers.append(
            Recurrent(cell=cell.cell, units=cell.units, bidirectional=cell.bidirectional, last=last)
        )
        layers += _dropout(cell.dropout)
    if genome.graph is not None:
        layers += graph_layers(genome.graph)
    if genome.readout and genome.readout != "last":
        layers.append(Readout(op=genome.readout))
    for dense in genome.dense:
        layers += _dense_layers(dense)
    return layers


def _encoder_decoder(
    genes: Sequence[ConvGene], decoder: DecoderName | None, extents: Shape
) -> list[Layer]:
    """Blocks of one level, then, between a pool and its upsampling, the levels below it."""
    if not genes:
        return []
    gene, rest = genes[0], genes[1:]
    block, dropout = _conv_layers(gene), _dropout(gene.dropout)
    if gene.pool is None:
        return [*block, *dropout, *_encoder_decoder(rest, decoder, extents)]
    below: tuple[Layer, ...] = (
        Pool(op=gene.pool, size=POOL_SIZE),
        *dropout,
        *_encoder_decoder(rest, decoder, tuple(n // POOL_SIZE for n in extents)),
        Upsample(size=extents),
    )
    across = around(below, "dense") if decoder == "skip" else below
    return [*block, *across, *block]


@lru_cache(GENES_KEPT)
def _conv_layers(gene: ConvGene) -> tuple[Layer, ...]:
    """A block up to its activation."""
    return around((_weights(gene), *_after_weights(gene.norm, gene.activation)), gene.skip)


@lru_cache(GENES_KEPT)
def _dense_layers(gene: DenseGene) -> tuple[Layer, ...]:
    weights = Dense(units=gene.units)
    inside = (weights, *_after_weights(gene.norm, gene.activation))
    return (*around(inside, gene.skip), *_dropout(gene.dropout))


def _weights(gene: ConvGene) -> Layer:
    """A convolution, or parallel ones that share the filters evenly, the larger shares first."""
    parts = len(gene.kernels)
    found = [
        Conv(
            filters=gene.filters // parts + (i < gene.filters % parts),
            kernel=kernel,
            padding=gene.padding,
        )
        for i, kernel in enumerate(gene.kernels)
    ]
    return found[0] if parts == 1 else Parallel(branches=tuple((conv,) for conv in found))


def _after_weights(norm: NormName | None, activation: ActivationName) -> list[Layer]:
    normalisation: list[Layer] = [Norm(op=norm)] if norm else []
    return [*normalisation, Activation(function=activation)]


def _dropout(rate: float) -> list[Layer]:
    return [Dropout(rate=rate)] if rate else []


def encode(
    spec: NetworkSpec, network: NetworkSpace, hyper: Mapping[str, HyperValue] | None = None
) -> Genome:
    """Genome of a known network; its sizes may lie outside the choices of the space.

    Raises NetworkError if `spec` cannot be built, has another input or output than `network`, or
    its layers do not follow the block grammar (see ``NetworkSpace``).
    """
    shapes(spec)
    for name in ("input_shape", "outputs", "map_output", "graph", "standardize"):
        found, expected = getattr(spec, name), getattr(network, name)
        if found != expected:
            raise NetworkError(f"{name} of the network is {found}, the search space has {expected}")
    if spec.basis is not None:
        raise NetworkError("networks in a radial basis, of energies and forces, cannot be searched")
    pairs = tuple(sorted((hyper or {}).items()))
    layers = Layers(spec.layers)
    if network.graph is not None:
        part = graph_part(layers)
        genome = Genome((), None, _dense_genes(layers), (), graph=part)
    else:
        genome = _map_genome(layers, network) if network.map_output else _vector_genome(layers)
    layers.require_end()
    genome = replace(genome, hyper=pairs)
    if network.map_output and decode(genome, network) != spec:
        raise NetworkError(f"its layers are no symmetric encoder-decoder. {GRAMMAR}")
    return genome


def _vector_genome(layers: Layers) -> Genome:
    conv: list[ConvGene] = []
    while (gene := _conv_gene(layers)) is not None:
        pool = layers.take(Pool)
        if pool and pool.size != POOL_SIZE:
            raise layers.refused(f"a searchable pool has size {POOL_SIZE}, found {pool.size}")
        conv.append(replace(gene, pool=pool.op if pool else None, dropout=layers.dropout()))
    recurrent: list[RecurrentGene] = []
    last = False
    while (cell := layers.take(Recurrent)) is not None:
        last = cell.last
        recurrent.append(RecurrentGene(cell.cell, cell.units, cell.bidirectional, layers.dropout()))
    readout = layers.take(Readout)
    op = "last" if last else readout.op if readout else None
    return Genome(tuple(conv), op, _dense_genes(layers), (), tuple(recurrent))


def _dense_genes(layers: Layers) -> tuple[DenseGene, ...]:
    dense: list[DenseGene] = []
    while (block := layers.block(lambda layer: isinstance(layer, Dense))) is not None:
        assert isinstance(block.weights, Dense)
        units, rate = block.weights.units, layers.dropout()
        dense.append(DenseGene(units, block.norm, block.activation, rate, block.skip))
    return tuple(dense)


def _map_genome(layers: Layers, network: NetworkSpace) -> Genome:
    decoders: list[DecoderName] = []
    conv = tuple(_level(layers, decoders))
    decoder = decoders[0] if decoders else network.decoders[0]
    return Genome(conv, None, (), (), decoder=decoder)


def _level(layers: Layers, decoders: list[DecoderName]) -> list[ConvGene]:
    """Blocks of one level of an encoder-decoder and of those below it."""
    genes: list[ConvGene] = []
    while (gene := _conv_gene(layers)) is not None:
        decoder, below = layers.below()
        pool = below.take(Pool)
        if pool is None:
            genes.append(replace(gene, dropout=layers.dropout()))
            continue
        decoders.append(decoder)
        genes.append(replace(gene, pool=pool.op, dropout=below.dropout()))
        genes += _level(below, decoders)
        if below.take(Upsample) is None:
            raise below.error("expected the upsampling after its pool")
        if _conv_gene(layers) != gene:
            raise layers.error("expected the block before the pool once more")
        break
    return genes


def _conv_gene(layers: Layers) -> ConvGene | None:
    """The next convolution block up to its activation."""
    block = layers.block(lambda layer: bool(_convolutions(layer)))
    if block is None:
        return None
    found = _convolutions(block.weights)
    first, *others = found
    gene = ConvGene(
        filters=sum(conv.filters for conv in found),
        kernel=first.kernel,
        padding=first.padding,
        norm=block.norm,
        activation=block.activation,
        pool=None,
        dropout=0.0,
        skip=block.skip,
        branches=tuple(conv.kernel for conv in others),
    )
    if _convolutions(_weights(gene)) != found:
        raise layers.refused(
            "a searchable convolution has stride 1; parallel ones have ascending kernels, equal "
            f"padding and even shares of the filters, larger ones first; found {_told(found)}",
            at=block.at,
        )
    return gene


def _told(convolutions: Sequence[Conv]) -> str:
    return "; ".join(
        f"{c.filters} filters, kernel {c.kernel}, stride {c.stride}, padding {c.padding}"
        for c in convolutions
    )


def _convolutions(layer: Layer) -> tuple[Conv, ...]:
    """Of a convolution or of parallel ones; () of another layer."""
    match layer:
        case Conv():
            return (layer,)
        case Parallel(merge="concat"):
            single = [branch[0] for branch in layer.branches if len(branch) == 1]
            found = tuple(conv for conv in single if isinstance(conv, Conv))
            return found if len(found) == len(layer.branches) else ()
        case _:
            return ()
