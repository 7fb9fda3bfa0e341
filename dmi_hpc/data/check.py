"""Find every damaged byte of a shard set, and mend it from a copy."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import xxhash

from dmi_hpc.data.blocks import ArrayBlocks
from dmi_hpc.data.committed import check_offsets, checkers
from dmi_hpc.data.manifest import (
    BLOCK_ENTRY,
    Field,
    Manifest,
    ShardRecord,
    read_manifest,
)
from dmi_hpc.data.parts import file_checksum
from dmi_hpc.errors import CorruptShardError, DataError
from dmi_hpc.files import atomic_file, exclusive, remove_stale, writing

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


@dataclass(frozen=True)
class Mended:
    """One shard made whole again: what was taken from the copy."""

    file: Path
    blocks: int
    bytes: int
    whole: bool  # the file was missing


def find_damage(folder: Path, progress: Progress = lambda count: None) -> tuple[Damage, ...]:
    """Read every byte of a set: all damage there is, in order of files and blocks; () if none.

    progress: called with the bytes read since the last call. Raises DataError if there is no
    readable manifest.
    """
    manifest = read_manifest(folder)
    with ThreadPoolExecutor(checkers(manifest)) as pool:
        found = pool.map(lambda s: _damage_of(folder, manifest, s, progress), manifest.shards)
        return tuple(damage for some in found for damage in some)


def _damage_of(
    folder: Path, manifest: Manifest, shard: ShardRecord, progress: Progress = lambda count: None
) -> list[Damage]:
    """All damage of one shard."""
    path = folder / shard.file
    if not path.is_file():
        progress(shard.bytes)
        return [Damage(path, f"the file is missing ({shard.bytes} bytes)")]
    try:
        return _damage_of_file(path, _alone(manifest, shard), progress)
    except OSError as error:  # a broken disk, or a file that nobody may read
        return [Damage(path, f"cannot be read: {error}")]


def _alone(manifest: Manifest, shard: ShardRecord) -> Manifest:
    """The set of one shard; row numbers become those of the shard."""
    return manifest.model_copy(update={"shards": (shard,)})


def _damage_of_file(path: Path, alone: Manifest, progress: Progress) -> list[Damage]:
    (shard,) = alone.shards
    found = []
    size = path.stat().st_size
    if size != shard.bytes:
        found.append(Damage(path, f"{size} bytes, expected {shard.bytes}"))
    with path.open("rb", buffering=0) as stream:
        for array in alone.plan.arrays:
            found += _damage_of_array(stream.fileno(), path, alone, array, progress)
    checksum = file_checksum(path)
    if checksum != shard.xxh3 and not found:
        found.append(Damage(path, "HDF5's own parts of the file are damaged, no data"))
    elif checksum == shard.xxh3:
        # of right bytes only: HDF5 may do anything with wrong ones
        try:
            check_offsets(path, alone.plan, shard)
        except CorruptShardError as error:
            found.append(Damage(path, str(error).removeprefix(f"{path}: ")))
    return found


def _damage_of_array(
    handle: int, path: Path, alone: Manifest, array: Field, progress: Progress
) -> list[Damage]:
    blocks = ArrayBlocks(path.parent, alone, array)
    try:
        table = blocks.table(0)
    except CorruptShardError:
        return [Damage(path, "the block table is damaged; the data cannot be told", array.name)]
    found = []
    for block, (offset, size, expected) in enumerate(table.tolist()):
        why = ""
        try:
            data = _read(handle, offset, size)
            if xxhash.xxh3_64_intdigest(data) != expected:
                why = "is damaged" if len(data) == size else "is cut off"
        except OSError as error:
            why = f"cannot be read: {error.strerror}"
        if why:
            where = _rows_text(alone, blocks, block)
            found.append(Damage(path, f"{why} ({where})", array.name, block))
        progress(size)
    return found


def _read(handle: int, offset: int, size: int) -> bytes:
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


def repair(
    folder: Path, copy: Path, damage: Sequence[Damage], progress: Progress = lambda count: None
) -> list[Mended]:
    """Mend the shards that `damage` names from another copy of the set.

    Only what is damaged is read from the copy, and only what is proved right is taken. Each shard is
    replaced at once, when the checksum of the whole is the committed one; until then the damaged one
    stays. progress: called with the bytes written. Raises DataError if the copy is of another set;
    CorruptShardError if some shards could not be mended, naming what the copy lacks, too.
    """
    manifest, other = read_manifest(folder), read_manifest(copy)
    sources = {shard.xxh3: shard for shard in other.shards}
    bad = {place.file for place in damage}
    shards = [shard for shard in manifest.shards if folder / shard.file in bad]
    lacking = [shard.file for shard in shards if shard.xxh3 not in sources]
    if lacking:
        raise DataError(
            f"{copy}: no copy of this set: it has identity {other.identity}, expected "
            f"{manifest.identity}, and lacks {', '.join(lacking[:5])} with the checksums of {folder}"
        )
    mended, failed = [], []
    with writing(folder), exclusive(folder, "repair or build of a data set"):
        remove_stale(folder)
        for shard in shards:
            source = copy / sources[shard.xxh3].file
            try:
                mended.append(_mend(folder, _alone(manifest, shard), source, progress))
            except CorruptShardError as error:
                failed.append(str(error))
    if failed:
        text = "".join(f"\n  {reason}" for reason in failed)
        raise CorruptShardError(
            f"{len(failed)} of {len(shards)} shards could not be mended:{text}\nUse another copy, or "
            "delete these shards and repeat the command that made the set"
        )
    return mended


@dataclass(frozen=True)
class _Region:
    """Bytes of a shard file. xxh3: None of HDF5's own, which only the file's checksum covers."""

    offset: int
    size: int
    xxh3: int | None
    name: str


def _mend(folder: Path, alone: Manifest, source: Path, progress: Progress) -> Mended:
    (shard,) = alone.shards
    path = folder / shard.file
    with ExitStack() as held:
        own, spare = _opened(path, held), _opened(source, held)
        if spare is None:
            raise CorruptShardError(f"{source}: missing in the copy, or nobody may read it")
        regions = _regions(alone, path, source)
        with atomic_file(path) as temp, temp.open("wb", buffering=0) as stream:
            taken = _assemble(stream, regions, own, spare, source, progress)
            if file_checksum(temp) != shard.xxh3:
                # then HDF5's own parts of our file are damaged
                gaps = [region for region in regions if region.xxh3 is None]
                taken += [gap for gap in gaps if gap not in taken]
                _assemble(stream, gaps, None, spare, source, lambda count: None)
                if file_checksum(temp) != shard.xxh3:
                    raise CorruptShardError(f"{source}: HDF5's own parts are damaged, too")
    blocks = sum(region.xxh3 is not None for region in taken)
    return Mended(path, blocks, sum(region.size for region in taken), own is None)


def _opened(path: Path, held: ExitStack) -> int | None:
    try:
        return held.enter_context(path.open("rb", buffering=0)).fileno()
    except OSError:
        return None


def _regions(alone: Manifest, path: Path, source: Path) -> list[_Region]:
    """All bytes of the file, in order. Tables are taken from the copy where ours are damaged."""
    (shard,) = alone.shards
    there = _alone(alone, shard.model_copy(update={"file": source.name}))
    regions = []
    for array in alone.plan.arrays:
        stored = shard.arrays[array.name]
        size = alone.plan.blocks(array, stored.length) * BLOCK_ENTRY
        name = f"field {array.name!r}"
        regions.append(_Region(stored.blocks, size, int(stored.xxh3, 16), f"{name}, block table"))
        try:
            table = ArrayBlocks(path.parent, alone, array).table(0)
        except (CorruptShardError, OSError):
            table = ArrayBlocks(source.parent, there, array).table(0)
        regions += [
            _Region(offset, size, checksum, f"{name}, block {block}")
            for block, (offset, size, checksum) in enumerate(table.tolist())
        ]
    regions = sorted((r for r in regions if r.size), key=lambda region: region.offset)
    gaps, end = [], 0
    for region in [*regions, _Region(shard.bytes, 0, None, "")]:
        if region.offset > end:
            gaps.append(_Region(end, region.offset - end, None, "HDF5's own part"))
        end = max(end, region.offset + region.size)
    return sorted(regions + gaps, key=lambda region: region.offset)


def _assemble(
    stream: FileIO,
    regions: Sequence[_Region],
    own: int | None,
    spare: int,
    source: Path,
    progress: Progress,
) -> list[_Region]:
    """Write every region's right bytes: ours where they are right. Returns what came from the copy."""
    taken, lost = [], []
    for region in regions:
        data = None if own is None else _right(own, region)
        if data is None:
            taken.append(region)
            data = _right(spare, region)
        if data is None:
            lost.append(region.name)
            continue
        stream.seek(region.offset)
        rest = memoryview(data)
        while rest:  # a disk that fills takes a part; writing on raises what it is
            rest = rest[stream.write(rest) :]
        progress(region.size)
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        raise CorruptShardError(f"{source}: damaged in the same place: {'; '.join(lost[:5])}{more}")
    return taken


def _right(handle: int, region: _Region) -> bytes | None:
    """The region's bytes, None if they are not all there or not the committed ones."""
    try:
        data = _read(handle, region.offset, region.size)
    except OSError:
        return None
    wrong = region.xxh3 is not None and xxhash.xxh3_64_intdigest(data) != region.xxh3
    return None if wrong or len(data) != region.size else data
