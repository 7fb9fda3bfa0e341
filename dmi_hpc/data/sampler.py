"""Which row comes when: pure functions of (seed, epoch, position). No state, no memory.

Every rank computes its own share, so the order does not depend on the number of ranks, and a
training resumes from one integer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]
Weights = np.ndarray[Any, np.dtype[np.float32]]

ROUNDS = 6  # 4 make a pseudo-random permutation (Luby & Rackoff 1988); 2 more for tiny domains


def mix(words: Words) -> Words:
    """Finaliser of SplitMix64 (Steele et al. 2014): every output bit depends on every input bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@dataclass(frozen=True)
class Order:
    """A shuffle of range(rows) for each epoch, in O(1) memory.

    A Feistel network permutes the next power of four; walking its cycle until the value is below
    `rows` (at most 4 steps on average) makes it a bijection of range(rows).
    """

    seed: int
    rows: int

    def index(self, epoch: int, positions: Ids) -> Ids:
        """Row at each position of an epoch. positions: (n,) int64 in [0, rows) -> (n,) int64."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.rows):
            raise IndexError(f"positions must be in [0, {self.rows})")
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(ROUNDS, np.uint64)
        keys = np.asarray(state, dtype=np.uint64)
        values = self._permute(positions.astype(np.uint64), keys)
        while (outside := np.flatnonzero(values >= np.uint64(self.rows))).size:
            values[outside] = self._permute(values[outside], keys)
        return values.astype(np.int64)

    def _permute(self, values: Words, keys: Words) -> Words:
        half = np.uint64(max(1, -(-(self.rows - 1).bit_length() // 2)))
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        return (left << half) | right


@dataclass(frozen=True)
class Batches:
    """An epoch cut into global batches; the last may be smaller, no row is dropped."""

    rows: int
    batch_size: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.rows // self.batch_size)

    def positions(self, step: int) -> Ids:
        """Positions of a step's global batch, (<= batch_size,) int64. Raises IndexError."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} of an epoch of {self.steps_per_epoch}")
        start = step * self.batch_size
        return np.arange(start, min(start + self.batch_size, self.rows), dtype=np.int64)


def rank_slice(positions: Ids, rank: int, size: int) -> tuple[Ids, Weights]:
    """Rank's share of a global batch: (positions, weights), both (ceil(batch / size),).

    All ranks get equally many; padding repeats the last position at weight 0. Positions of weight 1
    over the ranks in order are exactly the global batch.
    """
    if not 0 <= rank < size:
        raise IndexError(f"rank {rank} of {size}")
    each = -(-len(positions) // size)
    wanted = np.arange(rank * each, (rank + 1) * each)
    weights = (wanted < len(positions)).astype(np.float32)
    return positions[np.minimum(wanted, len(positions) - 1)], weights
