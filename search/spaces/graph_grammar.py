"""From the genes of a network of graphs to its layers before the dense blocks, and back."""

from __future__ import annotations

from functools import lru_cache

from dmi_hpc.models.layers import SET2SET_STEPS
from dmi_hpc.models.spec import (
    Activation,
    Dense,
    Dropout,
    GraphConv,
    GraphReadout,
    Layer,
    Norm,
)
from search.spaces.cursor import Layers, around, opened
from search.spaces.genes import GraphGene, GraphPart

GENES_KEPT = 4096  # whose layers are not made again


def graph_layers(part: GraphPart) -> list[Layer]:
    """Embedding, graph blocks and readout."""
    layers: list[Layer] = [Dense(units=part.embedding)]
    for gene in part.blocks:
        layers += _block(gene)
    return [*layers, GraphReadout(op=part.readout)]


@lru_cache(GENES_KEPT)
def _block(gene: GraphGene) -> tuple[Layer, ...]:
    norm: tuple[Layer, ...] = (Norm(op=gene.norm),) if gene.norm else ()
    dropout: tuple[Layer, ...] = (Dropout(rate=gene.dropout),) if gene.dropout else ()
    activation = Activation(function=gene.activation)
    return (*around((_weights(gene), *norm), gene.skip), activation, *dropout)


def _weights(gene: GraphGene) -> GraphConv:
    inner = gene.norm if gene.op == "gated" else None
    return GraphConv(op=gene.op, channels=gene.channels, norm=inner)


def graph_part(layers: Layers) -> GraphPart:
    """Takes the layers up to the readout. Raises NetworkError if they are no such blocks."""
    embedding = layers.take(Dense)
    if embedding is None:
        raise layers.error("expected a dense layer, the embedding of the nodes")
    blocks: list[GraphGene] = []
    while (layer := layers.take_any(_begins)) is not None:
        blocks.append(_gene(layer, layers))
    readout = layers.take(GraphReadout)
    if readout is None:
        raise layers.error("expected a graph block or graph_readout")
    if readout != GraphReadout(op=readout.op):
        raise layers.refused(
            f"a searchable set2set has {SET2SET_STEPS} steps, found {readout.steps}"
        )
    return GraphPart(embedding.units, tuple(blocks), readout.op)


def _begins(layer: Layer) -> bool:
    return isinstance(opened(layer)[1][0], GraphConv)


def _gene(layer: Layer, layers: Layers) -> GraphGene:
    """The block that begins with `layer`, which was taken; takes the rest of it."""
    skip, inside = opened(layer)
    if skip is None:
        norm = layers.take(Norm)
    else:
        norm = inside[1] if len(inside) == 2 and isinstance(inside[1], Norm) else None
    at = layers.taken
    activation = layers.take(Activation)
    if activation is None:
        raise layers.error("expected an activation")
    weights = inside[0]
    assert isinstance(weights, GraphConv), weights
    gene = GraphGene(
        weights.op,
        weights.channels,
        norm.op if norm else None,
        activation.function,
        layers.dropout(),
        skip,
    )
    if _weights(gene) != weights or len(inside) > 1 + (skip is not None and norm is not None):
        raise layers.refused(
            "a searchable graph block is graph_conv, [norm], and a gated one has the same norm inside",
            at=at,
        )
    return gene
