"""A network as plain, frozen data, with its shape inference. No torch here.

Shapes are channels first and without the batch axis: ``(C, D, H, W)`` for a voxel volume, ``(C, T)``
for a sequence, ``(F,)`` for a feature vector. A linear head to ``outputs`` units is always appended.

The values on the nodes of a graph have the shape ``(C, nodes)``, a `NodeShape`: the layers of a vector
act on each node then, and `GraphConv` passes messages along the edges. The number of nodes is a
nominal one, for costs; real graphs have any number.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from pydantic import Field

from dmi_hpc.errors import NetworkError
from dmi_hpc.models.layers import (
    LAYERS,
    Activation,
    ActivationName,
    CellName,
    CFConv,
    Conv,
    Dense,
    Dropout,
    Embedding,
    GraphConv,
    GraphConvName,
    GraphReadout,
    GraphReadoutName,
    Layer,
    MergeName,
    MessagePassing,
    Norm,
    NormName,
    PaddingName,
    Parallel,
    Plain,
    Pool,
    PoolName,
    Readout,
    ReadoutName,
    Recurrent,
    Residual,
    Shape,
    Take,
    UnitLength,
    Upsample,
)

__all__ = [
    "LAYERS",
    "Activation",
    "ActivationName",
    "CFConv",
    "CellName",
    "Conv",
    "Dense",
    "Dropout",
    "Embedding",
    "GraphConv",
    "GraphConvName",
    "GraphInput",
    "GraphReadout",
    "GraphReadoutName",
    "Layer",
    "MergeName",
    "MessagePassing",
    "NetworkSpec",
    "NodeShape",
    "Norm",
    "NormName",
    "PaddingName",
    "Parallel",
    "Plain",
    "Pool",
    "PoolName",
    "RadialBasis",
    "Readout",
    "ReadoutName",
    "Recurrent",
    "Residual",
    "Shape",
    "Take",
    "UnitLength",
    "Upsample",
    "projection_stride",
    "shape_after",
    "shapes",
    "shapes_after",
]


class GraphInput(Plain):
    """What the edges of the input graphs carry.

    edge_features: numbers on each edge; edges: nominal number of each graph, and kinds: of edges with
    different features in all graphs together, where they are few (bonds); both for costs alone.
    """

    added = frozenset({"kinds"})

    edge_features: int = Field(ge=0)
    edges: int = Field(ge=1)
    kinds: int | None = Field(None, ge=1)


class NodeShape(tuple[int, ...]):
    """(channels, nodes): values on the nodes of a graph, the edges of which are as `graph` says."""

    graph: GraphInput

    def __new__(cls, channels: int, nodes: int, graph: GraphInput) -> NodeShape:
        shape = super().__new__(cls, (channels, nodes))
        shape.graph = graph
        return shape


class RadialBasis(Plain):
    """What layers see of edges that are vectors, from node i to node j, in angstrom.

    The edge features are `count` Gaussians of the length, centred from 0 to `cutoff`, with the
    standard deviation `width`; all angstrom. Each edge has the weight (1 + cos(pi length / cutoff)) / 2,
    0 beyond: what it adds to a node vanishes where it comes into range.
    """

    cutoff: float = Field(gt=0)
    count: int = Field(ge=2)
    width: float = Field(gt=0)


class NetworkSpec(Plain):
    """Input shape, layers, and the number of linear outputs.

    map_output: the outputs are channels of a map, one value of each per voxel of the last layer (a
    segmentation); else they are one vector. graph: the inputs are graphs, and the input shape is
    (features of a node, nominal number of nodes). standardize: of vectors; the network first subtracts
    the mean of each feature and divides by its deviation, both kept with its weights. basis: the edges
    of the graphs are vectors (3 features), layers see them in this basis. forces: the one output is the
    energy per node, and minus the gradient of a graph's energy by the positions of its nodes comes with
    it.
    """

    added = frozenset({"map_output", "graph", "standardize", "basis", "forces"})

    input_shape: Shape
    layers: tuple[Layer, ...]
    outputs: int = Field(1, ge=1)
    map_output: bool = False
    graph: GraphInput | None = None
    standardize: bool = False
    basis: RadialBasis | None = None
    forces: bool = False

    @property
    def enters(self) -> Shape:
        """The shape that the first layer receives."""
        if self.graph is None or len(self.input_shape) != 2:
            return self.input_shape
        graph = self.graph
        if self.basis is not None:
            graph = GraphInput(edge_features=self.basis.count, edges=graph.edges)
        return NodeShape(*self.input_shape, graph)


def shapes(spec: NetworkSpec) -> tuple[Shape, ...]:
    """Shape after each layer (the head not included): ``len(spec.layers)`` entries.

    Raises NetworkError naming the first layer that cannot follow, or a missing readout.
    """
    _require_consistent(spec)
    result = shapes_after(spec.layers, spec.enters)
    last = (spec.enters, *result)[-1]
    if isinstance(last, NodeShape):
        raise NetworkError(f"the last layer leaves values on nodes {last}: add a graph_readout")
    if len(last) > 1 and not spec.map_output:
        raise NetworkError(f"the last layer leaves a map {last}: add a readout")
    if len(last) == 1 and spec.map_output:
        raise NetworkError(f"map_output needs a map over space at the end, found {last[0]} values")
    return result


def _require_consistent(spec: NetworkSpec) -> None:
    """Raise NetworkError unless the fields of `spec` fit each other."""
    if not spec.input_shape or any(n < 1 for n in spec.input_shape):
        raise NetworkError(f"input shape {spec.input_shape}: every extent must be at least 1")
    if spec.graph is not None and (len(spec.input_shape) != 2 or spec.map_output):
        raise NetworkError(
            f"a network of graphs needs an input (features of a node, nodes) and one vector as output; "
            f"found {spec.input_shape}, map_output = {str(spec.map_output).lower()}"
        )
    if spec.standardize and len(spec.input_shape) != 1:
        raise NetworkError(f"standardize needs a vector as input, found {spec.input_shape}")
    if spec.standardize and _embeds(spec.layers):
        raise NetworkError("standardize would change the whole numbers that an embedding reads")
    if spec.basis is not None and (spec.graph is None or spec.graph.edge_features != 3):
        found = "no graphs" if spec.graph is None else f"{spec.graph.edge_features} edge features"
        raise NetworkError(f"a radial basis needs graphs with vectors as edges, found {found}")
    if spec.forces and (spec.basis is None or spec.outputs != 1):
        basis = "no basis" if spec.basis is None else "a basis"
        raise NetworkError(f"forces need a basis and 1 output, found {basis} and {spec.outputs}")


def _embeds(layers: Sequence[Layer]) -> bool:
    return any(
        isinstance(layer, Embedding)
        or (isinstance(layer, Residual) and _embeds(layer.layers))
        or (isinstance(layer, Parallel) and any(map(_embeds, layer.branches)))
        for layer in layers
    )


def shapes_after(layers: Sequence[Layer], shape: Shape) -> tuple[Shape, ...]:
    """Shape after each of `layers`, the first of which receives `shape`. Raises NetworkError."""
    result: list[Shape] = []
    for position, layer in enumerate(layers):
        try:
            shape = _after(layer, shape)
        except NetworkError as error:
            raise NetworkError(f"layer {position + 1} ({layer.kind}): {error}") from None
        result.append(shape)
    return tuple(result)


def shape_after(layers: Sequence[Layer], shape: Shape) -> Shape:
    """Shape after the last of `layers`; `shape` itself if there are none. Raises NetworkError."""
    return (shape, *shapes_after(layers, shape))[-1]


def projection_stride(before: Shape, after: Shape) -> int | None:
    """Least stride of a convolution of width 1 from the extents of `before` to those of `after`."""
    if len(before) != len(after):
        return None
    strides = range(1, max(before[1:], default=1) + 1)
    pairs = list(zip(before[1:], after[1:], strict=True))
    return next((s for s in strides if all(-(-n // s) == m for n, m in pairs)), None)


def _after(layer: Layer, shape: Shape) -> Shape:
    """Shape after `layer`; raises NetworkError with the reason alone."""
    match layer:
        case Norm() | Activation() | Dropout():
            return shape
        case GraphConv() | MessagePassing() | CFConv() | GraphReadout():
            return _after_graph(layer, shape)
        case Take() | UnitLength() | Embedding():
            return _after_vector(layer, shape)
        case Conv() | Pool() | Upsample() | Readout() | Recurrent() if isinstance(shape, NodeShape):
            raise NetworkError(f"cannot follow values on the nodes of a graph {shape}")
        case Conv() | Pool() | Upsample() | Readout() | Recurrent() if len(shape) == 1:
            raise NetworkError(f"needs a map over space, found a vector of {shape[0]}")
        case Conv():
            _require_padding(layer, shape[1:])
            if layer.stride == 1:
                return (layer.filters, *shape[1:])
            return (layer.filters, *(-(-n // layer.stride) for n in shape[1:]))
        case Pool():
            if any(n < layer.size for n in shape[1:]):
                raise NetworkError(f"pooling by {layer.size} of the map {shape[1:]}")
            return (shape[0], *(n // layer.size for n in shape[1:]))
        case Upsample():
            if len(layer.size) != len(shape) - 1 or any(n < 1 for n in layer.size):
                raise NetworkError(f"size {layer.size} of a map {shape[1:]}")
            return (shape[0], *layer.size)
        case Readout():
            return (prod(shape),) if layer.op == "flatten" else (shape[0],)
        case Recurrent():
            return _after_recurrent(layer, shape)
        case Residual():
            return _after_residual(layer, shape)
        case Parallel():
            return _after_parallel(layer, shape)
        case Dense():
            if isinstance(shape, NodeShape):
                return NodeShape(layer.units, shape[1], shape.graph)
            if len(shape) > 1:
                raise NetworkError(f"a dense layer needs a readout before it, found map {shape}")
            return (layer.units,)


def _after_graph(layer: GraphConv | MessagePassing | CFConv | GraphReadout, shape: Shape) -> Shape:
    if not isinstance(shape, NodeShape):
        raise NetworkError(f"needs values on the nodes of a graph, found {shape}")
    if isinstance(layer, GraphReadout):
        return (2 * shape[0],) if layer.op == "set2set" else (shape[0],)
    if isinstance(layer, GraphConv):
        return NodeShape(layer.channels, shape[1], shape.graph)
    if shape.graph.edge_features < 1:
        raise NetworkError("needs features on the edges of the graphs, found none")
    if isinstance(layer, CFConv):
        return NodeShape(layer.channels, shape[1], shape.graph)
    if shape[0] != layer.units:
        raise NetworkError(
            f"needs {layer.units} channels, as many as units, found {shape[0]}: put a dense layer of "
            f"{layer.units} before it"
        )
    return shape


def _after_vector(layer: Take | UnitLength | Embedding, shape: Shape) -> Shape:
    if isinstance(layer, UnitLength) and isinstance(shape, NodeShape):
        return shape
    if len(shape) > 1:
        raise NetworkError(f"needs a vector, found {shape}")
    if isinstance(layer, Take):
        if layer.stop > shape[0]:
            raise NetworkError(f"takes up to {layer.stop} of a vector of {shape[0]}")
        return (layer.stop - layer.start,)
    return (layer.units, shape[0]) if isinstance(layer, Embedding) else shape


def _require_padding(layer: Conv, extents: Shape) -> None:
    if layer.padding == "circular" and any(n < layer.kernel // 2 for n in extents):
        raise NetworkError(f"a circular kernel of {layer.kernel} is too wide for the map {extents}")


def _after_recurrent(layer: Recurrent, shape: Shape) -> Shape:
    if len(shape) != 2:
        raise NetworkError(f"needs a sequence (channels, steps), found a map {shape}")
    channels = layer.units * (2 if layer.bidirectional else 1)
    return (channels,) if layer.last else (channels, shape[1])


def _after_residual(layer: Residual, shape: Shape) -> Shape:
    after = shape_after(layer.layers, shape)
    if projection_stride(shape, after) is None:
        raise NetworkError(
            f"no stride leads from its input {shape} to its output {after}: resize or read out "
            "after it"
        )
    return after


def _after_parallel(layer: Parallel, shape: Shape) -> Shape:
    ends: list[Shape] = []
    for number, branch in enumerate(layer.branches, start=1):
        try:
            ends.append(shape_after(branch, shape))
        except NetworkError as error:
            raise NetworkError(f"branch {number}: {error}") from None
    concat = layer.merge == "concat"
    if len({end[1:] if concat else end for end in ends}) > 1:
        what = "extents" if concat else "shapes"
        raise NetworkError(f"its branches end in different {what}: {', '.join(map(str, ends))}")
    channels = sum(end[0] for end in ends) if concat else ends[0][0]
    first = ends[0]
    if isinstance(first, NodeShape):
        return NodeShape(channels, first[1], first.graph)
    return (channels, *first[1:])
