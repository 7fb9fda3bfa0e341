"""Mend a shard set from another copy of it."""

from __future__ import annotations

import stat
from collections.abc import Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import xxhash

from dmi_hpc.data.blocks import ArrayBlocks
from dmi_hpc.data.check import (
    Damage,
    Progress,
    manifest_of,
    read_bytes,
    set_of_one,
)
from dmi_hpc.data.hdf5 import is_shard, remove_stale_master
from dmi_hpc.data.manifest import BLOCK_ENTRY, MANIFEST, Manifest, read_manifest, write_manifest
from dmi_hpc.data.parts import file_checksum
from dmi_hpc.errors import CorruptShardError, DataError
from dmi_hpc.files import atomic_file, exclusive, remove_stale, writing


@dataclass(frozen=True)
class Mended:
    """One file made whole again: what was taken from the copy."""

    file: Path
    blocks: int  # of data, and block tables
    bytes: int
    whole: bool  # all of the file

    @property
    def what(self) -> str:
        if self.whole:
            return "the whole file"
        if self.blocks:
            return f"{self.blocks} damaged {'place' if self.blocks == 1 else 'places'}"
        return "HDF5's own parts" if self.bytes else "its length"


def repair(
    folder: Path, copy: Path, damage: Sequence[Damage], progress: Progress = lambda count: None
) -> list[Mended]:
    """Mend what `find_damage(folder, copy=copy)` has found from another copy of the set.

    Only what is damaged is read from the copy, and only what is proved right is taken. Each shard is
    replaced at once, when the checksum of the whole is the committed one; until then the damaged one
    stays. A lost manifest is written at the end. progress: called with the bytes written, and with
    those read again as a proof. Raises DataError if the copy is of another set; CorruptShardError if
    some shards could not be mended, naming what the copy lacks, too.
    """
    (manifest, lost), other = manifest_of(folder, copy), read_manifest(copy)
    bad = {place.file for place in damage}
    if lost is not None:
        if folder / MANIFEST not in bad:  # then nothing is proved of the shards
            raise lost
        _require_same_set(folder, copy, manifest, bad)
    sources = {shard.xxh3: shard for shard in other.shards}
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
                mended.append(_mend(folder, set_of_one(manifest, shard), source, progress))
            except CorruptShardError as error:
                failed.append(str(error))
        remove_stale_master(folder, manifest.identity)
        if lost is not None and not failed:
            write_manifest(folder, manifest)
            mended.append(Mended(folder / MANIFEST, 0, (folder / MANIFEST).stat().st_size, True))
    if failed:
        text = "".join(f"\n  {reason}" for reason in failed)
        raise CorruptShardError(
            f"{len(failed)} of {len(shards)} shards could not be mended:{text}\nUse another copy, or "
            "delete these shards and repeat the command that made the set"
        )
    return mended


def _require_same_set(folder: Path, copy: Path, manifest: Manifest, bad: Set[Path]) -> None:
    """The copy's manifest is taken only where all shards are its own and whole: nothing else tells
    this set from an older or newer one."""
    named = {folder / shard.file for shard in manifest.shards}
    here = {path for path in named if path.exists()}
    others = {path for path in folder.glob("*.h5") if path not in named and is_shard(path)}
    wrong = (bad & here) | others
    if here and not wrong:
        return
    what = "no shard of it is here"
    if wrong:
        names = ", ".join(sorted(path.name for path in wrong)[:5])
        what = f"it has no such {names}. Move what is not its own away"
    raise DataError(
        f"{folder}: its manifest is lost or damaged, and that of {copy} may be of another set: {what}, "
        "or copy the whole folder"
    )


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
    target = path.resolve()  # a link stays one
    if not target.parent.is_dir():
        raise CorruptShardError(f"{path}: a link to {target}, whose folder is missing")
    with ExitStack() as held:
        own, spare = _opened(path, held), _opened(source, held)
        if spare is None:
            raise CorruptShardError(f"{source}: missing in the copy, or nobody may read it")
        mode = stat.S_IMODE(target.stat().st_mode) if target.exists() else None
        regions = _regions(alone, path, source)
        with atomic_file(target) as temp, temp.open("wb", buffering=0) as stream:
            if mode is not None:  # whom it is closed to never sees it; it must be open to us
                temp.chmod(mode | stat.S_IRUSR | stat.S_IWUSR)
            taken = _assemble(stream, regions, own, spare, source, progress)
            if file_checksum(temp, progress) != shard.xxh3:
                # then HDF5's own parts of our file are damaged
                gaps = [region for region in regions if region.xxh3 is None]
                taken += [gap for gap in gaps if gap not in taken]
                _assemble(stream, gaps, None, spare, source, lambda count: None)
                if file_checksum(temp, lambda count: None) != shard.xxh3:
                    raise CorruptShardError(f"{source}: HDF5's own parts are damaged, too")
        if mode is not None:
            target.chmod(mode)
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
    there = set_of_one(alone, shard.model_copy(update={"file": source.name}))
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
        data = read_bytes(handle, region.offset, region.size)
    except OSError:
        return None
    wrong = region.xxh3 is not None and xxhash.xxh3_64_intdigest(data) != region.xxh3
    return None if wrong or len(data) != region.size else data
