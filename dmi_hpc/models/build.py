"""From a specification to a torch module."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import nn

from dmi_hpc.models.spec import (
    Activation,
    ActivationName,
    Conv,
    Dense,
    Dropout,
    Layer,
    NetworkSpec,
    Norm,
    Pool,
    Readout,
    Shape,
    shapes,
)

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
}
GROUP_CHANNELS = 8


class SpatialMean(nn.Module):
    """Mean of each channel over all spatial axes: (N, C, ...) -> (N, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).mean(2)


def build(spec: NetworkSpec) -> nn.Sequential:
    """Module of `spec`: (N, *input_shape) float -> (N, outputs).

    Weights come from torch's global generator: seed it first. Raises NetworkError if the layers
    cannot follow each other.
    """
    modules: list[nn.Module] = []
    before = spec.input_shape
    for layer, after in zip(spec.layers, shapes(spec), strict=True):
        modules.append(_module(layer, before))
        before = after
    modules.append(nn.Linear(prod(before), spec.outputs))
    return nn.Sequential(*modules)


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
            if layer.op == "batch":
                return _BATCH[axes](channels)
            return nn.GroupNorm(groups_of(channels), channels)
        case Activation():
            return _ACTIVATION[layer.function]()
        case Dropout():
            return nn.Dropout(layer.rate)
        case Readout():
            return nn.Flatten() if layer.op == "flatten" else SpatialMean()
        case Dense():
            return nn.Linear(channels, layer.units)
