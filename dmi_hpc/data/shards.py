"""Shard files and the reader of a whole set. The only file importing h5py.

A field is one contiguous, 4096-aligned dataset, so that its rows lie at known byte offsets: reading
is a memory map and one `np.take`, as fast as a gather from RAM and 70 to 200 times faster than
h5py's own indexing of small rows. h5py only lays files out and checks them.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import h5py
import numpy as np
import xxhash

from dmi_hpc.data.manifest import (
    SPLIT,
    SPLITS,
    Field,
    Manifest,
    ShardRecord,
    SplitName,
    read_manifest,
)
from dmi_hpc.errors import CorruptShardError, DataError
from dmi_hpc.files import atomic_file

Array = np.ndarray[Any, np.dtype[Any]]

PAGE = 4096  # datasets start at multiples of it: page-aligned maps, O_DIRECT
_AGAIN = "Delete the file and repeat the command that made the set: only this shard is made again."


def write_shard(
    path: Path, arrays: Mapping[str, Array], fields: Sequence[Field], fingerprint: str
) -> ShardRecord:
    """Write arrays (rows, *shape) as one shard; atomic, durable, equal data give equal bytes.

    fingerprint: of the plan; kept in the file, so that an interrupted build knows its own shards.
    Raises DataError if the arrays are not what `fields` say, OSError (ENOSPC) if the disk is full;
    then nothing is left behind.
    """
    rows = len(arrays[fields[0].name]) if fields[0].name in arrays else 0
    stored = {field.name: _as_stored(arrays, field, rows) for field in fields}
    offsets, pieces = _lay_out(stored, fields, fingerprint)
    pieces |= {offsets[name]: _raw(array) for name, array in stored.items()}
    with atomic_file(path) as temp:
        with temp.open("wb") as stream:
            for offset in sorted(pieces):
                assert stream.tell() == offset, "the pieces of a shard leave no gap"
                stream.write(pieces[offset])
        size, checksum = temp.stat().st_size, file_checksum(temp)
    return ShardRecord(file=path.name, rows=rows, bytes=size, xxh3=checksum, offsets=offsets)


def _as_stored(arrays: Mapping[str, Array], field: Field, rows: int) -> Array:
    if field.name not in arrays:
        raise DataError(f"field {field.name!r} is missing; found {', '.join(arrays) or 'none'}")
    array = arrays[field.name]
    wanted, found = (rows, *field.shape), array.shape
    if found != wanted or array.dtype.newbyteorder("<") != field.numpy:
        raise DataError(
            f"field {field.name!r}: expected {field.dtype} {wanted}, found {array.dtype} {found}"
        )
    return np.ascontiguousarray(array, dtype=field.numpy)


def _raw(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _lay_out(
    arrays: Mapping[str, Array], fields: Sequence[Field], fingerprint: str
) -> tuple[dict[str, int], dict[int, bytes | memoryview]]:
    """Offset of each field in its shard, and all other bytes of the file by their offset.

    HDF5 lays the file out in memory, where the data stay holes: on a full disk HDF5 fails with
    errors of its own, and keeps the deleted file open.
    """
    offsets: dict[str, int] = {}
    pieces: dict[int, bytes | memoryview] = {}
    with os.fdopen(os.memfd_create("shard"), "w+b") as scratch:
        with h5py.File(scratch, "w", alignment_threshold=1, alignment_interval=PAGE) as file:
            _describe(file, {"format": "dmi-shard", "fingerprint": fingerprint})
            for field in fields:
                offsets[field.name] = _add_dataset(file, field, arrays[field.name])
        start = 0
        for name in sorted(offsets, key=lambda name: offsets[name]):
            scratch.seek(start)
            pieces[start] = scratch.read(offsets[name] - start)
            start = offsets[name] + arrays[name].nbytes
        scratch.seek(start)
        pieces[start] = scratch.read()
    return offsets, pieces


def _add_dataset(file: h5py.File, field: Field, array: Array) -> int:
    """An empty contiguous dataset; returns the offset of its first element."""
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_layout(h5py.h5d.CONTIGUOUS)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    data = file.create_dataset(field.name, array.shape, array.dtype, dcpl=early, track_times=False)
    checksum = xxhash.xxh3_64_hexdigest(_raw(array))
    _describe(data, {"unit": field.unit, "description": field.description, "xxh3": checksum})
    return int(data.id.get_offset())


def _describe(node: Any, attributes: Mapping[str, str]) -> None:
    for name, text in attributes.items():
        raw = text.encode()
        node.attrs.create(name, raw, dtype=h5py.string_dtype("utf-8", max(1, len(raw))))


def file_checksum(path: Path) -> str:
    """xxh3_64 of a whole non-empty file, 16 hexadecimal digits."""
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return xxhash.xxh3_64_hexdigest(data)


def recover_shard(
    path: Path, rows: int, fields: Sequence[Field], fingerprint: str
) -> tuple[ShardRecord, dict[str, Array]] | None:
    """A whole shard of an interrupted build with its data; None if absent or damaged.

    Raises DataError if the shard belongs to another plan.
    """
    if not path.exists():
        return None
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = bytes(file.attrs["fingerprint"]).decode()
            if found != fingerprint:
                raise DataError(
                    f"{path}: a shard of another, unfinished data set (plan {found}, expected "
                    f"{fingerprint}). Choose another folder, or delete this one."
                )
            offsets = {field.name: int(file[field.name].id.get_offset()) for field in fields}
            sums = {field.name: bytes(file[field.name].attrs["xxh3"]).decode() for field in fields}
        arrays = {f.name: _read(path, f, rows, offsets[f.name]) for f in fields}
    except (OSError, KeyError, TypeError, UnicodeDecodeError, _ShortRead):
        return None
    if any(xxhash.xxh3_64_hexdigest(_raw(arrays[name])) != sums[name] for name in arrays):
        return None
    size, checksum = path.stat().st_size, file_checksum(path)
    record = ShardRecord(file=path.name, rows=rows, bytes=size, xxh3=checksum, offsets=offsets)
    return record, arrays


class _ShortRead(Exception):
    pass


def _read(path: Path, field: Field, rows: int, offset: int) -> Array:
    count = rows * field.row_bytes
    raw = np.fromfile(path, dtype=np.uint8, count=count, offset=offset)
    if len(raw) < count:
        raise _ShortRead
    return raw.view(field.numpy).reshape(rows, *field.shape)


class ShardSet:
    """All rows of a committed shard set, memory-mapped. Rows are numbered over all shards."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self._files: list[Array] = [_map(path / shard.file) for shard in manifest.shards]
        self._views: dict[str, list[Array]] = {}

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> ShardSet:
        """Check every shard's existence and size; `verify` also its checksum and offsets.

        Raises DataError (no set), FormatVersionError (a newer one), CorruptShardError (names the
        shard, what was expected and what was found).
        """
        manifest = read_manifest(path)
        for shard in manifest.shards:
            check_shard(path / shard.file, shard, manifest.fields, verify=verify)
        return cls(path, manifest)

    def __len__(self) -> int:
        return self.manifest.rows

    def rows(self, split: SplitName | Literal["all"]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Row numbers of a split, ascending, (n,) int64."""
        if split == "all":
            return np.arange(len(self), dtype=np.int64)
        stored = np.concatenate(self._field_views(SPLIT.name))
        return np.flatnonzero(stored == SPLITS.index(split)).astype(np.int64)

    def gather(self, field: str, rows: Array, out: Array | None = None) -> Array:
        """Rows of a field in the order asked for, (len(rows), *shape), copied (into `out`).

        Raises IndexError if a row is outside [0, rows of the set), DataError for an unknown field.
        """
        views = self._field_views(field)
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of a set of {len(self)}")
        if out is None:
            out = np.empty((len(rows), *views[0].shape[1:]), dtype=views[0].dtype)
        if len(views) == 1:
            # clip: unbuffered, and the bounds are checked above
            return np.take(views[0], rows, axis=0, out=out, mode="clip")
        shards, local = np.divmod(rows, self.manifest.rows_per_shard)
        order = np.argsort(shards, kind="stable")
        used, starts = np.unique(shards[order], return_index=True)
        bounds = [*starts.tolist(), len(rows)]
        for shard, (start, stop) in zip(used, itertools.pairwise(bounds), strict=True):
            places = order[start:stop]
            out[places] = views[shard].take(local[places], axis=0)
        return out

    def fields(self, names: Sequence[str], rows: Array) -> dict[str, Array]:
        """Several fields of the same rows."""
        return {name: self.gather(name, rows) for name in names}

    def _field_views(self, name: str) -> list[Array]:
        assert self._files, "the shard set is closed"
        if name not in self._views:
            field = self.manifest.field(name)
            self._views[name] = [
                file[(start := shard.offsets[name]) : start + shard.rows * field.row_bytes]
                .view(field.numpy)
                .reshape(shard.rows, *field.shape)
                for file, shard in zip(self._files, self.manifest.shards, strict=True)
            ]
        return self._views[name]

    def close(self) -> None:
        """Unmap all files."""
        self._views.clear()
        self._files.clear()  # the last reference to each map: this closes it

    def __enter__(self) -> ShardSet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _map(path: Path) -> Array:
    try:
        # a plain view: indexing the memmap subclass is three times slower
        return np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise DataError(
            f"{path}: too many open files, each shard needs one. Raise the limit (ulimit -n) or "
            "build the set with more rows per shard."
        ) from None


def check_shard(path: Path, shard: ShardRecord, fields: Sequence[Field], *, verify: bool) -> None:
    """Raise CorruptShardError unless the file is the one that was committed."""
    expected = f"expected {shard.bytes} bytes with checksum xxh3 {shard.xxh3}"
    if not path.is_file():
        raise CorruptShardError(f"{path}: missing; {expected}. {_AGAIN}")
    size = path.stat().st_size
    if size == 0 or (size != shard.bytes and not verify):
        raise CorruptShardError(f"{path}: {expected}, found {size} bytes. {_AGAIN}")
    if not verify:
        return
    checksum = file_checksum(path)
    if (size, checksum) != (shard.bytes, shard.xxh3):
        raise CorruptShardError(
            f"{path}: {expected}, found {size} bytes with checksum xxh3 {checksum}. {_AGAIN}"
        )
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = {field.name: int(file[field.name].id.get_offset()) for field in fields}
    except (OSError, KeyError, TypeError) as error:
        raise CorruptShardError(f"{path}: not readable as HDF5: {error}. {_AGAIN}") from error
    if found != shard.offsets:
        raise CorruptShardError(
            f"{path}: data at offsets {found}, the manifest says {dict(shard.offsets)}. {_AGAIN}"
        )
