"""The reader of a shard set: any rows of any field, by one of several back ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np

from dmi_hpc.data.blockreader import BlockReader
from dmi_hpc.data.blocks import AGAIN, ArrayBlocks
from dmi_hpc.data.committed import check_files, check_size
from dmi_hpc.data.manifest import (
    SPLITS,
    Field,
    Manifest,
    SplitName,
    axis_array,
    read_manifest,
)
from dmi_hpc.data.opened import Opened, PerProcess
from dmi_hpc.data.ragged import Ragged, offsets_of, places_of
from dmi_hpc.data.ranges import Ranges, Rows
from dmi_hpc.data.shardfiles import Stamp
from dmi_hpc.data.sources import BlockSource, MappedSource, OracleSource, RamSource, Source
from dmi_hpc.data.storage import Access, access_of
from dmi_hpc.errors import CorruptShardError, DataError

Array = np.ndarray[Any, np.dtype[Any]]
Ids = np.ndarray[Any, np.dtype[np.int64]]
Backend = Literal["auto", "mmap", "pread", "direct", "ram", "h5py"]
Verify = Literal["open", "read", "none"]
Allocate = Callable[[str, tuple[int, ...], np.dtype[Any]], Array]

ARENA_BYTES = 256 * 2**20  # of blocks that pread and direct keep, an array


def new_array(_: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Fresh memory for a field."""
    return np.empty(shape, dtype=dtype)


