"""The network as engines run it: autocast, activation checkpointing and compilation around it.

Autocast stands within the network, so that both engines compute the same: DeepSpeed's own also
reduces gradients in half precision, and sets a global that changes later engines of the process.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from dmi_hpc.config import TrainConfig
from dmi_hpc.errors import LaunchError, RecipeError

Run = Callable[[torch.Tensor], torch.Tensor]
_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Network(nn.Module):
    """`bare` with what the recipe wants around it; output is float32."""

    def __init__(self, bare: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self.bare = bare
        self._dtype = _AUTOCAST[config.precision]
        self._run: Run = _checkpointed(bare) if config.activation_checkpointing else _plain(bare)
        if config.compile:
            require_compiler()
            self._run = torch.compile(self._run)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self._dtype == torch.float32:
            return self._run(inputs)
        with torch.autocast(inputs.device.type, self._dtype):
            return self._run(inputs).float()


def _plain(bare: nn.Module) -> Run:
    def run(x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = bare(x)
        return output

    return run


def _checkpointed(bare: nn.Module) -> Run:
    """`bare`, keeping activations only between groups of layers: sqrt(n) of n (arXiv:1604.06174).

    The last group ends where the backward pass begins: it keeps its own.
    """
    if not isinstance(bare, nn.Sequential):
        raise RecipeError(
            "train.activation_checkpointing: found a network that is no row of layers, expected "
            "one that is (torch.nn.Sequential); set it to false"
        )
    layers = list(bare)
    size = math.isqrt(max(1, len(layers) - 1)) + 1
    groups = [layers[start : start + size] for start in range(0, len(layers), size)]

    def run(x: torch.Tensor) -> torch.Tensor:
        for group in groups[:-1]:
            x = checkpoint(
                partial(_in_turn, group),
                x,
                use_reentrant=False,
                context_fn=partial(_contexts, group),
            )
        return _in_turn(groups[-1], x)

    return run


def _in_turn(layers: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _contexts(
    layers: Sequence[nn.Module],
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the forward pass and of its repetition, which must neither count a batch twice in the
    running statistics nor forget that a norm was frozen."""
    norms = [m for layer in layers for m in layer.modules() if isinstance(m, _BatchNorm)]
    return nullcontext(), _repeating([(norm, norm.training) for norm in norms])


@contextmanager
def _repeating(modes: Sequence[tuple[_BatchNorm, bool]]) -> Iterator[None]:
    before = [(norm, norm.training, norm.momentum) for norm, _ in modes]
    counts = [
        (norm.num_batches_tracked, norm.num_batches_tracked.clone())
        for norm, _ in modes
        if norm.num_batches_tracked is not None
    ]
    for norm, training in modes:
        norm.training, norm.momentum = training, 0.0
    try:
        yield
    finally:
        for norm, training, momentum in before:
            norm.training, norm.momentum = training, momentum
        for count, value in counts:
            count.copy_(value)


@contextmanager
def statistics_untouched(module: nn.Module, *, rows: int) -> Iterator[None]:
    """A single row has no variance: batch normalisation then uses its running statistics."""
    training = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    norms = training if rows == 1 else []
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def require_compiler() -> None:
    """Raise LaunchError if torch.compile could not make code here: it calls a C++ compiler."""
    given = os.environ.get("CXX")
    candidates = [given] if given else ["g++", "clang++"]
    if not any(shutil.which(name) for name in candidates):
        raise LaunchError(
            f"train.compile is true, but no compiler is present: looked for "
            f"{' and '.join(candidates)}. Load the machine's compiler module, set CXX, or set "
            "compile = false"
        )
