"""One shard file: rows checked, grouped by split, cut into blocks, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dmi_hpc.data.codecs import encode
from dmi_hpc.data.hdf5 import lay_out
from dmi_hpc.data.manifest import SPLIT, SPLITS, BuildPlan, Field, ShardRecord, StoredArray
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import DataError
from dmi_hpc.files import atomic_file

Array = np.ndarray[Any, np.dtype[Any]]
Rows = Mapping[str, "Array | Ragged"]


def check_rows(plan: BuildPlan, rows: Rows, where: str) -> int:
    """Number of rows, if they are what the plan's fields say and finite; else DataError.

    where: what the error calls them.
    """
    split = rows.get(SPLIT.name)
    count = len(split) if isinstance(split, np.ndarray) and split.ndim else None
    lengths: dict[str, Array] = {}
    for field in plan.fields:
        if field.name not in rows:
            raise DataError(f"{where}: no field {field.name!r}; found {', '.join(rows) or 'none'}")
        found = rows[field.name]
        _check_kind(field, found, where)
        count = len(found) if count is None else count
        if len(found) != count:
            raise DataError(f"{where}: field {field.name!r}: {len(found)} rows, expected {count}")
        if isinstance(found, Ragged):
            assert field.axis is not None, "checked above"
            known = lengths.setdefault(field.axis, found.lengths)
            if not np.array_equal(known, found.lengths):
                row = int(np.flatnonzero(known != found.lengths)[0])
                raise DataError(
                    f"{where}: field {field.name!r}, row {row} of these: {found.lengths[row]} entries, "
                    f"another field of axis {field.axis!r} has {known[row]}"
                )
        _check_values(field, found.values if isinstance(found, Ragged) else found, where)
    for field in plan.fields:
        if field.refers is not None:
            _check_references(field, rows, lengths[field.refers], where)
    assert count is not None, "a plan has fields"
    return count


def _check_kind(field: Field, found: object, where: str) -> None:
    shape, given = ", ".join(("n", *map(str, field.shape))), found
    if field.axis is None:
        expected = f"dense rows, a NumPy array ({shape}) of {field.dtype}"
    else:
        expected = f"ragged rows, a Ragged of a NumPy array ({shape}) of {field.dtype}"
        given = found.values if isinstance(found, Ragged) else None
    if not isinstance(given, np.ndarray) or given.ndim == 0:
        kind = type(found if given is None else given).__name__
        raise DataError(f"{where}: field {field.name!r}: expected {expected}; found {kind}")


def _check_values(field: Field, values: Array, where: str) -> None:
    if values.shape[1:] != field.shape or values.dtype.newbyteorder("<") != field.numpy:
        raise DataError(
            f"{where}: field {field.name!r}: expected {field.dtype} {field.shape} an entry, "
            f"found {values.dtype} {values.shape[1:]}"
        )
    if field.numpy.kind == "f" and not (np.isfinite(values) | _unknown(field, values)).all():
        raise DataError(f"{where}: field {field.name!r} has values that are not finite")
    if field == SPLIT and values.size and values.max() >= len(SPLITS):
        raise DataError(f"{where}: field 'split': expected 0, 1 or 2, found {values.max()}")


def _unknown(field: Field, values: Array) -> Array | bool:
    return np.isnan(values) if field.optional else False


def _check_references(field: Field, rows: Rows, lengths: Array, where: str) -> None:
    """Each value is the number of an entry that its own row has."""
    found = rows[field.name]
    if isinstance(found, Ragged):
        values, limits = found.values, np.repeat(lengths, found.lengths)
    else:
        values, limits = found, lengths
    limits = limits.reshape(-1, *(1 for _ in field.shape))
    if values.size and (values.min() < 0 or (values >= limits).any()):
        raise DataError(
            f"{where}: field {field.name!r} refers to entries of axis {field.refers!r} that its row "
            "does not have"
        )


def concatenate(plan: BuildPlan, parts: Sequence[Rows]) -> dict[str, Array | Ragged]:
    """Checked rows, one part after the other."""
    joined: dict[str, Array | Ragged] = {}
    for field in plan.fields:
        pieces = [part[field.name] for part in parts]
        if field.axis is None:
            joined[field.name] = np.concatenate([p for p in pieces if isinstance(p, np.ndarray)])
        else:
            joined[field.name] = Ragged.concatenate([p for p in pieces if isinstance(p, Ragged)])
    return joined


def group_by_split(rows: Rows) -> dict[str, Array | Ragged]:
    """Training rows first, then validation, then test, else in their order."""
    splits = rows[SPLIT.name]
    assert isinstance(splits, np.ndarray), "split is dense"
    if (splits[:-1] <= splits[1:]).all():
        return dict(rows)
    order = np.argsort(splits, kind="stable")
    return {
        name: values.take(order, axis=0) if isinstance(values, np.ndarray) else values.take(order)
        for name, values in rows.items()
    }


def write_shard(path: Path, plan: BuildPlan, rows: Rows) -> ShardRecord:
    """Write checked rows, grouped by split, as one shard; atomic, durable, equal rows equal bytes.

    Raises OSError (ENOSPC) if the disk is full; then nothing is left behind.
    """
    arrays = _stored(plan, rows)
    encoded = {a.name: _encoded(plan, a, arrays[a.name]) for a in plan.arrays if plan.compressed(a)}
    lengths = {name: len(array) for name, array in arrays.items()}
    attributes = {"format": "dmi-shard", "fingerprint": plan.fingerprint()}
    layout = lay_out(plan, lengths, encoded, attributes)
    pieces: dict[int, bytes | memoryview] = dict(layout.pieces)
    stored: dict[str, StoredArray] = {}
    for array in plan.arrays:
        data, name = arrays[array.name], array.name
        offset, at = layout.offsets.get(name, 0), layout.tables.get(name, 0)
        if offset:
            pieces[offset] = _raw(data)
        if name in encoded:
            table = _table(layout.chunks[name], encoded[name])
        else:
            table = _table(*_cut(data, offset, plan.block_entries(array) * array.entry_bytes))
        if at:
            pieces[at] = _raw(table)
        checksum = xxhash.xxh3_64_hexdigest(_raw(table))
        stored[name] = StoredArray(offset=offset, length=len(data), blocks=at, xxh3=checksum)
    size, checksum = _write(path, pieces)
    splits = arrays[SPLIT.name]
    train, validation, test = np.bincount(splits, minlength=len(SPLITS)).tolist()
    return ShardRecord(
        file=path.name,
        rows=len(splits),
        bytes=size,
        xxh3=checksum,
        split_rows=(train, validation, test),
        arrays=stored,
    )


def _write(path: Path, pieces: Mapping[int, bytes | memoryview]) -> tuple[int, str]:
    """Size and checksum of the file that these pieces make."""
    checksum = xxhash.xxh3_64()
    with atomic_file(path) as temp, temp.open("wb", buffering=0) as stream:
        end = 0
        for offset in sorted(pieces):
            assert end == offset, "the pieces of a shard leave no gap"
            piece = memoryview(pieces[offset])
            checksum.update(piece)
            end += len(piece)
            while piece:  # a disk that fills takes a part; writing on raises what it is
                piece = piece[stream.write(piece) :]
    return end, checksum.hexdigest()


def _stored(plan: BuildPlan, rows: Rows) -> dict[str, Array]:
    """Every array of the shard, as its bytes are stored."""
    arrays: dict[str, Array] = {}
    for field in plan.fields:
        found = rows[field.name]
        values = found.values if isinstance(found, Ragged) else found
        arrays[field.name] = np.ascontiguousarray(values, dtype=field.numpy)
        if isinstance(found, Ragged):
            arrays[f"_axes.{field.axis}"] = np.ascontiguousarray(found.offsets, dtype="<i8")
    return arrays


def _raw(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _cut(data: Array, offset: int, size: int) -> tuple[list[tuple[int, int]], list[memoryview]]:
    """((offset, bytes) of each block, its bytes)."""
    raw = _raw(data)
    blocks = [raw[start : start + size] for start in range(0, len(raw), size)]
    places = [(offset + k * size, len(block)) for k, block in enumerate(blocks)]
    return places, blocks


def _table(places: list[tuple[int, int]], blocks: list[Any]) -> Array:
    """(blocks, 3) uint64: offset, stored bytes, xxh3."""
    sums = [xxhash.xxh3_64_intdigest(block) for block in blocks]
    rows = [(*place, checksum) for place, checksum in zip(places, sums, strict=True)]
    return np.array(rows, dtype="<u8").reshape(-1, 3)


def _encoded(plan: BuildPlan, array: Field, data: Array) -> list[bytes]:
    """The blocks of a compressed array; HDF5 wants the last one whole, so it is padded with zeros."""
    assert plan.compression is not None, "asked for compressed arrays only"
    size = plan.block_entries(array) * array.entry_bytes
    blocks = []
    for raw in _cut(data, 0, size)[1]:
        whole = bytes(raw).ljust(size, b"\0")
        blocks.append(encode(plan.compression, whole, array.numpy.itemsize))
    return blocks
