"""A network as plain, frozen data, with its shape inference. No torch here.

Shapes are channels first and without the batch axis: ``(C, D, H, W)`` for a voxel volume, ``(C, T)``
for a sequence, ``(F,)`` for a feature vector. A linear head to ``outputs`` units is always appended.

The values on the nodes of a graph have the shape ``(C, nodes)``, a `NodeShape`: the layers of a vector
act on each node then, and `GraphConv` passes messages along the edges. The number of nodes is a
nominal one, for costs; real graphs have any number.

Layers nest: `Residual` and `Parallel` hold layers of their own. An empty branch is the identity, so
``Parallel(branches=((), layers))`` keeps its input beside what the layers make of it: the connection
of a DenseNet and, with `Pool` first and `Upsample` last, the skip connection of a U-Net.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    field_validator,
    model_serializer,
    model_validator,
)

from dmi_hpc.errors import NetworkError

Shape = tuple[int, ...]
ActivationName = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "softplus"]
NormName = Literal["batch", "group"]
PaddingName = Literal["zeros", "circular"]
PoolName = Literal["max", "mean"]
ReadoutName = Literal["flatten", "mean"]
CellName = Literal["gru", "lstm"]
MergeName = Literal["concat", "sum"]
GraphConvName = Literal["gated", "sum", "mean"]
GraphReadoutName = Literal["mean", "sum", "max"]


class Plain(BaseModel):
    """Frozen data without unknown keys.

    added: fields of later versions. They are written only where they differ from their defaults, so
    that files and identities of what an earlier version could say stay as they were.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    added: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        for name in self.added:
            if getattr(self, name) == type(self).model_fields[name].default:
                data.pop(name, None)
        return data


class GraphInput(Plain):
    """What the edges of the input graphs carry.

    edge_features: numbers on each edge; edges: nominal number of each graph, for costs alone.
    """

    edge_features: int = Field(ge=0)
    edges: int = Field(ge=1)


class NodeShape(tuple[int, ...]):
    """(channels, nodes): values on the nodes of a graph, the edges of which are as `graph` says."""

    graph: GraphInput

    def __new__(cls, channels: int, nodes: int, graph: GraphInput) -> NodeShape:
        shape = super().__new__(cls, (channels, nodes))
        shape.graph = graph
        return shape


class _Layer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Conv(_Layer):
    """Convolution over 1, 2 or 3 axes; "same" size, divided by `stride` (rounded up)."""

    kind: Literal["conv"] = "conv"
    filters: int = Field(ge=1)
    kernel: Literal[1, 3, 5, 7] = 3
    stride: int = Field(1, ge=1)
    padding: PaddingName = "zeros"


class Pool(_Layer):
    """Pooling with window = stride = `size`; a remainder at the end is dropped."""

    kind: Literal["pool"] = "pool"
    op: PoolName = "max"
    size: int = Field(2, ge=1)


class Upsample(_Layer):
    """A map brought to the extents `size` by repeating its nearest values."""

    kind: Literal["upsample"] = "upsample"
    size: Shape


class Norm(_Layer):
    """Batch normalisation, or group normalisation (at most 8 channels a group)."""

    kind: Literal["norm"] = "norm"
    op: NormName = "batch"


class Activation(_Layer):
    kind: Literal["activation"] = "activation"
    function: ActivationName = "relu"


class Dropout(_Layer):
    """`rate` is the share of units set to zero (not the keep rate)."""

    kind: Literal["dropout"] = "dropout"
    rate: float = Field(ge=0.0, lt=1.0)


class Readout(_Layer):
    """From a map over space to a vector: all values, or the mean of each channel."""

    kind: Literal["readout"] = "readout"
    op: ReadoutName = "flatten"


class Dense(_Layer):
    kind: Literal["dense"] = "dense"
    units: int = Field(ge=1)


class Recurrent(_Layer):
    """GRU or LSTM along the only axis of a sequence: (C, T) -> (C', T), or (C',) if `last`.

    C' is `units`, twice that if `bidirectional`. `last` gives the final state of each direction.
    """

    kind: Literal["recurrent"] = "recurrent"
    cell: CellName = "gru"
    units: int = Field(ge=1)
    bidirectional: bool = False
    last: bool = False


