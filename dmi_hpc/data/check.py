"""Find every damaged byte of a shard set; repair.py mends it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dmi_hpc.data.blocks import ArrayBlocks
from dmi_hpc.data.committed import check_offsets, checkers
from dmi_hpc.data.hdf5 import MASTER, stale_master
from dmi_hpc.data.manifest import (
    MANIFEST,
    Field,
    Manifest,
    ShardRecord,
    read_manifest,
)
from dmi_hpc.data.parts import file_checksum
from dmi_hpc.errors import CorruptShardError, DataError, FormatVersionError

Progress = Callable[[int], None]

_PIECE = 1 << 22


@dataclass(frozen=True)
class Damage:
    """What is wrong at one place. array, block: None where no block is to blame."""

    file: Path
    what: str
    array: str | None = None
    block: int | None = None

    def __str__(self) -> str:
        place = "" if self.array is None else f"field {self.array!r}, "
        place += "" if self.block is None else f"block {self.block} "
        return f"{self.file}: {place}{self.what}"


def find_damage(
    folder: Path,
    progress: Progress = lambda count: None,
    *,
    copy: Path | None = None,
    only: Collection[Path] | None = None,
) -> tuple[Damage, ...]:
    """Read every byte of a set: all damage there is, in order of files and blocks; () if none.

    progress: called with the bytes read since the last call, of files that are damaged once. copy:
    whose manifest counts if the folder's own is lost or damaged, which then is damage, too. only:
    the shards to read, None: all. Raises DataError if there is no readable manifest.
    """
    manifest, lost = manifest_of(folder, copy)
    found = [Damage(folder / MANIFEST, "lost or damaged")] if lost else []
    shards = [s for s in manifest.shards if only is None or folder / s.file in only]
    with ThreadPoolExecutor(checkers(manifest)) as pool:
        for some in pool.map(lambda s: _damage_of(folder, manifest, s, progress), shards):
            found += some
    if stale_master(folder, manifest.identity):
        todo = "write it again (dmi data master) or delete it"
        found.append(Damage(folder / MASTER, f"made from another set than is here: {todo}"))
    return tuple(found)


def manifest_of(folder: Path, copy: Path | None) -> tuple[Manifest, DataError | None]:
    """The folder's manifest; else that of the copy, and what is wrong with the folder's."""
    try:
        return read_manifest(folder), None
    except DataError as error:
        if copy is None or isinstance(error, FormatVersionError):
            raise
        return read_manifest(copy), error


def _damage_of(
    folder: Path, manifest: Manifest, shard: ShardRecord, progress: Progress = lambda count: None
) -> list[Damage]:
    """All damage of one shard."""
    path = folder / shard.file
    if not path.is_file():
        progress(shard.bytes)
        return [Damage(path, f"the file is missing ({shard.bytes} bytes)")]
    try:
        return _damage_of_file(path, set_of_one(manifest, shard), progress)
    except OSError as error:  # a broken disk, or a file that nobody may read
        return [Damage(path, f"cannot be read: {error}")]


def set_of_one(manifest: Manifest, shard: ShardRecord) -> Manifest:
    """The set of one shard; row numbers become those of the shard."""
    return manifest.model_copy(update={"shards": (shard,)})


def _damage_of_file(path: Path, alone: Manifest, progress: Progress) -> list[Damage]:
    (shard,) = alone.shards
    if _is_committed(path, shard, progress):
        # of right bytes only: HDF5 may do anything with wrong ones
        try:
            check_offsets(path, alone.plan, shard)
        except CorruptShardError as error:
            return [Damage(path, str(error).removeprefix(f"{path}: "))]
        return []
    found = []
    size = path.stat().st_size
    if size != shard.bytes:
        found.append(Damage(path, f"{size} bytes, expected {shard.bytes}"))
    with path.open("rb", buffering=0) as stream:
        for array in alone.plan.arrays:
            found += _damage_of_array(stream.fileno(), path, alone, array)
    return found or [Damage(path, "HDF5's own parts of the file are damaged, no data")]


def _is_committed(path: Path, shard: ShardRecord, progress: Progress) -> bool:
    try:
        return path.stat().st_size == shard.bytes and file_checksum(path, progress) == shard.xxh3
    except OSError:  # of a broken disk: its blocks will tell
        return False


def _damage_of_array(handle: int, path: Path, alone: Manifest, array: Field) -> list[Damage]:
    blocks = ArrayBlocks(path.parent, alone, array)
    try:
        table = blocks.table(0)
    except CorruptShardError:
        return [Damage(path, "the block table is damaged; the data cannot be told", array.name)]
    found = []
    for block, (offset, size, expected) in enumerate(table.tolist()):
        why = ""
        try:
            data = read_bytes(handle, offset, size)
            if xxhash.xxh3_64_intdigest(data) != expected:
                why = "is damaged" if len(data) == size else "is cut off"
        except OSError as error:
            why = f"cannot be read: {error.strerror}"
        if why:
            where = _rows_text(alone, blocks, block)
            found.append(Damage(path, f"{why} ({where})", array.name, block))
    return found


def read_bytes(handle: int, offset: int, size: int) -> bytes:
    """What the file has of these bytes."""
    pieces = []
    while size:
        piece = os.pread(handle, min(size, _PIECE), offset)
        if not piece:
            break
        pieces.append(piece)
        offset, size = offset + len(piece), size - len(piece)
    return b"".join(pieces)


def _rows_text(alone: Manifest, blocks: ArrayBlocks, block: int) -> str:
    start, stop = blocks.span(block)
    kind = "rows" if blocks.array.axis is None else f"entries of axis {blocks.array.axis!r}"
    return f"{kind} {start} to {stop - 1} of the shard"
