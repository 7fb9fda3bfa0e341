"""A network as plain, frozen data, with its shape inference. No torch here.

Shapes are channels first and without the batch axis: ``(C, D, H, W)`` for a voxel volume,
``(F,)`` for a feature vector. A linear head to ``outputs`` units is always appended.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from dmi_hpc.errors import NetworkError

Shape = tuple[int, ...]
ActivationName = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh"]
NormName = Literal["batch", "group"]
PaddingName = Literal["zeros", "circular"]
PoolName = Literal["max", "mean"]
ReadoutName = Literal["flatten", "mean"]


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


Layer = Annotated[
    Conv | Pool | Norm | Activation | Dropout | Readout | Dense, Field(discriminator="kind")
]
LAYERS: TypeAdapter[tuple[Layer, ...]] = TypeAdapter(tuple[Layer, ...])


class NetworkSpec(BaseModel):
    """Input shape, layers, and the number of linear outputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_shape: Shape
    layers: tuple[Layer, ...]
    outputs: int = Field(1, ge=1)


def _after(layer: Layer, shape: Shape) -> Shape:
    """Shape after `layer`; raises NetworkError with the reason alone."""
    spatial = len(shape) > 1
    if isinstance(layer, Conv | Pool | Readout) and not spatial:
        raise NetworkError(f"needs a map over space, found a vector of {shape[0]}")
    match layer:
        case Conv():
            if layer.padding == "circular" and any(n < layer.kernel // 2 for n in shape[1:]):
                raise NetworkError(
                    f"a circular kernel of {layer.kernel} is too wide for the map {shape[1:]}"
                )
            return (layer.filters, *(-(-n // layer.stride) for n in shape[1:]))
        case Pool():
            if any(n < layer.size for n in shape[1:]):
                raise NetworkError(f"pooling by {layer.size} of the map {shape[1:]}")
            return (shape[0], *(n // layer.size for n in shape[1:]))
        case Readout():
            return (prod(shape),) if layer.op == "flatten" else (shape[0],)
        case Dense():
            if spatial:
                raise NetworkError(f"a dense layer needs a readout before it, found map {shape}")
            return (layer.units,)
        case Norm() | Activation() | Dropout():
            return shape


def shapes(spec: NetworkSpec) -> tuple[Shape, ...]:
    """Shape after each layer (the head not included): ``len(spec.layers)`` entries.

    Raises NetworkError naming the first layer that cannot follow, or a missing readout.
    """
    shape = spec.input_shape
    if not shape or any(n < 1 for n in shape):
        raise NetworkError(f"input shape {shape}: every extent must be at least 1")
    result: list[Shape] = []
    for position, layer in enumerate(spec.layers):
        try:
            shape = _after(layer, shape)
        except NetworkError as error:
            raise NetworkError(f"layer {position + 1} ({layer.kind}): {error}") from None
        result.append(shape)
    if len(shape) > 1:
        raise NetworkError(f"the last layer leaves a map {shape}: add a readout")
    return tuple(result)