class ShardSet:
    """All rows of a committed shard set, numbered over all shards.

    Back ends: "mmap" reads through the page cache, one copy a node; "pread" and "direct" (O_DIRECT)
    read whole blocks, for storage where small reads are slow; "ram" holds a private copy; "h5py" is
    the oracle. "auto" takes what suits the storage; `access.reason` says why. Safe to use from
    several threads and after a fork. Pickled, it is opened by its path where it is unpickled, and its
    bytes are not compared once more.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        access: Access,
        stamps: Sequence[Stamp],
        check: bool = False,
        arena_bytes: int = ARENA_BYTES,
    ) -> None:
        self.path, self.manifest = path, manifest
        self.access, self.backend = access, access.backend
        self._stamps, self._check, self._arena_bytes = stamps, check, arena_bytes
        self._ranges = Ranges([shard.rows for shard in manifest.shards])
        self._blocks: dict[str, ArrayBlocks] = {}
        files = [path / shard.file for shard in manifest.shards]
        direct = self.backend == "direct"
        self._opened = PerProcess(
            Opened(manifest.plan, list(zip(files, stamps, strict=True)), direct=direct)
        )

    @classmethod
    def open(
        cls,
        path: Path | str,
        *,
        verify: Verify = "open",
        backend: Backend = "auto",
        arena_bytes: int = ARENA_BYTES,
        processes_on_node: int = 1,
    ) -> ShardSet:
        """Check every shard's existence and size, and its bytes as `verify` says.

        verify: "open" compares every file's checksum and offsets now; "read" each block's checksum
        when it is first read, by any back end; "none" nothing more. arena_bytes: that "pread" and
        "direct" may hold of each field. processes_on_node: that read sets; "auto" shares the memory
        among them.
        Raises DataError (no set), FormatVersionError (of another version), CorruptShardError (names
        the file and what was expected and found), also later, if the set has been replaced.
        """
        path = Path(path).absolute()  # files are opened later, maybe in another folder
        manifest = read_manifest(path)
        stamps = _stamps(path, manifest)
        if verify == "open":
            check_files(path, manifest)
        access = _access(path, manifest, backend, processes_on_node)
        check = verify == "read"
        return cls(
            path, manifest, access=access, stamps=stamps, check=check, arena_bytes=arena_bytes
        )

    def __reduce__(self) -> tuple[Any, ...]:
        options = (self.access, self._check, self._arena_bytes)
        return _open_again, (self.path, self.manifest.identity, *options)

    def __len__(self) -> int:
        return self.manifest.rows

    def rows(self, split: SplitName | Literal["all"]) -> Rows:
        """Row numbers of a split, ascending."""
        shards = self.manifest.shards
        starts = self._ranges.starts.tolist()
        if split == "all":
            return Rows([0], [len(self)])
        if split not in SPLITS:
            raise DataError(f"no split {split!r}; expected all, {', '.join(SPLITS)}")
        index = SPLITS.index(split)
        before = [sum(shard.split_rows[:index]) for shard in shards]
        first = [start + skip for start, skip in zip(starts, before, strict=True)]
        return Rows(first, [shard.split_rows[index] for shard in shards])

    @overload
    def gather(self, field: str, rows: Ids | Rows, out: Array) -> Array: ...
    @overload
    def gather(self, field: str, rows: Ids | Rows, out: None = None) -> Any: ...
    def gather(self, field: str, rows: Ids | Rows, out: Array | None = None) -> Any:
        """Rows of a field in the order asked for: (n, *shape), or Ragged; copied (into `out`).

        out: for dense fields, C-contiguous, of the field's dtype. Raises IndexError if a row is
        outside [0, rows of the set), DataError for an unknown field, CorruptShardError.
        """
        found = self.manifest.field(field)
        numbers = self.numbers(rows)
        if found.axis is not None:
            if out is not None:
                raise ValueError(f"{field!r} is ragged: its size is not known beforehand")
            return self._ragged(found, *self._entries(found.axis, numbers))
        out = _checked(found, len(numbers), out)
        self._source(found).take(numbers, out)
        return out

    def fields(
        self, names: Sequence[str], rows: Ids | Rows, allocate: Allocate = new_array
    ) -> dict[str, Any]:
        """Several fields of the same rows; faster than one by one where they share an axis.

        allocate: (field, shape, dtype) -> the array to fill, C-contiguous.
        """
        numbers = self.numbers(rows)
        consecutive = _consecutive(numbers)  # read in order: one copy is faster than one a row
        entries: dict[str, tuple[Ids, Ids]] = {}
        found: dict[str, Any] = {}
        for name in names:
            field = self.manifest.field(name)
            if field.axis is None:
                found[name] = allocate(name, (len(numbers), *field.shape), field.numpy)
                if consecutive:
                    self._source(field).read(int(numbers[0]), int(numbers[-1]) + 1, found[name])
                else:
                    self._source(field).take(numbers, found[name])
                continue
            if field.axis not in entries:
                entries[field.axis] = self._entries(field.axis, numbers)
            found[name] = self._ragged(field, *entries[field.axis], allocate)
        return found

    def read(self, field: str, start: int, stop: int, out: Array | None = None) -> Array:
        """Consecutive rows of a dense field: a plain copy, the fastest way to read in order."""
        found = self.manifest.field(field)
        if found.axis is not None:
            raise ValueError(f"{field!r} is ragged: use gather")
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} of a set of {len(self)}")
        out = _checked(found, stop - start, out)
        self._source(found).read(start, stop, out)
        return out

    @property
    def reads_blocks(self) -> bool:
        """Whether the back end reads whole blocks, so that it pays to say early which."""
        return self.backend in ("pread", "direct")

    def row_bytes(self, names: Sequence[str]) -> float:
        """Mean bytes of one row of these fields."""
        total = 0
        for name in names:
            field = self.manifest.field(name)
            total += field.entry_bytes * self._numbered(field).entries.total
        return total / len(self)

    def prefetch(self, names: Sequence[str], rows: Ids) -> None:
        """Bring the blocks of these rows near, for back ends that read blocks; else nothing."""
        for name in names:
            field = self.manifest.field(name)
            if field.axis is None:
                self._prefetch(field, rows)
                continue
            starts, lengths = self._entries(field.axis, rows)
            some = lengths > 0
            self._prefetch(field, np.concatenate([starts[some], (starts + lengths - 1)[some]]))

    def _prefetch(self, array: Field, entries: Ids) -> None:
        source = self._source(array)
        if isinstance(source, BlockSource):
            source.prefetch(np.unique(self._numbered(array).of(entries)))

    def offsets(self, axis: str) -> Ids:
        """Offsets of all rows' entries over the whole set, (rows + 1,) int64."""
        _, lengths = self._entries(axis, np.arange(len(self), dtype=np.int64))
        return offsets_of(lengths)

    def numbers(self, rows: Ids | Rows) -> Ids:
        """Row numbers as an array, (n,) int64. Raises IndexError if one is not of the set."""
        given = np.asarray(rows)
        if given.size and given.dtype.kind not in "iu":
            raise IndexError(f"rows: expected an array of row numbers, found {given.dtype}")
        numbers = given.astype(np.int64, copy=False)
        if numbers.size and (numbers.min() < 0 or numbers.max() >= len(self)):
            raise IndexError(f"rows {numbers.min()} to {numbers.max()} of a set of {len(self)}")
        return numbers

    def _entries(self, axis: str, rows: Ids) -> tuple[Ids, Ids]:
        """(first entry over all shards, number of entries) of each row."""
        array = axis_array(axis)
        shards = self._ranges.find(rows)
        source, places = self._source(array), rows + shards  # each shard has one offset more
        low, high = np.empty((2, len(rows)), dtype=np.int64)
        source.take(places, low)
        source.take(places + 1, high)
        values = next(field for field in self.manifest.fields if field.axis == axis)
        numbered = self._numbered(values)
        limits = numbered.lengths[shards]
        wrong = np.flatnonzero((low < 0) | (high < low) | (high > limits))
        if wrong.size:
            row = int(wrong[0])
            raise CorruptShardError(
                f"{numbered.path(int(shards[row]))}: axis {axis!r}: row {rows[row]} of the set has "
                f"entries {low[row]} to {high[row]} of {limits[row]}. {AGAIN}"
            )
        return low + numbered.entries.starts[shards], high - low

    def _ragged(
        self, field: Field, starts: Ids, lengths: Ids, allocate: Allocate = new_array
    ) -> Ragged:
        places = places_of(starts, lengths)
        values = allocate(field.name, (len(places), *field.shape), field.numpy)
        self._source(field).take(places, values)
        return Ragged(values, offsets_of(lengths))

    def _numbered(self, array: Field) -> ArrayBlocks:
        found = self._blocks.get(array.name)
        if found is None:
            new = ArrayBlocks(self.path, self.manifest, array, self._stamps)
            found = self._blocks.setdefault(array.name, new)
        return found

    def _source(self, array: Field) -> Source:
        return self._opened().source(array.name, lambda opened: self._new_source(array, opened))

    def _new_source(self, array: Field, opened: Opened) -> Source:
        blocks = self._numbered(array)
        if self.backend in ("mmap", "ram") and blocks.mappable:
            if self.backend == "mmap":
                return MappedSource(blocks, check=self._check)
            return RamSource(blocks, MappedSource(blocks, check=False).read, check=self._check)
        reader = BlockReader(
            blocks,
            opened.handle,
            self.manifest.plan.compression,
            check=self._check,
            direct=self.backend == "direct",
        )
        if self.backend == "h5py":
            return OracleSource(blocks, opened.reader, reader.stored if self._check else None)
        if not self.reads_blocks:  # a copy, also of small shards where pages are of 64 KiB
            return RamSource(blocks, reader.read)
        slots = self._arena_bytes // (blocks.per_block * array.entry_bytes)
        return BlockSource(blocks, reader, slots=slots)

    def close(self) -> None:
        """Close all files: each when no thread reads from it any more, maps with their last array."""
        self._opened().close()

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _consecutive(rows: Ids) -> bool:
    return bool(
        len(rows) > 1 and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all()
    )


