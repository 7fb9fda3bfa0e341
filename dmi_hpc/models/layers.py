"""The layers that a network is made of, as plain, frozen data. No torch here.

Layers nest: `Residual` and `Parallel` hold layers of their own. An empty branch is the identity, so
``Parallel(branches=((), layers))`` keeps its input beside what the layers make of it: the connection
of a DenseNet and, with `Pool` first and `Upsample` last, the skip connection of a U-Net.
"""

from __future__ import annotations

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

Shape = tuple[int, ...]
ActivationName = Literal[
    "relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "softplus", "shifted_softplus"
]
NormName = Literal["batch", "group"]
PaddingName = Literal["zeros", "circular"]
PoolName = Literal["max", "mean"]
ReadoutName = Literal["flatten", "mean"]
CellName = Literal["gru", "lstm"]
MergeName = Literal["concat", "sum"]
GraphConvName = Literal["gated", "sum", "mean", "attention"]
GraphReadoutName = Literal["mean", "sum", "max", "attention", "set2set"]
SET2SET_STEPS = 6


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


class Conv(Plain):
    """Convolution over 1, 2 or 3 axes; "same" size, divided by `stride` (rounded up)."""

    kind: Literal["conv"] = "conv"
    filters: int = Field(ge=1)
    kernel: Literal[1, 3, 5, 7] = 3
    stride: int = Field(1, ge=1)
    padding: PaddingName = "zeros"


class Pool(Plain):
    """Pooling with window = stride = `size`; a remainder at the end is dropped."""

    kind: Literal["pool"] = "pool"
    op: PoolName = "max"
    size: int = Field(2, ge=1)


class Upsample(Plain):
    """A map brought to the extents `size` by repeating its nearest values."""

    kind: Literal["upsample"] = "upsample"
    size: Shape


class Norm(Plain):
    """Batch normalisation, or group normalisation (at most 8 channels a group)."""

    kind: Literal["norm"] = "norm"
    op: NormName = "batch"


class Activation(Plain):
    """shifted_softplus: log(1/2 + exp(x)/2), Schuett et al., arXiv:1706.08566."""

    kind: Literal["activation"] = "activation"
    function: ActivationName = "relu"


class Dropout(Plain):
    """`rate` is the share of units set to zero (not the keep rate)."""

    kind: Literal["dropout"] = "dropout"
    rate: float = Field(ge=0.0, lt=1.0)


class Readout(Plain):
    """From a map over space to a vector: all values, or the mean of each channel."""

    kind: Literal["readout"] = "readout"
    op: ReadoutName = "flatten"


class Dense(Plain):
    kind: Literal["dense"] = "dense"
    units: int = Field(ge=1)


class Take(Plain):
    """Entries `start` up to, without, `stop` of a vector: (F,) -> (stop - start,)."""

    kind: Literal["take"] = "take"
    start: int = Field(ge=0)
    stop: int = Field(ge=1)

    @model_validator(mode="after")
    def _some(self) -> Take:
        if self.start >= self.stop:
            raise ValueError(f"found start {self.start}, stop {self.stop}: expected start < stop")
        return self


class UnitLength(Plain):
    """A vector, or the values on each node, divided by their Euclidean norm; zeros stay zeros."""

    kind: Literal["unit_length"] = "unit_length"


class Embedding(Plain):
    """A learned vector of each whole number from 0 up to, without, `entries`: (T,) -> (units, T).

    The numbers are held as float. Others are an IndexError (on a GPU, a failed assertion).
    """

    kind: Literal["embedding"] = "embedding"
    entries: int = Field(ge=1)
    units: int = Field(ge=1)


class Recurrent(Plain):
    """GRU or LSTM along the only axis of a sequence: (C, T) -> (C', T), or (C',) if `last`.

    C' is `units`, twice that if `bidirectional`. `last` gives the final state of each direction.
    """

    kind: Literal["recurrent"] = "recurrent"
    cell: CellName = "gru"
    units: int = Field(ge=1)
    bidirectional: bool = False
    last: bool = False


class GraphConv(Plain):
    """Messages along the edges of a graph, Xie and Grossman, Phys. Rev. Lett. 120 (2018) 145301.

    gated (their equation 5): sum over the neighbours j of sigmoid(a) * softplus(b), with a and b, each
    of `channels`, linear in [node i, node j, edge i-j] and normalised, if `norm` says so, over all
    edges of a batch (each edge, if "group"). sum, mean (their equation 4): that over the neighbours of
    what is linear in [node j, edge i-j], plus what is linear in node i.

    attention: mean over the neighbours of a network with one hidden layer of [node i, node j, edge
    i-j], weighted by the softmax over them of another such network, in which neighbour j counts as
    often as its weight says; the weighted soft attention of Goodall and Lee, Nat. Commun. 11 (2020)
    6280, with one head.
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


class MessagePassing(Plain):
    """`steps` of the network of Gilmer et al. 2017 (arXiv:1704.01212) on nodes with `units` channels.

    A node receives the sum over its neighbours j of A(edge i-j) times node j and takes it into its
    state by a GRU; all steps share their weights. A, a matrix (units, units), is what a network with
    one layer of `hidden` units makes of the edge.
    """

    kind: Literal["message_passing"] = "message_passing"
    units: int = Field(ge=1)
    steps: int = Field(3, ge=1)
    hidden: int = Field(128, ge=1)


class CFConv(Plain):
    """Interaction of SchNet up to its residual connection, Schuett et al. 2017 (arXiv:1706.08566).

    Sum over the neighbours j of node j, linear in `filters` channels, times a filter that a network
    makes of the edge; then two dense layers of `channels`, a shifted softplus between them.
    """

    kind: Literal["cfconv"] = "cfconv"
    channels: int = Field(ge=1)
    filters: int = Field(ge=1)


class GraphReadout(Plain):
    """From values on the nodes to one vector for each graph.

    mean, sum, max: of each channel; the mean counts nodes as often as their weights say. attention:
    the mean weighted by the softmax over the nodes of a network with one hidden layer, in which
    nodes count as often as their weights say. set2set: `steps` of Vinyals et al. 2015
    (arXiv:1511.06391), with twice as many channels.
    """

    added = frozenset({"steps"})

    kind: Literal["graph_readout"] = "graph_readout"
    op: GraphReadoutName = "mean"
    steps: int = Field(SET2SET_STEPS, ge=1)

    @model_validator(mode="after")
    def _steps_of_set2set(self) -> GraphReadout:
        if self.steps != SET2SET_STEPS and self.op != "set2set":
            raise ValueError(f"found steps {self.steps} of op '{self.op}', which has none")
        return self


class Residual(Plain):
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


class Parallel(Plain):
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
    | Take
    | UnitLength
    | Embedding
    | Recurrent
    | GraphConv
    | MessagePassing
    | CFConv
    | GraphReadout
    | Residual
    | Parallel,
    Field(discriminator="kind"),
]
Residual.model_rebuild()
Parallel.model_rebuild()
LAYERS: TypeAdapter[tuple[Layer, ...]] = TypeAdapter(tuple[Layer, ...])
