"""Where the reader's bytes come from: entries of one stored array, numbered over all shards.

mapped   the page cache itself; one copy a node, shared by all processes. The default
ram      a private copy of the whole array
blocks   whole blocks read with pread (or past the page cache), checked, decoded, kept for a while
h5py     the oracle that the others must agree with; slow
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from dmi_hpc.data.blocks import ArrayBlocks, CheckOnce
from dmi_hpc.data.hdf5 import H5Reader
from dmi_hpc.data.mapping import Piece, map_pieces
from dmi_hpc.data.storage import free_memory, size_text
from dmi_hpc.errors import DataError, DMIError

Array = np.ndarray[Any, np.dtype[Any]]
Ids = np.ndarray[Any, np.dtype[np.int64]]

Read = Callable[[int, int, Array], None]  # entries start to stop into the array

_STEP_BYTES = 1 << 24  # that a thread copies into memory at a time
_FILLERS = 8  # threads, at most


class Source(Protocol):
    """Entries of one array. Callers check bounds; `out` is C-contiguous, of the stored dtype."""

    def take(self, entries: Ids, out: Array) -> None:
        """Entries in the order asked for."""

    def read(self, start: int, stop: int, out: Array) -> None:
        """Entries start to stop."""


class MappedSource:
    """All shards in one virtual array (see mapping.py).

    If somebody truncates a mapped file, reading what is gone ends the process with SIGBUS.
    """

    def __init__(self, blocks: ArrayBlocks, *, check: bool) -> None:
        array, self._blocks = blocks.array, blocks
        pieces = [
            Piece(blocks.path(k), stored.offset, stored.length, blocks.stamps[k])
            for k, stored in enumerate(blocks.stored)
        ]
        self._data, first = map_pieces(pieces, array.numpy, array.shape)
        self._shift = np.array(first, dtype=np.int64) - blocks.entries.starts
        self._check = CheckOnce(blocks) if check else None

    def _bytes_of(self, block: int) -> Array:
        start, stop = self._blocks.span(block)
        shift = int(self._shift[self._blocks.split(block)[0]])
        return self._data[start + shift : stop + shift].reshape(-1).view(np.uint8)

    def take(self, entries: Ids, out: Array) -> None:
        if self._check:
            self._check.touch(entries, self._bytes_of)
        if len(self._shift) > 1:
            entries = entries + self._shift[self._blocks.entries.find(entries)]
        # clip: unbuffered, and the bounds are checked by the caller
        np.take(self._data, entries, axis=0, out=out, mode="clip")

    def read(self, start: int, stop: int, out: Array) -> None:
        if self._check:
            self._check.touch_range(start, stop, self._bytes_of)
        ranges = self._blocks.entries
        while start < stop:
            shard = int(ranges.find(np.array([start]))[0])
            end = min(stop, int(ranges.ends[shard]))
            shift = int(self._shift[shard])
            out[: end - start] = self._data[start + shift : end + shift]
            out, start = out[end - start :], end


class RamSource:
    """A private copy; whole blocks are read, once, by several threads.

    check: whether the copy of each block is compared with its checksum, while it is in the cache (of
    arrays that are not compressed: else `read` does it). Raises DataError if it does not fit in the
    free memory, CorruptShardError.
    """

    def __init__(self, blocks: ArrayBlocks, read: Read, *, check: bool = False) -> None:
        array, total = blocks.array, blocks.entries.total
        size, free = total * array.entry_bytes, free_memory()
        if size > free:  # a damaged or hostile compressed set may claim any size
            raise DataError(
                f"{blocks.folder}: field {array.name!r} is {size_text(size)} in memory, of which "
                f"{size_text(free)} are free. Use backend pread, or mmap if it is not compressed."
            )
        self._data = np.empty((total, *array.shape), dtype=array.numpy)
        step = max(1, _STEP_BYTES // (blocks.per_block * array.entry_bytes))

        def fill(first: int) -> None:
            for block in range(first, min(first + step, blocks.total)):
                start, stop = blocks.span(block)
                copy = self._data[start:stop]
                read(start, stop, copy)
                if check:
                    blocks.check(block, copy.reshape(-1).view(np.uint8))

        with ThreadPoolExecutor(min(_FILLERS, len(os.sched_getaffinity(0)))) as pool:
            for _ in pool.map(fill, range(0, blocks.total, step)):
                pass  # the first error ends it

    def take(self, entries: Ids, out: Array) -> None:
        np.take(self._data, entries, axis=0, out=out, mode="clip")

    def read(self, start: int, stop: int, out: Array) -> None:
        out[...] = self._data[start:stop]


class OracleSource:
    """h5py, one entry after the other, one thread at a time.

    stored: block -> its stored bytes, to check each block before it is first read; None checks none.
    """

    def __init__(
        self,
        blocks: ArrayBlocks,
        readers: Callable[[int], H5Reader],
        stored: Callable[[int], Array] | None,
    ) -> None:
        self._blocks, self._readers, self._stored = blocks, readers, stored
        self._check = CheckOnce(blocks)
        self._lock = threading.Lock()

    def take(self, entries: Ids, out: Array) -> None:
        for place, entry in enumerate(entries.tolist()):
            self.read(entry, entry + 1, out[place : place + 1])

    def read(self, start: int, stop: int, out: Array) -> None:
        ranges = self._blocks.entries
        if self._stored is not None:
            self._check.touch_range(start, stop, self._stored)
        with self._lock:
            while start < stop:
                shard = int(ranges.find(np.array([start]))[0])
                first, end = int(ranges.starts[shard]), min(stop, int(ranges.ends[shard]))
                name = self._blocks.array.name
                self._readers(shard).read(name, start - first, end - first, out[: end - start])
                out, start = out[end - start :], end


class _Reading:
    """A block that one thread reads and others wait for."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.error: BaseException | None = None