class GraphConv(_Layer):
    """Messages along the edges of a graph, Xie and Grossman, Phys. Rev. Lett. 120 (2018) 145301.

    gated (their equation 5): sum over the neighbours j of sigmoid(a) * softplus(b), with a and b, each
    of `channels`, linear in [node i, node j, edge i-j] and normalised, if `norm` says so, over all
    edges of a batch (each edge, if "group"). sum, mean (their equation 4): that over the neighbours of
    what is linear in [node j, edge i-j], plus what is linear in node i; these have no norm inside.
    """

    kind: Literal["graph_conv"] = "graph_conv"
    op: GraphConvName = "gated"
    channels: int = Field(ge=1)
    norm: NormName | None = None

    @model_validator(mode="after")
    def _norm_of_gates(self) -> GraphConv:
        if self.norm is not None and self.op != "gated":
            raise ValueError(f"found norm '{self.norm}' inside op '{self.op}', which has none")
        return self


class GraphReadout(_Layer):
    """From values on the nodes to one vector for each graph, channel by channel."""

    kind: Literal["graph_readout"] = "graph_readout"
    op: GraphReadoutName = "mean"


class Residual(_Layer):
    """x + layers(x), He et al. 2016; a projection of x, linear in its channels, where shapes differ.

    Extents may shrink: the projection then has the least stride that leads there.
    """

    kind: Literal["residual"] = "residual"
    layers: tuple[Layer, ...]

    @field_validator("layers")
    @classmethod
    def _some(cls, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        if not layers:
            raise ValueError("found no layers, expected at least one")
        return layers


class Parallel(_Layer):
    """Branches over the same input; their channels are concatenated, or their values summed."""

    kind: Literal["parallel"] = "parallel"
    branches: tuple[tuple[Layer, ...], ...]
    merge: MergeName = "concat"

    @field_validator("branches")
    @classmethod
    def _several(cls, branches: tuple[tuple[Layer, ...], ...]) -> tuple[tuple[Layer, ...], ...]:
        if len(branches) < 2:
            raise ValueError(f"found {len(branches)} branches, expected at least two")
        return branches


Layer = Annotated[
    Conv
    | Pool
    | Upsample
    | Norm
    | Activation
    | Dropout
    | Readout
    | Dense
    | Recurrent
    | GraphConv
    | GraphReadout
    | Residual
    | Parallel,
    Field(discriminator="kind"),
]
Residual.model_rebuild()
Parallel.model_rebuild()
LAYERS: TypeAdapter[tuple[Layer, ...]] = TypeAdapter(tuple[Layer, ...])


class NetworkSpec(Plain):
    """Input shape, layers, and the number of linear outputs.

    map_output: the outputs are channels of a map, one value of each per voxel of the last layer (a
    segmentation); else they are one vector. graph: the inputs are graphs, and the input shape is
    (features of a node, nominal number of nodes).
    """

    added = frozenset({"map_output", "graph"})

    input_shape: Shape
    layers: tuple[Layer, ...]
    outputs: int = Field(1, ge=1)
    map_output: bool = False
    graph: GraphInput | None = None

    @property
    def enters(self) -> Shape:
        """The shape that the first layer receives."""
        if self.graph is None or len(self.input_shape) != 2:
            return self.input_shape
        return NodeShape(*self.input_shape, self.graph)


def shapes(spec: NetworkSpec) -> tuple[Shape, ...]:
    """Shape after each layer (the head not included): ``len(spec.layers)`` entries.

    Raises NetworkError naming the first layer that cannot follow, or a missing readout.
    """
    if not spec.input_shape or any(n < 1 for n in spec.input_shape):
        raise NetworkError(f"input shape {spec.input_shape}: every extent must be at least 1")
    if spec.graph is not None and (len(spec.input_shape) != 2 or spec.map_output):
        raise NetworkError(
            f"a network of graphs needs an input (features of a node, nodes) and one vector as output; "
            f"found {spec.input_shape}, map_output = {str(spec.map_output).lower()}"
        )
    result = shapes_after(spec.layers, spec.enters)
    last = (spec.enters, *result)[-1]
    if isinstance(last, NodeShape):
        raise NetworkError(f"the last layer leaves values on nodes {last}: add a graph_readout")
    if len(last) > 1 and not spec.map_output:
        raise NetworkError(f"the last layer leaves a map {last}: add a readout")
    if len(last) == 1 and spec.map_output:
        raise NetworkError(f"map_output needs a map over space at the end, found {last[0]} values")
    return result


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
        case GraphConv() | GraphReadout():
            return _after_graph(layer, shape)
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


def _after_graph(layer: GraphConv | GraphReadout, shape: Shape) -> Shape:
    if not isinstance(shape, NodeShape):
        raise NetworkError(f"needs values on the nodes of a graph, found {shape}")
    if isinstance(layer, GraphReadout):
        return (shape[0],)
    return NodeShape(layer.channels, shape[1], shape.graph)


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
