"""Modules that act on feature vectors."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

STANDARDIZE = "standardize"  # name of that module in a network
# deviations below this share of the mean are rounding of a feature that is the same everywhere
CONSTANT = 1e-7


class Standardize(nn.Module):
    """(x - mean) / std of each feature: (N, F) -> (N, F). Mean 0 and deviation 1 until they are set."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.mean) / self.std).to(x.dtype)


def set_standardization(module: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set mean and deviation of the `Standardize` in `module` to those of the rows of all `batches`,
    (n, F) each, in one pass in float64. A feature that is the same everywhere has deviation 1.

    After Chan, Golub and LeVeque, Am. Stat. 37 (1983) 242.
    """
    found = [part for part in module.modules() if isinstance(part, Standardize)]
    assert len(found) == 1, f"{len(found)} standardizations in the network"
    (layer,) = found
    rows, mean = 0, torch.zeros_like(layer.mean, dtype=torch.float64)
    squares = torch.zeros_like(mean)  # of the differences from the mean, summed
    for batch in batches:
        values = batch.to(mean)
        if not len(values):
            continue
        here, total = values.mean(0), rows + len(values)
        away = here - mean
        squares += (values - here).square().sum(0) + away.square() * (rows * len(values) / total)
        mean += away * (len(values) / total)
        rows = total
    assert rows, "no rows to standardize by"
    std = (squares / rows).sqrt()
    layer.mean.copy_(mean)
    layer.std.copy_(torch.where(std > CONSTANT * mean.abs(), std, 1.0))


def standardizes(name: str) -> bool:
    """Whether the tensor of a network with this name belongs to its standardization."""
    return name.partition(".")[0] == STANDARDIZE


class Part(nn.Module):
    """Entries `start` up to `stop` of each row: (N, F) -> (N, stop - start)."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self._start, self._stop = start, stop

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self._start : self._stop]


class UnitVectors(nn.Module):
    """Each row divided by its Euclidean norm, zeros as they are: (N, F) -> (N, F)."""

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        # not x / max(length, tiny): its gradient at 0 is 1 / tiny
        return x / torch.where(length > 0, length, 1.0)


class EmbeddingLayer(nn.Module):
    """A vector of each whole number: (N, T) float -> (N, units, T)."""

    def __init__(self, entries: int, units: int) -> None:
        super().__init__()
        self.table = nn.Embedding(entries, units)

    def forward(self, x: Tensor) -> Tensor:
        vectors: Tensor = self.table(x.long())
        return vectors.transpose(1, 2)