class BlockSource:
    """Reads whole blocks into an arena of slots and gathers from there.

    Made for storage where a small read costs as much as a large one, and for compressed sets. Each
    block is checked whenever it is read. Blocks in use are pinned; of the others the one unused for
    longest gives way. slots: blocks held at once.
    """

    def __init__(
        self, blocks: ArrayBlocks, fetch: Callable[[int, Array], None], *, slots: int
    ) -> None:
        array = blocks.array
        self._blocks, self._fetch = blocks, fetch
        self._slots = max(1, min(slots, blocks.total))
        self._arena = np.empty((self._slots * blocks.per_block, *array.shape), dtype=array.numpy)
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # block -> slot, longest unused first
        self._pins: dict[int, int] = {}
        self._readings: dict[int, _Reading] = {}  # by block, going on now
        self._free = list(range(self._slots))
        self._changed = threading.Condition()

    def take(self, entries: Ids, out: Array) -> None:
        numbers = self._blocks.of(entries)
        needed = np.unique(numbers)
        if len(needed) <= self._share:
            self._take(entries, numbers, needed, out)
            return
        # more blocks than this thread may pin: some of them at a time
        order = np.argsort(numbers, kind="stable")
        firsts = np.searchsorted(numbers[order], needed[:: self._share])
        for part, places in enumerate(np.split(order, firsts[1:])):
            some = needed[part * self._share : (part + 1) * self._share]
            piece = np.empty((len(places), *out.shape[1:]), dtype=out.dtype)
            self._take(entries[places], numbers[places], some, piece)
            out[places] = piece

    @property
    def _share(self) -> int:
        """Blocks that one thread pins at once; it pins all it needs or waits with none."""
        return max(1, self._slots // 2)

    def _take(self, entries: Ids, numbers: Ids, needed: Ids, out: Array) -> None:
        with self._pinned(needed.tolist()) as slots:
            shift = np.array(slots, dtype=np.int64) * self._blocks.per_block
            shift -= self._blocks.firsts(needed)
            places = entries + shift[np.searchsorted(needed, numbers)]
            np.take(self._arena, places, axis=0, out=out, mode="clip")

    def read(self, start: int, stop: int, out: Array) -> None:
        while start < stop:
            block = int(self._blocks.of(np.array([start]))[0])
            first, end = self._blocks.span(block)
            end = min(end, stop)
            with self._pinned([block]) as (slot,):
                shift = slot * self._blocks.per_block - first
                out[: end - start] = self._arena[start + shift : end + shift]
            out, start = out[end - start :], end

    def prefetch(self, blocks: Ids) -> None:
        """Read blocks before they are asked for."""
        for block in blocks.tolist():
            with self._pinned([block]):
                pass

    @contextmanager
    def _pinned(self, blocks: list[int]) -> Iterator[list[int]]:
        """Slots of the blocks, which are there and stay until the end of the block."""
        slots, mine, held = self._claim(blocks)
        try:
            try:
                for block, slot in mine:
                    self._load(block, slot)
            except BaseException as error:
                self._settle(mine, error)
                raise
            for block, reading in held:
                reading.over.wait()
                if reading.error is not None:  # its slot may be another block's by now
                    raise self._as_seen(block, reading.error) from reading.error
            yield slots
        finally:
            with self._changed:
                for block in blocks:
                    self._pins[block] -= 1
                    if self._pins[block] == 0:
                        del self._pins[block]
                self._changed.notify_all()

    def _claim(
        self, blocks: list[int]
    ) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, _Reading]]]:
        """(slots, blocks that this thread must read, blocks that others are reading)."""
        wanted = set(blocks)
        with self._changed:
            while True:
                missing = [b for b in blocks if b not in self._slot_of]
                idle = [b for b in self._slot_of if b not in self._pins and b not in wanted]
                if len(missing) <= len(self._free) + len(idle):
                    break
                self._changed.wait()
            mine = []
            for block in missing:
                if not self._free:
                    self._free.append(self._slot_of.pop(idle.pop(0)))
                slot = self._slot_of[block] = self._free.pop()
                self._readings[block] = _Reading()
                mine.append((block, slot))
            for block in blocks:
                self._pins[block] = self._pins.get(block, 0) + 1
                self._slot_of.move_to_end(block)
            own = {block for block, _ in mine}
            held = [(b, r) for b in blocks if b not in own and (r := self._readings.get(b))]
            return [self._slot_of[b] for b in blocks], mine, held

    def _load(self, block: int, slot: int) -> None:
        start, stop = self._blocks.span(block)
        first = slot * self._blocks.per_block
        raw = self._arena[first : first + stop - start].reshape(-1).view(np.uint8)
        self._fetch(block, raw)
        with self._changed:
            self._readings.pop(block).over.set()

    def _as_seen(self, block: int, error: BaseException) -> DMIError:
        """Another thread's error, for those that wait for its block."""
        if isinstance(error, DMIError):
            return type(error)(str(error))
        return DataError(
            f"{self._blocks.where(block)}: another thread failed to read it: {error!r}"
        )

    def _settle(self, mine: list[tuple[int, int]], error: BaseException) -> None:
        """Blocks that could not be read give their slots back."""
        with self._changed:
            for block, slot in mine:
                reading = self._readings.pop(block, None)
                if reading is not None:
                    del self._slot_of[block]
                    self._free.append(slot)
                    reading.error = error
                    reading.over.set()