def _checked(field: Field, rows: int, out: Array | None) -> Array:
    """`out` if these rows fit it exactly, else ValueError; a new array for None."""
    shape = (rows, *field.shape)
    if out is None:
        return np.empty(shape, dtype=field.numpy)
    if out.shape != shape or out.dtype != field.numpy or not out.flags.c_contiguous:
        raise ValueError(
            f"out: expected C-contiguous {field.numpy} {shape}, found {out.dtype} {out.shape}"
        )
    return out


def _access(path: Path, manifest: Manifest, backend: Backend, processes_on_node: int) -> Access:
    compressed = manifest.plan.compression is not None
    if backend == "auto":
        return access_of(path, manifest, processes_on_node=processes_on_node)
    if backend == "mmap" and compressed:
        raise DataError(
            f"{path}: a compressed set cannot be mapped: expected backend pread, direct, ram or auto"
        )
    if backend in ("pread", "direct"):
        return Access(backend, "block", 0, f"{backend} was asked for")
    return Access(backend, "global", 0, f"{backend} was asked for")


def _stamps(path: Path, manifest: Manifest) -> list[Stamp]:
    """Of the shards, which are there and as long as they were."""
    for shard in manifest.shards:
        check_size(path / shard.file, shard)
    return [Stamp.of(path / shard.file) for shard in manifest.shards]


def _open_again(
    path: Path, identity: str, access: Access, check: bool, arena_bytes: int
) -> ShardSet:
    """A set that was pickled. Raises DataError if it is another one here or by now."""
    manifest = read_manifest(path)
    if manifest.identity != identity:
        raise DataError(
            f"{path}: expected data set {identity}, found {manifest.identity}: replaced since it was "
            "pickled, or another one on this node"
        )
    stamps = _stamps(path, manifest)
    return ShardSet(
        path, manifest, access=access, stamps=stamps, check=check, arena_bytes=arena_bytes
    )
