"""The order in which a set is read, as its storage or its user wants it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dmi_hpc.data.sampler import Order, Shuffle

if TYPE_CHECKING:
    from dmi_hpc.data.reader import ShardSet


# of block shuffle, where the shuffle was asked for: alike on all machines
WINDOW_BYTES = 64 * 2**20
MOST_PARTS = 64


def order_of(
    shards: ShardSet,
    fields: Sequence[str],
    rows: int,
    *,
    batch_size: int,
    seed: int,
    shuffle: Shuffle | None = None,
    parts: int | None = None,
) -> Order:
    """The order in which `rows` rows of a set are read.

    fields: that are read. shuffle: None takes what suits the set where it lies, and may differ from
    node to node: ranks must agree on one. parts: None takes 1, or for block shuffle what lets each of
    many ranks read its own part of the set only; never a matter of the number of ranks.
    """
    window = (shards.access.window_bytes if shuffle is None else 0) or WINDOW_BYTES
    shuffle = shuffle or shards.access.shuffle
    blocks = max(1, window // shards.manifest.plan.block_bytes)
    if parts is None:
        # a power of two: so is the number of ranks, mostly
        parts = math.gcd(batch_size, MOST_PARTS) if shuffle == "block" else 1
        while parts > blocks:
            parts //= 2
    return Order(
        seed=seed,
        rows=rows,
        shuffle=shuffle,
        block_rows=rows_of_a_block(shards, fields),
        window_blocks=max(1, blocks // parts),
        parts=parts,
        batch_size=batch_size if parts > 1 else 1,
    )


def rows_of_a_block(shards: ShardSet, fields: Sequence[str]) -> int:
    """Rows that one block of the largest of these fields holds: what a read of a cold disk brings."""
    largest = max(shards.row_bytes([name]) for name in fields)
    return max(1, math.floor(shards.manifest.plan.block_bytes / max(1.0, largest)))
