"""Batches of one rank: threads gather ahead into buffers that are used again.

Threads, not processes: a gather releases the GIL, and handing batches between processes was
measured 7 to 13 times slower than the gather itself.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar, cast

import numpy as np

from dmi_hpc.data.buffers import Buffers
from dmi_hpc.data.crew import Crew, Task
from dmi_hpc.data.permutation import Ids, mix
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.ranges import Rows
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.sampler import Batches, Order, Tail, Weights, rank_slice
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
T = TypeVar("T")

# Small batches are made several at once, to spread what numpy and threads cost a call
_INDEX_AHEAD = 16384  # positions whose rows are computed together
_CHUNK_BYTES = 4 * 2**20  # of batches that are read together ...
_CHUNK_BATCHES = 32  # ... but no more: a transform may make them much larger ...
_CHUNK_S = 0.05  # ... or take its time for each, while the loop waits for the first of them


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch, n = ceil(batch / ranks) rows.

    Fields that refer to an axis count its entries over the batch, not over their row, as int64.
    """

    fields: dict[str, Any]  # name -> (n, *shape) or Ragged
    positions: Ids  # (n,) place in the epoch, before shuffling
    rows: Ids  # (n,) row of the shard set
    weights: Weights  # (n,) 1, or 0 where a row only pads
    seed: int
    epoch: int
    start: int  # samples of the epoch that all ranks consume before this batch ...
    stop: int  # ... and with it: the position to resume from

    def bits(self, purpose: int = 0) -> Any:
        """(n,) uint64, uniform: a pure function of seed, epoch, position and purpose."""
        return random_bits(self.seed, self.epoch, self.positions, purpose)


def random_bits(seed: int, epoch: int, positions: Ids, purpose: int = 0) -> Any:
    """(n,) uint64, uniform: the same whatever the ranks, threads and batches (SplitMix64)."""
    words = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    key = seed * 0xD1342543DE82EF95 + epoch * 0x2545F4914F6CDD1D + purpose * 0xDA942042E4DD58B5
    words += np.uint64(key & (2**64 - 1))
    return mix(words)


@dataclass(frozen=True)
class _Share:
    """One rank's part of a step, before its data are read."""

    start: int
    stop: int
    positions: Ids
    weights: Weights
    rows: Ids


