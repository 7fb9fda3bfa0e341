"""DeepSpeed at ZeRO stages 0 to 3, with offload. Needs a process group, also for a single rank."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from dmi_hpc import collectives
from dmi_hpc.config import TrainConfig
from dmi_hpc.engine.base import EngineState, Update
from dmi_hpc.engine.deepspeed_config import deepspeed_config
from dmi_hpc.engine.elastic import kept, require_names, shapes_of, shared_states, shared_tensors
from dmi_hpc.engine.gradients import LossScale, may_step, unscale_and_clip
from dmi_hpc.engine.library import import_deepspeed
from dmi_hpc.engine.network import Network
from dmi_hpc.engine.optimizers import make_optimizer, set_state, state_by_name, trainable
from dmi_hpc.engine.partitions import Partitions
from dmi_hpc.models.graphs import Inputs
from dmi_hpc.world import World


class DeepSpeedEngine:
    """Ranks share the optimiser's states (1), gradients (2) and weights (3); at 0 nothing."""

    def __init__(
        self,
        module: nn.Module,
        config: TrainConfig,
        world: World,
        stage: int = 0,
        notes: tuple[str, ...] = (),
    ) -> None:
        deepspeed = import_deepspeed()
        self._device = next(module.parameters()).device
        on_cpu = self._device.type == "cpu"
        # DeepSpeed insists on it, whoever the launcher, and computes on the device of that number
        os.environ["LOCAL_RANK"] = str(world.local_rank if on_cpu else self._device.index)
        self._bare, self._config, self._world, self._stage = module, config, world, stage
        self.notes = notes
        self.settings = deepspeed_config(module, config, world, stage, on_cpu=on_cpu)
        self._shapes = shapes_of(module)
        # stage 3 empties the weights and puts collectives into every forward pass
        self._twin = copy.deepcopy(module).to("meta") if stage == 3 else None
        engine, optimizer, _, _ = deepspeed.initialize(
            model=Network(module, config),
            optimizer=make_optimizer(module, config),
            config=self.settings,
            dist_init_required=False,
        )
        self._engine = engine
        self.optimizer = optimizer
        self._partitions = Partitions(deepspeed, optimizer, stage) if stage else None
        self._scale = LossScale() if config.precision == "fp16" else None
        self._tell_scale()

    @property
    def module(self) -> nn.Module:
        return self._bare

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        output: torch.Tensor = self._engine(inputs)
        return output

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        if self._scale is not None and not self._stage:
            loss = loss * self._scale.value
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def update(self) -> Update:
        done = self._update_shared() if self._stage else self._update_whole()
        if self._scale is not None:
            self._scale.after(finite=not done.skipped)
            self._tell_scale()
        return done

    def _update_whole(self) -> Update:
        norm = unscale_and_clip(self._bare.parameters(), self._config, self._scale)
        finite = may_step(norm, self._config)
        if finite:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return Update(norm, skipped=not finite)

    def _update_shared(self) -> Update:
        """ZeRO unscales, clips, and leaves out a step whose norm is not finite."""
        self._engine.step()
        norm = self.optimizer._global_grad_norm
        if norm is not None:
            norm = torch.as_tensor(norm, dtype=torch.float32, device=self._device)
        return Update(norm, skipped=bool(self.optimizer.overflow))

    def _tell_scale(self) -> None:
        if self._scale is not None and self._stage:
            self.optimizer.override_loss_scale(self._scale.value)

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        if self._twin is None:
            yield self._bare
            return
        twin = copy.deepcopy(self._twin).to_empty(device=self._device)
        own = twin.state_dict()
        for name, tensor in self._weights():
            own[name].copy_(tensor.detach())
        for buffer, value in zip(twin.buffers(), self._bare.buffers(), strict=True):
            buffer.copy_(value)  # those too that no state_dict holds
        twin.train(self._bare.training)
        yield twin

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: weights and buffers, whole for the time of one turn."""
        for name, tensor in self._bare.state_dict(keep_vars=True).items():
            if self._stage == 3:
                assert self._partitions is not None
                with self._partitions.gathered(tensor):
                    yield name, tensor
            else:
                yield name, tensor

    def state(self) -> EngineState | None:
        first, weights = self._world.is_first, {}
        for name, tensor in self._weights():
            if first:
                part = tensor.detach()
                weights[name] = part.to("cpu", copy=True) if self._stage == 3 else kept(tensor)
        parameters = trainable(self._bare)
        if self._partitions is None:
            optimizer = state_by_name(self.optimizer, parameters)
        else:
            optimizer = self._partitions.state(parameters, keep=first)
        scaler = self._scale.state() if self._scale is not None else {}
        return EngineState(weights, optimizer, scaler) if first else None

    def load(self, state: EngineState | None) -> None:
        require_names(state, self._shapes)
        own, parameters = self._bare.state_dict(keep_vars=True), trainable(self._bare)
        for name, tensor in shared_tensors(state.weights if state else None, self._device):
            if self._partitions is None:
                own[name].detach().copy_(tensor)
            else:
                self._partitions.set_weight(own[name], tensor)
        for name, key, tensor in shared_states(state.optimizer if state else None, self._device):
            if name not in parameters:
                continue  # it is frozen now
            if self._partitions is None:
                set_state(self.optimizer, parameters[name], key, tensor)
            else:
                self._partitions.set_state(parameters[name], key, tensor)
        scaler = collectives.gather_objects(state.scaler if state else None)[0]
        if self._scale is not None:
            self._scale.load(scaler)
            self._tell_scale()

    def close(self) -> None:
        self._engine.destroy()
