"""Whether the files of a set are the ones that were committed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil

from dmi_hpc.data.blocks import AGAIN, ArrayBlocks
from dmi_hpc.data.hdf5 import found_offsets
from dmi_hpc.data.manifest import BuildPlan, Manifest, ShardRecord
from dmi_hpc.data.parts import file_checksum
from dmi_hpc.errors import CorruptShardError, DataError

_CHECKERS = 8  # threads that verify a set: more only wait for the disk


def checkers(manifest: Manifest) -> int:
    """Threads to verify a set with."""
    return min(_CHECKERS, psutil.cpu_count() or 1, len(manifest.shards))


def check_size(path: Path, shard: ShardRecord) -> None:
    """Raise CorruptShardError unless the file is there, as long as it was."""
    expected = f"expected {shard.bytes} bytes with checksum xxh3 {shard.xxh3}"
    if not path.is_file():
        raise CorruptShardError(f"{path}: missing; {expected}. {AGAIN}")
    size = path.stat().st_size
    if size != shard.bytes:
        raise CorruptShardError(f"{path}: {expected}, found {size} bytes. {AGAIN}")


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare every file's checksum and offsets with the manifest, several files at once.

    Raises CorruptShardError, or DataError if a file cannot be read; then the rest is not looked at.
    """
    with ThreadPoolExecutor(checkers(manifest)) as pool:
        sums = pool.map(partial(_check_sum, folder, manifest), manifest.shards)
        try:
            for shard, _ in zip(manifest.shards, sums, strict=True):
                # in one thread: h5py has one lock, for which more would only contend
                check_offsets(folder / shard.file, manifest.plan, shard)
        finally:
            pool.shutdown(cancel_futures=True)


def _check_sum(folder: Path, manifest: Manifest, shard: ShardRecord) -> None:
    path = folder / shard.file
    try:
        found = file_checksum(path)
        blame = "" if found == shard.xxh3 else _first_bad(folder, manifest, shard)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if found != shard.xxh3:
        raise CorruptShardError(
            f"{path}: expected checksum xxh3 {shard.xxh3}, found {found}{blame}. {AGAIN}"
        )


def _first_bad(folder: Path, manifest: Manifest, shard: ShardRecord) -> str:
    """Which field and block a bad checksum comes from, if it is in one."""
    alone = manifest.model_copy(update={"shards": (shard,)})
    for array in manifest.plan.arrays:
        blocks = ArrayBlocks(folder, alone, array)
        with (folder / shard.file).open("rb") as stream:
            try:
                for block in range(blocks.total):
                    offset, size, _ = (int(n) for n in blocks.table(0)[block])
                    blocks.check(block, os.pread(stream.fileno(), size, offset))
            except CorruptShardError as error:
                found = str(error).removeprefix(f"{folder / shard.file}: ").removesuffix(AGAIN)
                return f"; {found.rstrip('. ')}"
    return "; no block of data is damaged, but the file's header is"


def check_offsets(path: Path, plan: BuildPlan, shard: ShardRecord) -> None:
    """Raise CorruptShardError unless HDF5 finds the arrays where the manifest says."""
    try:
        found = found_offsets(path, plan)
    except (OSError, KeyError, TypeError, RuntimeError) as error:
        raise CorruptShardError(f"{path}: not readable as HDF5: {error}. {AGAIN}") from error
    for name, stored in shard.arrays.items():
        if found[name] != (stored.offset, stored.blocks):
            raise CorruptShardError(
                f"{path}: {name}: data and block table at {found[name]}, the manifest says "
                f"{(stored.offset, stored.blocks)}. {AGAIN}"
            )