class Loader(Generic[T]):
    """Epochs over some rows of a shard set; the same sequence at any number of ranks and threads.

    rows: `shards.rows("train")`, or (m,) int64. order: of len(rows) rows. prepare: run on each batch
    in the thread that has read it; what it returns is what is iterated over, by default the batch. A
    batch's arrays are used again once nobody holds them (or a view, or a tensor made from one) any
    more. threads: besides the caller's own, which reads too while it waits. pin: page-locked buffers,
    for copies to a GPU beside its work.
    """

    def __init__(
        self,
        shards: ShardSet,
        rows: Rows | Ids,
        fields: Sequence[str],
        order: Order,
        *,
        batch_size: int,
        prepare: Callable[[Batch], T] | None = None,
        rank: int = 0,
        size: int = 1,
        tail: Tail = "keep",
        threads: int = 2,
        pin: bool = False,
    ) -> None:
        assert order.rows == len(rows), "the order is of other rows"
        self.shards, self.rows, self.fields, self.order = shards, rows, tuple(fields), order
        self.rank, self.size, self.threads = rank, size, threads
        self.batches = Batches(len(rows), batch_size, tail)
        self._prepare = prepare
        self._buffers = Buffers(pin=pin, idle=2 * threads + 4)
        self._full = rank_slice(np.arange(batch_size, dtype=np.int64), rank, size)
        self._most = self._longest_chunk()
        known = {name: shards.manifest.field(name) for name in fields}
        self._refers = {n: f.refers for n, f in known.items() if f.refers is not None}
        # axes that are referred to, and a field to tell how many entries each row has
        axes = {field.axis: name for name, field in known.items() if field.axis is not None}
        for axis in set(self._refers.values()) - set(axes):
            axes[axis] = next(f.name for f in shards.manifest.fields if f.axis == axis)
        self._axes = axes

    def _longest_chunk(self) -> int:
        """Batches to read in one go; in block shuffle they stay within half a window."""
        share = len(self._full[0]) * self.shards.row_bytes(self.fields)
        most = min(_CHUNK_BATCHES, int(_CHUNK_BYTES // max(share, 1)))
        if self.order.shuffle == "block":
            window = self.order.window_blocks * self.order.block_rows * self.order.parts
            most = min(most, window // (2 * self.batches.batch_size))
        return max(1, most)

    def steps(self, start: int = 0) -> int:
        """Batches from a position of an epoch to its end."""
        return self.batches.steps(start)

    def rows_of(self, epoch: int, position: int) -> Ids:
        """Rows of the set that this rank's share of the batch at a position has, padding too."""
        return self._group(epoch, position, 0, 1)[0].rows

    def continue_with(self, order: Order, position: int) -> None:
        """Take over the order of an interrupted run, which other storage or memory may not suggest.

        Raises DataError if it is of another number of rows, or its parts do not fit the batch size.
        """
        if order.rows != len(self.rows):
            raise DataError(f"an order of {order.rows} rows, found {len(self.rows)}: other rows")
        order.check_resume(position, self.batches.batch_size)
        self.steps(position)
        if order.parts > 1:
            order = replace(order, batch_size=self.batches.batch_size)
        self.order = order
        self._most = self._longest_chunk()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[T]:
        """What `prepare` makes of the batches of an epoch, from a position on."""
        stop, self._most = threading.Event(), self._longest_chunk()
        if self.threads == 0:
            for chunk in self._chunks(self._shares(epoch, start)):
                yield from self._load(epoch, chunk, stop)
            return
        waiting: deque[Task[Iterable[T]]] = deque()
        with Crew(self.threads, "dmi-loader") as crew:
            try:
                shares = self._shares(epoch, start)
                if self.order.shuffle == "block":  # the order itself takes a while
                    shares = self._shares_ahead(epoch, start, crew)
                    if self.shards.reads_blocks:
                        shares = self._windows_ahead(epoch, shares, crew)
                for chunk in self._chunks(shares):
                    waiting.append(crew.submit(partial(self._load, epoch, chunk, stop)))
                    if len(waiting) > self.threads:  # more buffers would not stay in the cache
                        yield from crew.result(waiting.popleft())
                while waiting:
                    yield from crew.result(waiting.popleft())
            finally:
                stop.set()

    def _chunks(self, shares: Iterator[_Share]) -> Iterator[list[_Share]]:
        """Shares that are read in one go: first one, then more, so that the first comes soon."""
        length = 1
        while chunk := list(itertools.islice(shares, length)):
            yield chunk
            length = min(2 * length, self._most)

    def _load(self, epoch: int, shares: list[_Share], stop: threading.Event) -> Iterable[T]:
        rows = shares[0].rows if len(shares) == 1 else np.concatenate([s.rows for s in shares])
        found = self.shards.fields(self.fields, rows, self._buffers.borrow)
        batches = self._batches(epoch, shares, found)
        if self._prepare is None:  # where there is little to do, the caller does it: others gather
            return cast(Iterable[T], list(batches) if self._refers else batches)
        started = time.monotonic()  # of what the user's transform takes, not a cold disk
        loaded = []
        for batch in batches:
            loaded.append(self._prepare(batch))
            if stop.is_set():
                break
        if len(shares) > 1 and time.monotonic() - started > _CHUNK_S:
            self._most = max(1, len(shares) // 2)
        return loaded

    def _batches(self, epoch: int, shares: list[_Share], found: dict[str, Any]) -> Iterator[Batch]:
        at = 0
        for share in shares:
            end = at + len(share.rows)
            fields = {name: _part(values, at, end) for name, values in found.items()}
            for name, axis in self._refers.items():
                fields[name] = _shifted(fields[name], self._base(axis, fields, share.rows))
            at = end
            yield Batch(
                fields=fields,
                positions=share.positions,
                rows=share.rows,
                weights=share.weights,
                seed=self.order.seed,
                epoch=epoch,
                start=share.start,
                stop=share.stop,
            )

    def _base(self, axis: str, found: dict[str, Any], rows: Ids) -> Ids:
        """Entries of an axis before each row of the batch."""
        name = self._axes[axis]
        ragged: Ragged = found[name] if name in found else self.shards.gather(name, rows)
        return ragged.offsets[:-1]

    def _group(self, epoch: int, start: int, first: int, stop: int) -> list[_Share]:
        """Shares of the steps from first to stop."""
        size, total = self.batches.batch_size, len(self.rows)
        offsets, weights = self._full
        befores = start + size * np.arange(first, stop, dtype=np.int64)
        positions = befores[:, None] + offsets  # (steps, rows of a share)
        shares = [(each, weights.copy()) for each in positions]
        if befores[-1] + size > total:
            last = self.batches.positions(start, stop - 1)
            shares[-1] = rank_slice(last, self.rank, self.size)
            positions = np.concatenate([positions[:-1].reshape(-1), shares[-1][0]])
        rows = self.rows[self.order.index(epoch, positions.reshape(-1))]
        each = len(offsets)
        return [
            _Share(before, min(before + size, total), *share, rows[k * each : (k + 1) * each])
            for k, (before, share) in enumerate(zip(befores.tolist(), shares, strict=True))
        ]

    def _groups(self, start: int) -> Iterator[tuple[int, int]]:
        """(first, stop) of steps whose rows are computed together: few at first, as chunks are."""
        steps, first, ahead = self.steps(start), 0, _INDEX_AHEAD // 64
        while first < steps:
            stop = min(steps, first + max(1, ahead // len(self._full[0])))
            yield first, stop
            first, ahead = stop, min(4 * ahead, _INDEX_AHEAD)

    def _shares(self, epoch: int, start: int) -> Iterator[_Share]:
        for first, stop in self._groups(start):
            yield from self._group(epoch, start, first, stop)

    def _shares_ahead(self, epoch: int, start: int, crew: Crew) -> Iterator[_Share]:
        """The same; the next group is computed while this one is loaded."""
        coming: deque[Task[list[_Share]]] = deque()
        for first, stop in self._groups(start):
            coming.append(crew.submit(partial(self._group, epoch, start, first, stop)))
            if len(coming) > 1:
                yield from crew.result(coming.popleft())
        while coming:
            yield from crew.result(coming.popleft())

    def _windows_ahead(self, epoch: int, shares: Iterator[_Share], crew: Crew) -> Iterator[_Share]:
        """The same; blocks of the next window are read while rows of this one are used.

        What fails there fails again, with its error, when the rows themselves are read.
        """
        order, known = self.order, set[int]()
        for share in shares:
            found = set(order.window_of(epoch, share.positions).tolist())
            for following in sorted(window + 1 for window in found - known):
                if following < order.windows:
                    for block in order.blocks(epoch, following).tolist():
                        crew.submit(partial(self._prefetch, block * order.block_rows))
            known |= found
            yield share

    def _prefetch(self, first: int) -> None:
        last = min(first + self.order.block_rows, len(self.rows))
        self.shards.prefetch(self.fields, self.rows[np.arange(first, last, dtype=np.int64)])


def _part(values: Array | Ragged, start: int, stop: int) -> Array | Ragged:
    """Some of the rows, a view."""
    if isinstance(values, Ragged):
        offsets = values.offsets[start : stop + 1]
        return Ragged(values.values[offsets[0] : offsets[-1]], offsets - offsets[0])
    return values[start:stop]


def _shifted(values: Array | Ragged, base: Ids) -> Array | Ragged:
    """Values of each row plus its base, int64: numbers of a batch may not fit a row's dtype."""
    if isinstance(values, Ragged):
        shifted = _shifted(values.values, np.repeat(base, values.lengths))
        assert not isinstance(shifted, Ragged), "of an array"
        return Ragged(shifted, values.offsets)
    wide = values.astype(np.int64, copy=False)  # if int64 already, in place: the buffer is ours
    wide += base.reshape(-1, *(1 for _ in values.shape[1:]))
    return wide
