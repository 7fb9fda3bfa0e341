"""Data-parallel engines behind one interface: DeepSpeed, and its plain-torch twin.

The twin is the measuring stick (same losses, tests hold them equal) and what single-rank search
trials use: with one rank there is nothing to reduce. The only file importing deepspeed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dmi_hpc.config import TrainConfig
from dmi_hpc.world import World


class Engine(Protocol):
    """One model replica with its optimiser; gradients are averaged over ranks."""

    optimizer: torch.optim.Optimizer

    @property
    def module(self) -> nn.Module:
        """The bare network: for evaluation, saving, loading."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor: ...
    def update(self, loss: torch.Tensor) -> None:
        """Backward, reduce over ranks, clip, one optimiser step; gradients are zero afterwards."""

    def close(self) -> None: ...


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimiser from torch, fused. Never DeepSpeed's own: its "Adam" is AdamW."""
    parameters = list(module.parameters())
    match config.optimizer:
        case "adam":
            return torch.optim.Adam(
                parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True
            )
        case "adamw":
            return torch.optim.AdamW(
                parameters, config.learning_rate, weight_decay=config.weight_decay, fused=True
            )
        case "sgd":
            return torch.optim.SGD(
                parameters,
                config.learning_rate,
                momentum=config.momentum,
                weight_decay=config.weight_decay,
                fused=True,
            )


def make_engine(module: nn.Module, config: TrainConfig, world: World) -> Engine:
    """The engine that `config.engine` names; a process group must exist if world.size > 1."""
    return (DeepSpeedEngine if config.engine == "deepspeed" else TorchEngine)(module, config, world)


class TorchEngine:
    """Plain torch; DistributedDataParallel over several ranks."""

    def __init__(self, module: nn.Module, config: TrainConfig, world: World) -> None:
        self._bare = module
        self._model = nn.parallel.DistributedDataParallel(module) if world.size > 1 else module
        self._config = config
        self.optimizer = make_optimizer(module, config)

    @property
    def module(self) -> nn.Module:
        return self._bare

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        with torch.autocast(
            inputs.device.type, torch.bfloat16, enabled=self._config.precision == "bf16"
        ):
            output: torch.Tensor = self._model(inputs)
        return output.float()

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        if self._config.clip_norm:
            nn.utils.clip_grad_norm_(self._bare.parameters(), self._config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def close(self) -> None:
        return None


@contextmanager
def statistics_untouched(module: nn.Module, *, rows: int) -> Iterator[None]:
    """A single row has no variance: batch normalisation then uses its running statistics."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)] if rows == 1 else []
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def deepspeed_config(module: nn.Module, config: TrainConfig, world: World) -> dict[str, Any]:
    """The complete, explicit DeepSpeed configuration; every default that changes numbers is written.

    Left out, gradient_clipping is 1.0 since DeepSpeed 0.19, and the buckets take 2 GB a trial.
    """
    numel = sum(p.numel() for p in module.parameters())
    bucket = min(max(numel, 1_000_000), 500_000_000)
    return {
        "train_batch_size": -(-config.batch_size // world.size) * world.size,
        "train_micro_batch_size_per_gpu": -(-config.batch_size // world.size),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {
            "stage": 0,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,
        },
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """DeepSpeed, ZeRO stage 0. Needs a process group, also for a single rank."""

    def __init__(self, module: nn.Module, config: TrainConfig, world: World) -> None:
        deepspeed = _import_deepspeed()
        os.environ["LOCAL_RANK"] = str(world.local_rank)  # DeepSpeed insists, whoever the launcher
        self.config = deepspeed_config(module, config, world)
        engine, optimizer, _, _ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(module, config),
            config=self.config,
            dist_init_required=False,
        )
        self._engine = engine
        self.optimizer = optimizer

    @property
    def module(self) -> nn.Module:
        bare: nn.Module = self._engine.module
        return bare

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._engine(inputs)
        return output.float()

    def update(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)
        self._engine.step()

    def close(self) -> None:
        self._engine.destroy()


def _import_deepspeed() -> Any:
    """DeepSpeed without its start-up log lines, and on CPU without its compiler.

    On CPU its first start would build a shared-memory collective with g++ (30 s, or a failure where
    there is no compiler) that measures no faster than gloo at these sizes.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
