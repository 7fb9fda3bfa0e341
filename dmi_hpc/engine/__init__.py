"""Data-parallel engines behind one interface: DeepSpeed, and its plain-torch twin.

Nothing outside this package imports deepspeed. Start with ``base.py``.
"""

from __future__ import annotations

import torch
from torch import nn

from dmi_hpc import collectives
from dmi_hpc.config import TrainConfig
from dmi_hpc.data.storage import free_memory
from dmi_hpc.engine.base import Engine, EngineState, Update
from dmi_hpc.engine.deepspeed_config import deepspeed_config
from dmi_hpc.engine.deepspeed_engine import DeepSpeedEngine
from dmi_hpc.engine.network import statistics_untouched
from dmi_hpc.engine.stages import Plan, plan
from dmi_hpc.engine.torch_engine import TorchEngine
from dmi_hpc.errors import RecipeError
from dmi_hpc.memory import keep_freed_memory
from dmi_hpc.models.graph_layers import GraphNetwork
from dmi_hpc.models.potentials import ForceNetwork
from dmi_hpc.world import World

__all__ = [
    "DeepSpeedEngine",
    "Engine",
    "EngineState",
    "Plan",
    "TorchEngine",
    "Update",
    "deepspeed_config",
    "make_engine",
    "plan",
    "statistics_untouched",
]


def make_engine(module: nn.Module, config: TrainConfig, world: World) -> Engine:
    """The engine and ZeRO stage of the recipe, on the device where `module` is.

    A process group must exist if world.size > 1, and for DeepSpeed. Frozen weights are those that
    require no gradient. Raises RecipeError or LaunchError if the recipe cannot be had here.
    """
    if config.activation_checkpointing and isinstance(module, GraphNetwork):
        raise RecipeError(
            "train.activation_checkpointing: found true for a network of graphs, of which activations "
            "cannot be computed twice yet: set it to false, and accumulation higher if memory is short"
        )
    parameters = list(module.parameters())
    memory = min(collectives.gather_objects(_memory(parameters[0].device, world)))
    decided = plan(config, sum(p.numel() for p in parameters), world.size, memory)
    if decided.stage == 3 and isinstance(module, ForceNetwork):
        raise RecipeError(
            "train.zero_stage: a network with forces needs its weights whole: choose 0, 1 or 2"
        )
    notes = (f"engine {decided.engine}: {decided.reason}",)
    if parameters[0].device.type == "cpu":
        keep_freed_memory()
    if decided.engine == "torch":
        return TorchEngine(module, config, world, notes)
    return DeepSpeedEngine(module, config, world, decided.stage, notes)


def _memory(device: torch.device, world: World) -> int:
    """Bytes of this rank's device: of the GPU, or its share of the node's free memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return free_memory() // world.local_size
