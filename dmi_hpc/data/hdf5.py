"""HDF5 itself: the layout of a shard file, its header, a master file. The only file importing h5py.

h5py lays files out and checks them; data are written and read past it. Its own reading of single
rows is 20 to 200 times slower than a memory map, behind a lock that all threads share.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dmi_hpc.data.codecs import FILTERS, load_filters
from dmi_hpc.data.manifest import (
    BLOCK_ENTRY,
    PAGE,
    SPLIT,
    BuildPlan,
    Field,
    Manifest,
)
from dmi_hpc.data.shardfiles import Stamp, require_same
from dmi_hpc.errors import CorruptShardError, DataError
from dmi_hpc.files import atomic_file

Array = np.ndarray[Any, np.dtype[Any]]
Ids = np.ndarray[Any, np.dtype[np.int64]]

MASTER = "master.h5"
_MASTER_FORMAT = "dmi-master"
LARGE_PAGE, LARGE_SHARD = 2**16, 2**27  # bytes


def dataset_of(array: str) -> str:
    """HDF5 path of a stored array."""
    return f"/_axes/{array.removeprefix('_axes.')}" if array.startswith("_axes.") else f"/{array}"


def table_of(array: str) -> str:
    """HDF5 path of a stored array's block table."""
    return f"/_blocks/{array}"


@dataclass(frozen=True)
class Layout:
    """Where everything of a shard file lies, and the bytes that are not data."""

    offsets: Mapping[str, int]  # array -> first byte, contiguous arrays that have entries
    tables: Mapping[str, int]  # array -> first byte of its block table, arrays that have entries
    chunks: Mapping[str, list[tuple[int, int]]]  # compressed array -> (offset, bytes) of each block
    pieces: Mapping[int, bytes]  # offset -> bytes; gaps between them are data and tables
    size: int


def lay_out(
    plan: BuildPlan,
    lengths: Mapping[str, int],
    encoded: Mapping[str, Sequence[bytes]],
    attributes: Mapping[str, str],
) -> Layout:
    """Lay a shard file out in memory, where the data of contiguous arrays and all tables stay holes.

    lengths: array -> entries; encoded: compressed array -> its blocks as the filter stores them.
    Past HDF5 on purpose: on a full disk it fails with errors of its own and keeps the file open.
    """
    holes: dict[int, int] = {}
    with os.fdopen(os.memfd_create("shard"), "w+b") as scratch:
        interval = _interval(plan, lengths)
        with h5py.File(scratch, "w", alignment_threshold=1, alignment_interval=interval) as file:
            _describe(file, attributes)
            file.create_group("_blocks", track_order=False)
            for array in plan.arrays:
                length = lengths[array.name]
                if plan.compressed(array):
                    _add_chunked(file, plan, array, length, encoded[array.name])
                else:
                    _add_contiguous(file, dataset_of(array.name), array, (length, *array.shape))
                table = (plan.blocks(array, length), 3)
                _add_contiguous(file, table_of(array.name), _TABLE, table)
        with h5py.File(scratch, "r") as file:
            offsets = {
                a.name: offset
                for a in plan.arrays
                if not plan.compressed(a) and (offset := _offset(file, dataset_of(a.name))) > 0
            }
            tables = {a.name: o for a in plan.arrays if (o := _offset(file, table_of(a.name))) > 0}
            chunks = {a.name: _chunks(file, a) for a in plan.arrays if plan.compressed(a)}
        by_name = {array.name: array for array in plan.arrays}
        for name, offset in offsets.items():
            holes[offset] = lengths[name] * by_name[name].entry_bytes
        for name, offset in tables.items():
            holes[offset] = plan.blocks(by_name[name], lengths[name]) * BLOCK_ENTRY
        size = scratch.seek(0, os.SEEK_END)
        pieces: dict[int, bytes] = {}
        start = 0
        for offset in [*sorted(holes), size]:
            scratch.seek(start)
            if offset > start:
                pieces[start] = scratch.read(offset - start)
            start = offset + holes.get(offset, 0)
    # data at the very end of a file may lie past what HDF5 has written
    return Layout(offsets, tables, chunks, pieces, max(size, start))


