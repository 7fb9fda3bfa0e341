"""Weights and optimiser states that ZeRO cut into flat parts, read and written by parameter.

Flat vectors, one for each parameter group (several at stage 3), are what the optimiser steps on.
Where a parameter's fragment lies is DeepSpeed's affair: its own functions read and write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from dmi_hpc.engine.optimizers import OptimizerState


class Partitions:
    """Of one ZeRO optimiser at stage 1, 2 or 3. All methods are collective."""

    def __init__(self, deepspeed: Any, optimizer: Any, stage: int) -> None:
        self._deepspeed, self._optimizer, self._stage = deepspeed, optimizer, stage

    @property
    def _flat(self) -> list[torch.Tensor]:
        """This rank's parts, float32."""
        parts: list[torch.Tensor] = (
            self._optimizer.fp32_partitioned_groups_flat
            if self._stage == 3
            else self._optimizer.single_partition_of_fp32_groups
        )
        return parts

    def gathered(self, tensor: torch.Tensor) -> AbstractContextManager[None]:
        """Within, a stage-3 parameter is whole on every rank; other tensors always are."""
        context: AbstractContextManager[None] = self._deepspeed.zero.GatheredParameters([tensor])
        return context

    def state(self, parameters: Mapping[str, nn.Parameter], *, keep: bool) -> OptimizerState:
        """State by name, on the CPU; {} if not `keep`, or before the first step."""
        first = self._optimizer.optimizer.state.get(self._flat[0], {})
        keys = [
            k for k, v in first.items() if torch.is_tensor(v) and v.shape == self._flat[0].shape
        ]
        if keys:
            self._link()
        state: OptimizerState = {}
        for name, parameter in parameters.items():
            own = {
                key: self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
                for key in keys
            }
            if keep and keys:
                state[name] = {key: value.cpu() for key, value in own.items()}
                if "step" in first:
                    state[name]["step"] = first["step"].detach().cpu().clone()
        return state

    def _link(self) -> None:
        """Link parameters to states: DeepSpeed does once, when only the first group has states."""
        if self._stage < 3:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def set_weight(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Write a weight, its float32 master, or a buffer; `value` on every rank."""
        if self._stage < 3 or not hasattr(tensor, "ds_id"):
            tensor.detach().copy_(value)
        else:
            with self._deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                tensor.detach().copy_(value)
        if not tensor.requires_grad:
            return
        if self._stage == 3:
            self._deepspeed.utils.safe_set_local_fp32_param(tensor, _part(tensor, value))
        else:
            self._deepspeed.utils.safe_set_full_fp32_param(tensor, value)

    def set_state(self, parameter: nn.Parameter, key: str, value: torch.Tensor) -> None:
        """Write one optimiser state of a parameter; `value` on every rank."""
        states = self._optimizer.optimizer.state
        if key == "step":  # the same for all parameters
            for flat in self._flat:
                states[flat][key] = value.to(flat.device, copy=True)
            return
        if any(key not in states[flat] for flat in self._flat):  # made at the first step only
            for flat in self._flat:
                states[flat][key] = torch.zeros_like(flat)
            self._link()
        if self._stage == 3:
            part = _part(parameter, value)
            self._deepspeed.utils.safe_set_local_optimizer_state(parameter, part, key)
        else:
            self._deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)


def _part(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a stage-3 parameter's values; the last parts are padded with zeros."""
    size = parameter.ds_tensor.numel()
    rank = torch.distributed.get_rank(group=parameter.ds_process_group)
    part = torch.zeros(size, dtype=value.dtype, device=value.device)
    real = value.flatten()[rank * size : (rank + 1) * size]
    part[: real.numel()] = real
    return part
