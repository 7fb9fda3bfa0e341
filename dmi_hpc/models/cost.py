"""What a network costs, by arithmetic on its shapes: nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from dmi_hpc.errors import TrialFailure
from dmi_hpc.models.spec import Conv, Dense, Layer, NetworkSpec, Norm, Shape, shapes

BYTES = 4  # fp32
# weights, gradients, two Adam moments
STATES_PER_PARAMETER = 4
# an activation and its gradient live at once; convolutions work on a padded copy
COPIES_PER_ACTIVATION = 3


@dataclass(frozen=True)
class Cost:
    """parameters: number; flops: multiply-adds x 2 of one forward pass of one sample;
    activations: numbers kept for the backward pass of one sample."""

    parameters: int
    flops: int
    activations: int

    def memory_bytes(self, batch_size: int) -> int:
        """Estimated memory of training with Adam in fp32 (weights, moments, activations)."""
        state = self.parameters * STATES_PER_PARAMETER
        return BYTES * (state + self.activations * COPIES_PER_ACTIVATION * batch_size)


def cost(spec: NetworkSpec) -> Cost:
    """Exact parameter count; FLOPs of convolutions and dense layers; activation numbers.

    Raises NetworkError if the layers cannot follow each other.
    """
    parameters = flops = 0
    activations = prod(spec.input_shape)
    before = spec.input_shape
    for layer, after in zip(spec.layers, shapes(spec), strict=True):
        weights, uses = layer_weights(layer, before, after)
        parameters += weights
        flops += 2 * uses
        activations += prod(after)
        before = after
    head = prod(before) * spec.outputs
    return Cost(parameters + head + spec.outputs, flops + 2 * head, activations)


def training_flops(spec: NetworkSpec) -> int:
    """FLOPs of one sample, forward and backward: each product of the forward pass comes back as two.

    Nobody asks for the gradient by the network's inputs: the first layer with weights has one less.
    Work done twice to save memory (activation checkpointing) does not count.
    """
    before, first = spec.input_shape, 0
    for layer, after in zip(spec.layers, shapes(spec), strict=True):
        first = first or 2 * layer_weights(layer, before, after)[1]
        before = after
    first = first or 2 * prod(before) * spec.outputs
    return 3 * cost(spec).flops - first


def layer_weights(layer: Layer, before: Shape, after: Shape) -> tuple[int, int]:
    """(parameters, multiply-adds of one sample) of one layer."""
    match layer:
        case Conv():
            kernel = before[0] * layer.kernel ** (len(before) - 1)
            return layer.filters * (kernel + 1), kernel * prod(after)
        case Dense():
            return layer.units * (before[0] + 1), layer.units * before[0]
        case Norm():
            return 2 * before[0], 2 * prod(after)
        case _:
            return 0, 0


def require_fit(spec: NetworkSpec, batch_size: int, limit_bytes: float) -> Cost:
    """Cost of `spec`; a TrialFailure of kind ``memory`` if its training would not fit."""
    found = cost(spec)
    needed = found.memory_bytes(batch_size)
    if needed > limit_bytes:
        raise TrialFailure(
            "memory",
            f"{found.parameters:,} parameters and batch {batch_size} need about "
            f"{needed / 1e9:.2f} GB, allowed are {limit_bytes / 1e9:.2f} GB",
        )
    return found