def _interval(plan: BuildPlan, lengths: Mapping[str, int]) -> int:
    """Large shards can be mapped on machines with pages of 64 KiB; small ones would double in size."""
    size = sum(lengths[array.name] * array.entry_bytes for array in plan.arrays)
    return LARGE_PAGE if size >= LARGE_SHARD else PAGE


_TABLE = Field(name="table", dtype="uint64", unit="", description="offset, stored bytes, xxh3")


def _add_contiguous(file: h5py.File, path: str, array: Field, shape: tuple[int, ...]) -> None:
    early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    early.set_layout(h5py.h5d.CONTIGUOUS)
    early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    early.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    data = file.create_dataset(path, shape, array.numpy, dcpl=early, track_times=False)
    _describe(data, _attributes(array))


def _add_chunked(
    file: h5py.File, plan: BuildPlan, array: Field, length: int, blocks: Sequence[bytes]
) -> None:
    assert plan.compression is not None, "only compressed arrays are chunked"
    load_filters()
    chunk = (plan.block_entries(array), *array.shape)
    how = FILTERS[plan.compression.codec]
    data = file.create_dataset(
        dataset_of(array.name),
        (length, *array.shape),
        array.numpy,
        chunks=chunk,
        maxshape=(None, *array.shape),  # the last chunk may reach past the end
        shuffle=how.shuffle,
        compression=how.number,
        compression_opts=how.options(plan.compression.level),
        track_times=False,
    )
    for number, block in enumerate(blocks):
        start = (number * chunk[0], *(0 for _ in array.shape))
        data.id.write_direct_chunk(start, block)
    _describe(data, _attributes(array))


def _attributes(array: Field) -> dict[str, str]:
    texts = {"unit": array.unit, "description": array.description}
    if array.axis is not None:
        texts["axis"] = array.axis
    if array.refers is not None:
        texts["refers"] = array.refers
    return texts


def _describe(node: Any, attributes: Mapping[str, str]) -> None:
    for name, text in attributes.items():
        raw = text.encode()
        node.attrs.create(name, raw, dtype=h5py.string_dtype("utf-8", max(1, len(raw))))


def _offset(file: h5py.File, path: str) -> int:
    """Of a contiguous dataset's first byte; 0 if it is empty."""
    data = file[path]
    if not isinstance(data, h5py.Dataset):
        raise TypeError(f"{path} is no dataset")
    return int(data.id.get_offset() or 0)


def _chunks(file: h5py.File, array: Field) -> list[tuple[int, int]]:
    """(offset, bytes) of each block of a compressed array, in order."""
    data = file[dataset_of(array.name)]
    found: dict[int, tuple[int, int]] = {}

    def note(chunk: Any) -> None:
        found[chunk.chunk_offset[0]] = (chunk.byte_offset, chunk.size)

    if data.size:
        data.id.chunk_iter(note)
    return [found[start] for start in sorted(found)]


def found_offsets(path: Path, plan: BuildPlan) -> dict[str, tuple[int, int]]:
    """(offset, offset of the block table) of each array as HDF5 itself sees them.

    Raises OSError, KeyError, TypeError or RuntimeError if the file is no such shard,
    CorruptShardError if it was written for another plan.
    """
    with h5py.File(path, "r", locking=False) as file:
        found = bytes(file.attrs["fingerprint"]).decode("ascii", "replace")
        if found != plan.fingerprint():
            raise CorruptShardError(
                f"{path}: written for plan {found}, the manifest's plan is {plan.fingerprint()}: one "
                "of the two was edited or belongs to another set"
            )
        return {
            a.name: (
                0 if plan.compressed(a) else _offset(file, dataset_of(a.name)),
                _offset(file, table_of(a.name)),
            )
            for a in plan.arrays
        }


