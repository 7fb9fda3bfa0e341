"""From a specification to a torch module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn

from dmi_hpc.models.graph_layers import (
    AttentionConv,
    AttentionReadout,
    EdgeNetwork,
    GatedConv,
    GraphNetwork,
    GraphRow,
    NodeBranches,
    NodeNorm,
    NodeReadout,
    NodeSkip,
    PlainConv,
    Set2Set,
)
from dmi_hpc.models.potentials import (
    ContinuousFilterConv,
    ForceNetwork,
    PotentialNetwork,
    ShiftedSoftplus,
)
from dmi_hpc.models.spec import (
    Activation,
    ActivationName,
    CFConv,
    Conv,
    Dense,
    Dropout,
    Embedding,
    GraphConv,
    GraphReadout,
    Layer,
    MessagePassing,
    NetworkSpec,
    NodeShape,
    Norm,
    Parallel,
    Pool,
    Readout,
    Recurrent,
    Residual,
    Shape,
    Take,
    UnitLength,
    Upsample,
    projection_stride,
    shape_after,
    shapes,
    shapes_after,
)
from dmi_hpc.models.vectors import STANDARDIZE, EmbeddingLayer, Part, Standardize, UnitVectors

_CONV: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_MAX: dict[int, Callable[..., nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_MEAN: dict[int, Callable[..., nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_BATCH: dict[int, Callable[..., nn.Module]] = {
    0: nn.BatchNorm1d,
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}
_ACTIVATION: dict[ActivationName, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "shifted_softplus": ShiftedSoftplus,
}
GROUP_CHANNELS = 8


class SpatialMean(nn.Module):
    """Mean of each channel over all spatial axes: (N, C, ...) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class SkipConnection(nn.Module):
    """projection(x) + layers(x)."""

    def __init__(self, layers: nn.Sequential, projection: nn.Module) -> None:
        super().__init__()
        self.layers, self.projection = layers, projection

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.projection(x) + self.layers(x)
        return total


class Branches(nn.Module):
    """Branches over the same input, concatenated along the channels or summed."""

    def __init__(self, branches: Sequence[nn.Sequential], *, concat: bool) -> None:
        super().__init__()
        self.branches, self._concat = nn.ModuleList(branches), concat

    def forward(self, x: Tensor) -> Tensor:
        ends: list[Tensor] = [branch(x) for branch in self.branches]
        return torch.cat(ends, 1) if self._concat else sum(ends[1:], ends[0])


class RecurrentLayer(nn.Module):
    """GRU or LSTM with the channels first: (N, C, T) -> (N, C', T), or (N, C') of the final states."""

    def __init__(self, cell: nn.GRU | nn.LSTM, *, last: bool) -> None:
        super().__init__()
        self.cell, self._last = cell, last

    def forward(self, x: Tensor) -> Tensor:
        steps, states = self.cell(x.transpose(1, 2))
        if self._last:
            # (directions, N, units); an LSTM has its cells' states beside them
            hidden: Tensor = states[0] if isinstance(self.cell, nn.LSTM) else states
            return hidden.transpose(0, 1).flatten(1)
        outputs: Tensor = steps.transpose(1, 2)
        return outputs


def build(spec: NetworkSpec) -> nn.Sequential:
    """Module of `spec`: (N, *input_shape) float -> (N, outputs), or (N, outputs, *extents) of a map;
    `Graphs` of N graphs -> (N, outputs), or, with forces, -> `EnergyForces`.

    One child for each layer, then the head, named "0", "1" and so on; before them, if the spec says
    so, "standardize". Weights come from torch's global generator: seed it first. Raises NetworkError
    if the layers cannot follow each other.
    """
    last = (spec.enters, *shapes(spec))[-1]
    head: nn.Module
    if spec.map_output:
        head = _CONV[len(last) - 1](last[0], spec.outputs, 1)
    else:
        head = nn.Linear(prod(last), spec.outputs)
    row = [*_row(spec.layers, spec.enters), head]
    if spec.basis is not None:
        return (ForceNetwork if spec.forces else PotentialNetwork)(row, spec.basis)
    if spec.graph is not None:
        return GraphNetwork(*row)
    if not spec.standardize:
        return nn.Sequential(*row)
    named = {str(number): module for number, module in enumerate(row)}
    return nn.Sequential(OrderedDict({STANDARDIZE: Standardize(*spec.input_shape)} | named))


