"""Plain torch: DistributedDataParallel over several ranks.

The faster one where every rank can hold everything, and the measuring stick of the other.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dmi_hpc import collectives
from dmi_hpc.config import TrainConfig
from dmi_hpc.engine.base import EngineState, Update
from dmi_hpc.engine.elastic import kept, require_names, shapes_of, shared_states, shared_tensors
from dmi_hpc.engine.gradients import (
    LossScale,
    Parts,
    average_over_ranks,
    gradients_of,
    may_step,
    unscale_and_clip,
)
from dmi_hpc.engine.network import Network
from dmi_hpc.engine.optimizers import make_optimizer, set_state, state_by_name, trainable
from dmi_hpc.models.graphs import Inputs
from dmi_hpc.world import World


class TorchEngine:
    """Every rank holds all weights, gradients and optimiser states."""

    def __init__(
        self, module: nn.Module, config: TrainConfig, world: World, notes: tuple[str, ...] = ()
    ) -> None:
        self._bare, self._config, self._world = module, config, world
        self.notes = notes
        self.settings: dict[str, Any] = {}
        self.optimizer = make_optimizer(module, config)
        self._model: nn.Module = Network(module, config)
        self._parts = Parts(module.parameters()) if config.noise_scale else None
        # DistributedDataParallel must know at the forward pass whether a step ends with it, and
        # leaves no rank's own gradient
        self._by_hand = world.size > 1 and (config.accumulation > 1 or config.noise_scale)
        if world.size > 1 and not self._by_hand:
            # gradients lie in the buckets they are reduced in: a copy less in time and memory
            self._model = nn.parallel.DistributedDataParallel(
                self._model, gradient_as_bucket_view=True
            )
        self._scale = LossScale() if config.precision == "fp16" else None

    @property
    def module(self) -> nn.Module:
        return self._bare

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        output: torch.Tensor = self._model(inputs)
        return output

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        if self._scale is not None:
            loss = loss * self._scale.value
        if self._parts is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self._parts.backward(loss)
        if last and self._by_hand:
            squares = [] if self._parts is None else [self._parts.square]
            average_over_ranks([*gradients_of(self._bare.parameters()), *squares], self._world.size)

    def update(self) -> Update:
        norm = unscale_and_clip(self._bare.parameters(), self._config, self._scale)
        squares = self._squares(norm)
        finite = may_step(norm, self._config)
        if finite:
            self.optimizer.step()
        if self._scale is not None:
            self._scale.after(finite=finite)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(norm, skipped=not finite, squares=squares)

    def _squares(self, norm: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Those of ``Update``; the loss scale is still that of the backward pass."""
        if self._parts is None or norm is None:
            return None
        scale = 1.0 if self._scale is None else self._scale.value
        # a rank's gradients are of `size` times its share of the loss; their squares are averaged
        return self._parts.take() / (scale**2 * self._world.size), norm.square()

    def whole(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self._bare)

    def state(self) -> EngineState | None:
        if not self._world.is_first:
            return None
        return EngineState(
            weights={n: kept(t) for n, t in self._bare.state_dict(keep_vars=True).items()},
            optimizer=state_by_name(self.optimizer, trainable(self._bare)),
            scaler=self._scale.state() if self._scale is not None else {},
        )

    def load(self, state: EngineState | None) -> None:
        require_names(state, shapes_of(self._bare))
        device = next(self._bare.parameters()).device
        own, parameters = self._bare.state_dict(), trainable(self._bare)
        for name, tensor in shared_tensors(state.weights if state else None, device):
            own[name].copy_(tensor)
        for name, key, tensor in shared_states(state.optimizer if state else None, device):
            if name in parameters:  # else it is frozen now
                set_state(self.optimizer, parameters[name], key, tensor)
        scaler = collectives.gather_objects(state.scaler if state else None)[0]
        if self._scale is not None:
            self._scale.load(scaler)

    def close(self) -> None:
        return None