class H5Reader:
    """One shard read by h5py alone: slow, and the oracle that every other way must agree with.

    The file is closed with the last reference. Raises DataError, CorruptShardError if the file is
    another one than `stamp` says.
    """

    def __init__(self, path: Path, plan: BuildPlan, stamp: Stamp) -> None:
        if plan.compression is not None:
            load_filters()
        try:
            self._file = h5py.File(path, "r", locking=False)
        except OSError as error:
            raise DataError(f"{path}: cannot be opened as HDF5: {error}") from None
        require_same(path, self._file.id.get_vfd_handle(), stamp)

    def read(self, array: str, start: int, stop: int, out: Array) -> None:
        """Entries start to stop of an array into `out`."""
        if stop > start:
            self._file[dataset_of(array)].read_direct(out, np.s_[start:stop])


def write_master(folder: Path, manifest: Manifest, offsets: Mapping[str, Ids]) -> Path:
    """`master.h5`: every field over all shards as one virtual dataset, for any HDF5 tool.

    offsets: axis -> (rows + 1,) over the whole set, stored as `/_axes/<axis>`. Paths in it are
    relative: it moves with its folder. Of a shard that is not found HDF5 reads the fill value: NaN in
    floats, 255 in split. Compressed sets need the filter (hdf5plugin) in that tool.
    """
    with (
        atomic_file(folder / MASTER) as temp,
        h5py.File(temp, "w", libver=("v110", "latest")) as file,
    ):
        _describe(file, {"format": _MASTER_FORMAT, "identity": manifest.identity})
        for field in manifest.fields:
            lengths = [shard.arrays[field.name].length for shard in manifest.shards]
            layout = h5py.VirtualLayout((sum(lengths), *field.shape), dtype=field.numpy)
            start = 0
            for shard, length in zip(manifest.shards, lengths, strict=True):
                if length:
                    source = h5py.VirtualSource(
                        shard.file, field.name, (length, *field.shape), dtype=field.numpy
                    )
                    layout[start : start + length] = source
                start += length
            data = file.create_virtual_dataset(field.name, layout, fillvalue=_no_value(field))
            _describe(data, _attributes(field))
        for axis, values in offsets.items():
            file.create_dataset(f"/_axes/{axis}", data=values.astype("<i8"), track_times=False)
    return folder / MASTER


def _no_value(field: Field) -> float | None:
    """What no row of a set holds, where the dtype has such a value."""
    if field == SPLIT:
        return 255
    return math.nan if field.numpy.kind == "f" else None


def stale_master(folder: Path, identity: str) -> bool:
    """Whether the folder's `master.h5` is one of ours, made from a set of another identity."""
    path = folder / MASTER
    if not path.is_file():
        return False
    try:
        with h5py.File(path, "r", locking=False) as file:
            form, made_from = file.attrs["format"], file.attrs["identity"]
    except (OSError, KeyError, TypeError, ValueError, RuntimeError):  # not ours
        return False
    ours = isinstance(form, bytes) and form == _MASTER_FORMAT.encode()
    return bool(ours and made_from != identity.encode())


def remove_stale_master(folder: Path, identity: str) -> None:
    """Before the manifest of a set of this identity is committed: a stale one reads as its rows."""
    if stale_master(folder, identity):
        (folder / MASTER).unlink()


def read_dataset(path: Path, dataset: str, start: int, stop: int) -> Array:
    """Entries start to stop of a dataset of anybody's HDF5 file."""
    with h5py.File(path, "r", locking=False) as file:
        return np.asarray(_dataset(file, path, dataset)[start:stop])


def describe_datasets(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """All datasets of anybody's HDF5 file: path -> (shape, dtype). Raises DataError."""
    found: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}

    def note(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            found[f"/{name}"] = (tuple(node.shape or ()), node.dtype)

    try:
        with h5py.File(path, "r", locking=False) as file:
            file.visititems(note)
    except OSError as error:
        raise DataError(f"{path}: not readable as HDF5: {error}") from None
    return found


def _dataset(file: h5py.File, path: Path, name: str) -> Any:
    if name not in file or not isinstance(file[name], h5py.Dataset):
        raise DataError(f"{path}: no dataset {name!r}")
    return file[name]


def is_shard(path: Path) -> bool:
    """Whether a file is a shard of this program; what cannot be read is none."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = file.attrs["format"]
            return (
                isinstance(found, bytes) and found == b"dmi-shard" and "fingerprint" in file.attrs
            )
    except (OSError, KeyError, TypeError, ValueError, RuntimeError):
        return False
