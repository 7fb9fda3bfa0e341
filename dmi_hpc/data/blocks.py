"""Blocks of a stored array over all shards: where each lies, and whether its bytes are whole."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dmi_hpc.data.manifest import BLOCK_ENTRY, Field, Manifest, ShardRecord
from dmi_hpc.data.ranges import Ranges
from dmi_hpc.data.shardfiles import Stamp, open_same
from dmi_hpc.errors import CorruptShardError

Array = np.ndarray[Any, np.dtype[Any]]
Ids = np.ndarray[Any, np.dtype[np.int64]]

AGAIN = (
    "Repair it from a copy (dmi data verify --repair-from COPY), or delete the shard and repeat the "
    "command that made the set."
)


class ArrayBlocks:
    """Numbers the entries and blocks of one array over all shards; reads its block tables.

    stamps: of the shard files that are meant; without them, whatever has their names.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        array: Field,
        stamps: Sequence[Stamp] | None = None,
    ) -> None:
        plan, self.array = manifest.plan, array
        self.folder, self.shards = folder, manifest.shards
        self.stamps: Sequence[Stamp | None] = stamps or [None] * len(manifest.shards)
        self.compressed = plan.compressed(array)
        self.stored = [shard.arrays[array.name] for shard in manifest.shards]
        self.entries = Ranges([stored.length for stored in self.stored])
        self.lengths = self.entries.ends - self.entries.starts
        self.per_block = plan.block_entries(array)
        counts = [plan.blocks(array, stored.length) for stored in self.stored]
        self.counts = counts
        self.base = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._tables: dict[int, Array] = {}

    @property
    def mappable(self) -> bool:
        """Whether all shards hold the array as it is in memory, from the start of a page on."""
        return not self.compressed and all(s.offset % mmap.PAGESIZE == 0 for s in self.stored)

    @property
    def total(self) -> int:
        """Blocks of all shards."""
        return int(self.base[-1])

    def path(self, shard: int) -> Path:
        return self.folder / self.shards[shard].file

    def locate(self, entries: Ids) -> tuple[Ids, Ids]:
        """(shard, entry within it) of entries numbered over all shards."""
        if len(self.stored) == 1:
            return np.zeros_like(entries), entries
        shards = self.entries.find(entries)
        return shards, entries - self.entries.starts[shards]

    def of(self, entries: Ids) -> Ids:
        """Number, over all shards, of the block that holds each entry."""
        shards, local = self.locate(entries)
        return self.base[shards] + local // self.per_block

    def split(self, block: int) -> tuple[int, int]:
        """(shard, block within it)."""
        shard = int(np.searchsorted(self.base, block, side="right")) - 1
        return shard, block - int(self.base[shard])

    def span(self, block: int) -> tuple[int, int]:
        """(first entry, one past the last) of a block, numbered over all shards."""
        shard, local = self.split(block)
        first = int(self.entries.starts[shard])
        start = local * self.per_block
        stop = min(start + self.per_block, self.stored[shard].length)
        return first + start, first + stop

    def firsts(self, blocks: Ids) -> Ids:
        """First entry of each block, numbered over all shards."""
        shards = np.searchsorted(self.base, blocks, side="right") - 1
        first: Ids = self.entries.starts[shards] + (blocks - self.base[shards]) * self.per_block
        return first

    def table(self, shard: int) -> Array:
        """(blocks, 3) uint64 of a shard: offset, stored bytes, xxh3. Checked, then kept."""
        found = self._tables.get(shard)
        if found is None:
            found = self._tables[shard] = self._read_table(shard)
        return found

    def _read_table(self, shard: int) -> Array:
        stored, path = self.stored[shard], self.path(shard)
        try:
            with os.fdopen(open_same(path, self.stamps[shard]), "rb") as stream:
                raw = os.pread(stream.fileno(), self.counts[shard] * BLOCK_ENTRY, stored.blocks)
        except OSError as error:
            raise CorruptShardError(
                f"{path}: field {self.array.name!r}: its block table cannot be read: {error}. {AGAIN}"
            ) from error
        found = xxhash.xxh3_64_hexdigest(raw)
        if found != stored.xxh3:
            raise CorruptShardError(
                f"{path}: field {self.array.name!r}: its block table has xxh3 {found}, expected "
                f"{stored.xxh3}. {AGAIN}"
            )
        table = np.frombuffer(raw, dtype="<u8").reshape(-1, 3)
        self._check_places(table, shard, path)
        return table

    def _check_places(self, table: Array, shard: int, path: Path) -> None:
        """A table is believed only as far as the file reaches."""
        record: ShardRecord = self.shards[shard]
        limit = record.bytes
        offsets, sizes = table[:, 0], table[:, 1]
        bad = (offsets > limit) | (sizes > limit) | (offsets + np.minimum(sizes, limit) > limit)
        if not self.compressed:
            stored, whole = self.stored[shard], self.per_block * self.array.entry_bytes
            expected = np.arange(len(table), dtype=np.uint64) * np.uint64(whole)
            bad |= offsets != expected + np.uint64(stored.offset)
            left = stored.length * self.array.entry_bytes - np.arange(len(table)) * whole
            bad |= sizes != np.minimum(left, whole).astype(np.uint64)
        if bad.any():
            block = int(np.flatnonzero(bad)[0])
            raise CorruptShardError(
                f"{path}: field {self.array.name!r}, block {block}: the block table places it at "
                f"bytes {offsets[block]} + {sizes[block]}, outside its array. {AGAIN}"
            )

    def check(self, block: int, data: Any) -> None:
        """Raise CorruptShardError unless these are the stored bytes of the block."""
        shard, local = self.split(block)
        expected, found = int(self.table(shard)[local, 2]), xxhash.xxh3_64_intdigest(data)
        if found != expected:
            raise self.corrupt(block, f"expected xxh3 {expected:016x}, found {found:016x}")

    def corrupt(self, block: int, what: str) -> CorruptShardError:
        """The error of a block whose bytes are wrong."""
        return CorruptShardError(f"{self.where(block)}: {what}. {AGAIN}")

    def where(self, block: int) -> str:
        """File, field, block and entries, for errors."""
        shard, local = self.split(block)
        start, stop = self.span(block)
        first = int(self.entries.starts[shard])
        return (
            f"{self.path(shard)}: field {self.array.name!r}, block {local} (entries {start - first} "
            f"to {stop - first - 1} of the shard)"
        )


BytesOf = Callable[[int], Array]  # block -> its stored bytes


class CheckOnce:
    """Checks each block the first time that it is touched; afterwards asking costs nothing.

    Without a lock: two threads may check one block, which is harmless; and a fork copies no lock.
    """

    def __init__(self, blocks: ArrayBlocks) -> None:
        self._blocks = blocks
        self._unchecked = np.ones(blocks.total, dtype=bool)
        self._left = blocks.total

    def touch(self, entries: Ids, bytes_of: BytesOf) -> None:
        """Before these entries are read."""
        if self._left:
            numbers = self._blocks.of(entries)
            self._check(np.unique(numbers[self._unchecked[numbers]]), bytes_of)

    def touch_range(self, start: int, stop: int, bytes_of: BytesOf) -> None:
        if self._left and stop > start:
            first, last = self._blocks.of(np.array([start, stop - 1], dtype=np.int64))
            self._check(first + np.flatnonzero(self._unchecked[first : last + 1]), bytes_of)

    def _check(self, numbers: Ids, bytes_of: BytesOf) -> None:
        for block in numbers.tolist():
            self._blocks.check(block, bytes_of(block))
        self._unchecked[numbers] = False
        self._left = int(np.count_nonzero(self._unchecked))