def _row(layers: Sequence[Layer], shape: Shape) -> nn.Sequential:
    """Modules of `layers` in a row; without any, the identity."""
    befores = (shape, *shapes_after(layers, shape))
    modules = (_module(layer, befores[i]) for i, layer in enumerate(layers))
    return GraphRow(*modules) if isinstance(shape, NodeShape) else nn.Sequential(*modules)


def groups_of(channels: int) -> int:
    """Number of groups for group normalisation: the most with at least 8 channels each, if equal."""
    wanted = max(1, channels // GROUP_CHANNELS)
    return next(g for g in range(wanted, 0, -1) if channels % g == 0)


def _module(layer: Layer, shape: Shape) -> nn.Module:
    channels, axes = shape[0], len(shape) - 1
    match layer:
        case Conv():
            return _CONV[axes](
                channels,
                layer.filters,
                layer.kernel,
                stride=layer.stride,
                padding=layer.kernel // 2,
                padding_mode=layer.padding,
            )
        case Pool():
            return (_MAX if layer.op == "max" else _MEAN)[axes](layer.size)
        case Norm():
            if layer.op == "group":
                return nn.GroupNorm(groups_of(channels), channels)
            return NodeNorm(channels) if isinstance(shape, NodeShape) else _BATCH[axes](channels)
        case Activation():
            return _ACTIVATION[layer.function]()
        case Dropout():
            return nn.Dropout(layer.rate)
        case Readout():
            return nn.Flatten() if layer.op == "flatten" else SpatialMean()
        case Dense():
            return nn.Linear(channels, layer.units)
        case Take():
            return Part(layer.start, layer.stop)
        case UnitLength():
            return UnitVectors()
        case Embedding():
            return EmbeddingLayer(layer.entries, layer.units)
        case Upsample():
            # nearest: its backward pass is deterministic on GPUs too
            return nn.Upsample(layer.size, mode="nearest")
        case Recurrent():
            cell = nn.GRU if layer.cell == "gru" else nn.LSTM
            return RecurrentLayer(
                cell(channels, layer.units, batch_first=True, bidirectional=layer.bidirectional),
                last=layer.last,
            )
        case GraphConv() | MessagePassing() | CFConv():
            assert isinstance(shape, NodeShape), shape
            return _on_edges(layer, channels, shape.graph.edge_features)
        case GraphReadout():
            return _graph_readout(layer, channels)
        case Residual():
            after = shape_after(layer.layers, shape)
            if isinstance(shape, NodeShape):
                return NodeSkip(_row(layer.layers, shape), _projection(shape, after))
            return SkipConnection(_row(layer.layers, shape), _projection(shape, after))
        case Parallel():
            branches = [_row(branch, shape) for branch in layer.branches]
            kind = NodeBranches if isinstance(shape, NodeShape) else Branches
            return kind(branches, concat=layer.merge == "concat")


def _on_edges(
    layer: GraphConv | MessagePassing | CFConv, channels: int, edge_features: int
) -> nn.Module:
    match layer:
        case MessagePassing():
            return EdgeNetwork(edge_features, layer.units, layer.steps, layer.hidden)
        case CFConv():
            return ContinuousFilterConv(channels, edge_features, layer.channels, layer.filters)
        case GraphConv(op="attention"):
            return AttentionConv(channels, edge_features, layer.channels)
        case GraphConv(op="gated"):
            norm: nn.Module | None = None
            if layer.norm is not None:
                wide = 2 * layer.channels
                batch = layer.norm == "batch"
                norm = NodeNorm(wide) if batch else nn.GroupNorm(groups_of(wide), wide)
            return GatedConv(channels, edge_features, layer.channels, norm)
        case _:
            return PlainConv(channels, edge_features, layer.channels, mean=layer.op == "mean")


def _graph_readout(layer: GraphReadout, channels: int) -> nn.Module:
    match layer.op:
        case "attention":
            return AttentionReadout(channels)
        case "set2set":
            return Set2Set(channels, layer.steps)
        case _:
            return NodeReadout(layer.op)


def _projection(before: Shape, after: Shape) -> nn.Module:
    if before == after:
        return nn.Identity()
    if len(before) == 1 or isinstance(before, NodeShape):
        return nn.Linear(before[0], after[0], bias=False)
    stride = projection_stride(before, after)
    return _CONV[len(before) - 1](before[0], after[0], 1, stride=stride, bias=False)
