"""Norm, clipping and loss scaling of gradients that are whole on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from dmi_hpc import collectives
from dmi_hpc.config import TrainConfig

BUCKET = 25_000_000  # elements reduced at once
FIRST_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # those of torch.amp.GradScaler


class LossScale:
    """Dynamic loss scale of fp16, which would lose small gradients otherwise.

    The rule of torch.amp.GradScaler: halved by a gradient that is not finite, doubled after 2000
    that are. That class itself only works where gradients are whole, which ZeRO's are not.
    """

    def __init__(self) -> None:
        self.value = FIRST_SCALE
        self._good = 0

    def after(self, *, finite: bool) -> None:
        """Note how a step went."""
        self._good = self._good + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self._good == GROWTH_INTERVAL:
            self.value, self._good = self.value * 2, 0

    def state(self) -> dict[str, float]:
        return {"scale": self.value, "good_steps": float(self._good)}

    def load(self, state: dict[str, float]) -> None:
        """Continue from what `state` gave; {} (of another precision) changes nothing."""
        self.value = state.get("scale", self.value)
        self._good = int(state.get("good_steps", self._good))


class Parts:
    """Squared norms of the gradients of one step's micro-batches, for the noise scale.

    Keeps the gradient so far apart while a micro-batch is computed: once the gradients' memory.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self.square = torch.zeros((), device=self._parameters[0].device)  # their sum

    def backward(self, loss: torch.Tensor) -> None:
        """As ``loss.backward()``, its gradient measured before it is added."""
        before = [p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        self.square += nn.utils.get_total_norm(gradients_of(self._parameters)).square()
        for parameter, gradient in zip(self._parameters, before, strict=True):
            if gradient is not None:
                if parameter.grad is not None:
                    gradient += parameter.grad
                parameter.grad = gradient

    def take(self) -> torch.Tensor:
        """The sum since it was last asked for."""
        taken, self.square = self.square, torch.zeros_like(self.square)
        return taken


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def average_over_ranks(gradients: Sequence[torch.Tensor], ranks: int) -> None:
    """Replace every rank's gradients by their mean over ranks, in place."""
    bucket: list[torch.Tensor] = []
    for gradient in gradients:
        if bucket and sum(g.numel() for g in bucket) + gradient.numel() > BUCKET:
            _average(bucket, ranks)
            bucket = []
        bucket.append(gradient)
    _average(bucket, ranks)


def _average(gradients: list[torch.Tensor], ranks: int) -> None:
    flat = collectives.sum_(torch.cat([g.flatten() for g in gradients])).div_(ranks)
    parts = torch.split(flat, [g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(parts, gradients, strict=True)])


def norm_needed(config: TrainConfig) -> bool:
    """True if a step cannot do without the gradient's norm, which takes time."""
    return (
        config.clip_norm > 0
        or config.not_finite == "skip"
        or config.precision == "fp16"
        or config.noise_scale
    )


def unscale_and_clip(
    parameters: Iterable[nn.Parameter], config: TrainConfig, scale: LossScale | None
) -> torch.Tensor | None:
    """Divide gradients by the loss scale and clip them, in place; their norm before clipping."""
    if not norm_needed(config):
        return None
    gradients = gradients_of(parameters)
    if scale is not None:
        torch._foreach_mul_(gradients, 1 / scale.value)
    norm = nn.utils.get_total_norm(gradients)
    if config.clip_norm:
        # the formula of torch.nn.utils.clip_grad_norm_
        factor = torch.clamp(config.clip_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_(gradients, factor)
    return norm


def may_step(norm: torch.Tensor | None, config: TrainConfig) -> bool:
    """False if the step must be left out; waits for the device where that is possible at all."""
    if norm is None or (config.precision != "fp16" and config.not_finite == "fail"):
        return True
    return bool(torch.isfinite(norm))
