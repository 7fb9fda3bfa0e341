"""A running mean of the weights: smoother than the last ones, often more accurate, nearly free.

Exponential moving average whose decay rises over the first n steps as TensorFlow's does,
min(decay, (1 + n) / (10 + n)), so that the first weights are soon forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from dmi_hpc.errors import CheckpointError


class Average:
    """Mean of a module's trainable weights, float32; its buffers are not averaged but stay as they are.

    Made before the engine, of the whole module. Every rank holds the same mean, whole also where ZeRO
    shares the weights. Not thread-safe.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.steps = 0
        self._decay, self.every = decay, steps_between(decay)
        self._mean = {name: p.detach().float().clone() for name, p in _trainable(module).items()}

    @torch.no_grad()
    def update(self, whole: Callable[[], AbstractContextManager[nn.Module]]) -> None:
        """Take in the weights after one more step; every rank calls it after each.

        whole: ``Engine.whole``, entered only when it is time.
        """
        self.steps += 1
        if self.steps % self.every:
            return
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps)) ** self.every
        with whole() as module:
            weights = [p.detach().float() for p in _trainable(module).values()]
            torch._foreach_lerp_(list(self._mean.values()), weights, 1 - decay)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[nn.Module]:
        """`module` with the mean for weights: to evaluate it, no steps meanwhile. In place."""
        own = {name: p.detach().clone() for name, p in _trainable(module).items()}
        self._copy(self._mean, module)
        try:
            yield module
        finally:
            self._copy(own, module)

    def weights(self) -> dict[str, torch.Tensor]:
        """Mean of each trainable weight by its name; the tensors themselves, not copies."""
        return dict(self._mean)

    @torch.no_grad()
    def load(self, weights: Mapping[str, torch.Tensor], steps: int) -> None:
        """Continue from what `weights` and `steps` were. CheckpointError if names or shapes differ."""
        here, there = ({k: tuple(t.shape) for k, t in w.items()} for w in (self._mean, weights))
        if different := sorted(
            k for k in here.keys() | there.keys() if here.get(k) != there.get(k)
        ):
            raise CheckpointError(
                f"the saved average is of other weights: {', '.join(different[:5])} differ. It was "
                "made by another network, or with other frozen weights"
            )
        for name, mean in self._mean.items():
            mean.copy_(weights[name])
        self.steps = steps

    @staticmethod
    @torch.no_grad()
    def _copy(weights: Mapping[str, torch.Tensor], module: nn.Module) -> None:
        for name, parameter in _trainable(module).items():
            parameter.copy_(weights[name])


def steps_between(decay: float) -> int:
    """Steps from one update of the mean to the next: a tenth of its memory, at most ten.

    The mean reaches back 1 / (1 - decay) steps; sampled more finely it is the same, but costs more.
    """
    return max(1, min(10, int(0.1 / (1 - decay) + 1e-9)))


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
