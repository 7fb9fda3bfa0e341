"""What is measured of this project's loader, and the copies in memory that it is compared with."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Epoch = Callable[[], int]  # -> samples read

RUN_EPOCHS = 10
THREADS = (0, 1, 2, 3)  # besides the caller's own, which works along while it waits
BACKEND = ["auto"]  # as asked for on the command line


def loader_of(folder: Path, fields: tuple[str, ...], batch: int, threads: int, **more: Any) -> Any:
    from dmi_hpc.data import ShardLoader, ShardSet

    shards = ShardSet.open(folder, verify="none", backend=BACKEND[0])
    options = {"split": "all", "shuffle": "global", "batch_size": batch, "threads": threads}
    return ShardLoader(shards, fields, **{**options, **more})


def loaded(loader: Any, field: str) -> Epoch:
    """One epoch; `field` has one entry a sample."""

    def epoch() -> int:
        return sum(len(batch[field]) for batch in loader)

    return epoch


def gathered(array: Array, batch: int, buffers: int = 1) -> Epoch:
    """The shuffle ceiling: np.take of shuffled batches, order made beforehand.

    buffers: written in turn. One stays in the cache; a loader fills one while another is used.
    """
    from dmi_hpc.data.sampler import Order

    order = Order(seed=0, rows=len(array), shuffle="global")
    rows = order.index(0, np.arange(len(array), dtype=np.int64))
    batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    outs = cycle([np.empty((batch, *array.shape[1:]), array.dtype) for _ in range(buffers)])

    def epoch() -> int:
        for index, out in zip(batches, outs, strict=False):
            np.take(array, index, axis=0, out=out[: len(index)], mode="clip")
        return len(rows)

    return epoch


def copied(array: Array, batch: int, buffers: int = 1) -> Epoch:
    """The sequential ceiling: memcpy of each batch into buffers, written in turn."""
    outs = cycle([np.empty((batch, *array.shape[1:]), array.dtype) for _ in range(buffers)])

    def epoch() -> int:
        for start in range(0, len(array), batch):
            rows = array[start : start + batch]
            np.copyto(next(outs)[: len(rows)], rows)
        return len(array)

    return epoch


def read(folder: Path, batch: int) -> Epoch:
    """ShardSet.read, the plain copy, into one buffer."""
    from dmi_hpc.data import ShardSet

    shards = ShardSet.open(folder, verify="none", backend=BACKEND[0])
    field = shards.manifest.field("x")
    buffer = np.empty((batch, *field.shape), dtype=field.numpy)

    def epoch() -> int:
        for start in range(0, len(shards), batch):
            stop = min(start + batch, len(shards))
            shards.read("x", start, stop, buffer[: stop - start])
        return len(shards)

    return epoch


def verified(folder: Path, batch: int, verify: Any, epochs: int) -> Epoch:
    """Open the set anew and read it so many times."""
    from dmi_hpc.data import ShardLoader, ShardSet

    def run() -> int:
        with ShardSet.open(folder, verify=verify, backend=BACKEND[0]) as shards:
            loader = ShardLoader(shards, ("x",), split="all", shuffle="global", batch_size=batch)
            return sum(len(rows["x"]) for _ in range(epochs) for rows in loader)

    return run


def collate(batch: Any) -> dict[str, Any]:
    """What PyG's collation gives: edge_index (2, edges) of the batch, and each node's graph."""
    from dmi_hpc.data.ragged import Ragged, row_of_entry

    fields: dict[str, Any] = dict(batch.fields)
    pairs: Ragged = fields.pop("pairs")
    fields["edge_index"] = pairs.values.T
    fields["batch"] = row_of_entry(fields["z"].offsets)
    return fields


def sampler_megabytes(rows: int) -> float:
    """Peak of Python's and numpy's allocations of one of 4 ranks, from an epoch's middle on.

    Asked for 16384 positions at once, as the loader asks.
    """
    from dmi_hpc.data.sampler import Batches, Order, rank_slice

    batch, rank, size, steps = 1024, 3, 4, 64
    Order(seed=1, rows=batch, shuffle="global").index(0, np.arange(batch))  # imports of numpy
    tracemalloc.start()
    try:
        order = Order(seed=1, rows=rows, shuffle="global")
        batches = Batches(rows, batch)
        middle = batches.steps(0) // 2
        for first in range(middle, middle + 4 * steps, steps):
            wholes = (batches.positions(0, step) for step in range(first, first + steps))
            mine = [rank_slice(whole, rank, size)[0] for whole in wholes]
            order.index(1, np.concatenate(mine))
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()
