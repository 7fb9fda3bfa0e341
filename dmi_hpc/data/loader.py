"""Batches of one rank, as fresh numpy arrays.

Synchronous: a gather from memory-mapped shards already runs at the speed of a gather from RAM, and
worker processes were measured 7 to 13 times slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmi_hpc.data.sampler import Batches, Ids, Order, Weights, rank_slice
from dmi_hpc.data.shards import ShardSet

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch of n = ceil(batch / ranks) rows."""

    fields: dict[str, Array]  # name -> (n, *shape)
    positions: Ids  # (n,) place in the epoch, before shuffling
    rows: Ids  # (n,) row of the shard set
    weights: Weights  # (n,) 1, or 0 where a row only pads
    step: int  # within the epoch


class Loader:
    """Epochs over some rows of a shard set; the same sequence at any number of ranks.

    rows: (m,) int64, for example `shards.rows("train")`.
    """

    def __init__(
        self,
        shards: ShardSet,
        rows: Ids,
        fields: tuple[str, ...],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        size: int = 1,
        shuffle: bool,
    ) -> None:
        self.shards, self.rows, self.fields = shards, rows, fields
        self.rank, self.size, self.shuffle = rank, size, shuffle
        self.order = Order(seed, len(rows))
        self.batches = Batches(len(rows), batch_size)

    @property
    def steps_per_epoch(self) -> int:
        return self.batches.steps_per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of an epoch from a step on; arrays are the caller's to keep."""
        for step in range(start_step, self.steps_per_epoch):
            positions, weights = rank_slice(self.batches.positions(step), self.rank, self.size)
            index = self.order.index(epoch, positions) if self.shuffle else positions
            rows = self.rows[index]
            yield Batch(self.shards.fields(self.fields, rows), positions, rows, weights, step)
