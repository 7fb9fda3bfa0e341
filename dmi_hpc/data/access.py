"""The order in which a set is read, as its storage or its user wants it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dmi_hpc.data.manifest import Manifest
from dmi_hpc.data.sampler import Order, Shuffle

if TYPE_CHECKING:
    from dmi_hpc.data.reader import ShardSet


WINDOW_BYTES = 64 * 2**20  # of block shuffle, where only the shuffle was asked for


def order_of(
    shards: ShardSet,
    rows: int,
    seed: int,
    *,
    shuffle: Shuffle | None = None,
    parts: int = 1,
    batch_size: int = 1,
) -> Order:
    """The order in which `rows` rows of a set are read; shuffle: None takes what suits the set."""
    window = shards.access.window_bytes or WINDOW_BYTES
    return Order(
        seed=seed,
        rows=rows,
        shuffle=shuffle or shards.access.shuffle,
        block_rows=rows_of_a_block(shards.manifest),
        window_blocks=max(1, window // shards.manifest.plan.block_bytes),
        parts=parts,
        batch_size=batch_size if parts > 1 else 1,
    )


def rows_of_a_block(manifest: Manifest) -> int:
    """Rows that one block of the largest field holds: what one read of a cold disk brings."""
    sizes = []
    for field in manifest.fields:
        entries = sum(shard.arrays[field.name].length for shard in manifest.shards)
        sizes.append(entries * field.entry_bytes / manifest.rows)
    return max(1, math.floor(manifest.plan.block_bytes / max(sizes)))
