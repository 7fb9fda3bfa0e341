"""What a training asks of an engine, and the state it can be continued from."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from dmi_hpc.models.graphs import Inputs


@dataclass(frozen=True)
class Update:
    """What became of one optimiser step.

    norm: of the whole gradient before clipping, still on the device; None where nobody needed it.
    skipped: the gradient was not finite and the weights are as they were. ZeRO skips such a step
    also where the recipe says fail, if it knows the norm: the caller fails.
    squares: where the recipe wants the noise scale, squared norms on the device: of what each
    micro-batch of each rank adds to the gradient, summed; and of the gradient, before clipping.
    """

    norm: torch.Tensor | None
    skipped: bool
    squares: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class EngineState:
    """Everything an engine needs to go on; knows neither ranks nor ZeRO stages.

    Tensors may be the live ones, wherever they lie: copy them before the next ``update``.
    """

    weights: dict[str, torch.Tensor]  # float32 masters and buffers, by the network's own names
    optimizer: dict[str, dict[str, torch.Tensor]]  # name of a parameter -> step, exp_avg, ...
    scaler: dict[str, float]  # loss scale of fp16, else {}


class Engine(Protocol):
    """One model replica with its optimiser; gradients are averaged over ranks.

    Of a step, ``backward`` is called for each micro-batch, equally often on every rank, then
    ``update`` once. The losses are scaled such that their mean over ranks, summed over
    micro-batches, is what is minimised: no engine divides by the number of micro-batches.
    """

    optimizer: torch.optim.Optimizer  # set group["lr"] to rate * group["lr_scale"] before an update
    notes: tuple[str, ...]  # what was decided and why, a sentence each
    settings: dict[str, Any]  # the complete configuration that DeepSpeed got; of plain torch {}

    @property
    def module(self) -> nn.Module:
        """The bare network; at ZeRO stage 3 its weights are there within ``whole`` only."""

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        """Output of the network in float32, whatever it computes in."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of one micro-batch; `last`: of its step."""

    def update(self) -> Update:
        """Clip, one optimiser step; gradients are zero afterwards."""

    def whole(self) -> AbstractContextManager[nn.Module]:
        """A network with all weights at hand, to evaluate: collective, its use inside is not."""

    def state(self) -> EngineState | None:
        """Collective; None on all ranks but the first."""

    def load(self, state: EngineState | None) -> None:
        """Collective, with rank 0's state; from any engine, stage and number of ranks.

        Raises CheckpointError on all ranks if names or shapes are not the network's.
        """

    def close(self) -> None: ...
