"""Copies of a set on node-local storage: made once a node, checked while copied, removed after use.

Where they lie and how processes agree on them: stage_home.py. The node's part of a set is a whole
set too: its other shards are links to the original.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from dmi_hpc import knobs
from dmi_hpc.data.blocks import AGAIN
from dmi_hpc.data.manifest import (
    Manifest,
    ShardRecord,
    read_manifest,
    write_manifest,
)
from dmi_hpc.data.sampler import Order
from dmi_hpc.data.stage_home import (
    NOTE,
    Lock,
    Note,
    copies_in,
    home_of,
    is_intact,
    is_ours,
    is_whole,
    lock_file,
    make_home,
    mark_kept,
    name_of,
    note_of,
    remove_folder,
    sweep,
)
from dmi_hpc.data.storage import free_memory, size_text, storage_of
from dmi_hpc.errors import CorruptShardError, DataError
from dmi_hpc.files import TEMP_PREFIX, fsync_folder, write_text

Progress = Callable[[int], None]

LOCK_TIMEOUT_S = 1800.0
_THREADS = 8
_PIECE = 1 << 22
_POLL_S = (0.05, 0.25)


@dataclass(frozen=True)
class Staging:
    """What is staged where, and who hears of it.

    to: folder of node-local storage. part: (k, n), the share of node k of n, counted from 0.
    say: called with a line when this process must wait; progress: with bytes copied; checked: with
    bytes of a copy that was there, read again.
    """

    to: Path
    part: tuple[int, int] | None = None
    lock_timeout_s: float = LOCK_TIMEOUT_S
    say: Callable[[str], None] = lambda text: None
    progress: Progress = lambda count: None
    checked: Progress = lambda count: None


# users


def stage(source: Path, how: Staging) -> Path:
    """Copy a set so that it stays until `remove`; returns the copy.

    One that is there is read again, and used if its bytes are right; a damaged one is replaced.
    Raises DataError: no such set, no room (needed and free are said), the folder belongs to somebody
    else, others held it for longer than the time limit; CorruptShardError: the source is damaged.
    """
    copy, lock = _enter(source, how, keep=True)
    lock.close()
    return copy


@contextmanager
def staged(source: Path, how: Staging) -> Iterator[Path]:
    """A copy for as long as the block runs; the last user on the node removes it.

    One that `stage` made stays; so does one that a process which found it still uses (`find_staged`),
    until the next user leaves or `remove`. Raises as `stage` does.
    """
    copy, lock = _enter(source, how, keep=False)
    try:
        yield copy
    finally:
        _forget(copy)
        note = note_of(copy)
        if note is not None and not note.keep and lock.alone():
            lock.remove_copy()
        lock.close()


def find_staged(path: Path) -> Path:
    """The copy on this node, in a folder of DMI_STAGE, of the set `path`; else `path` itself.

    Only whole copies of the very content, in folders of this user, count; a part's missing shards
    are links. A copy that was found counts as used until this process ends.
    """
    folders = knobs.stage_folders()
    if not folders:
        return path
    manifest = read_manifest(path)
    for folder in folders:
        home = home_of(folder)
        if not is_ours(home):
            continue
        for copy in (home / manifest.identity, *sorted(home.glob(f"{manifest.identity}-*-of-*"))):
            if is_whole(copy, manifest) and _use(copy, manifest):
                return copy
    return path


_in_use: dict[Path, Lock] = {}  # copies that this process found
_in_use_changes = threading.Lock()


def _use(copy: Path, manifest: Manifest) -> bool:
    """Hold a copy's lock until the process ends, if it is still there then."""
    with _in_use_changes:
        if copy in _in_use:
            return True
        lock = Lock.take(copy, alone=False)
        if lock is None:
            return False
        if not is_whole(copy, manifest):  # removed meanwhile
            lock.close()
            return False
        _in_use[copy] = lock
        return True


def _forget(copy: Path) -> None:
    """This process no longer uses a copy that it found."""
    with _in_use_changes:
        lock = _in_use.pop(copy, None)
    if lock is not None:
        lock.close()


def remove(to: Path, source: Path | None = None, *, force: bool = False) -> tuple[int, list[Path]]:
    """Remove this user's copies of a set, or all of them: (copies removed, those still in use).

    force: also those in use; processes that have mapped one keep its memory until they end. Leftovers
    of killed processes go, too. source may be gone, or have other content by now.
    """
    home = home_of(to)
    if not is_ours(home):
        return 0, []
    removed, used = 0, []
    for copy in copies_in(home):
        note = note_of(copy)
        if source is not None and (note is None or note.source != str(source.resolve())):
            continue
        _forget(copy)
        lock = Lock.take(copy, alone=True)
        if lock is None and not force:
            used.append(copy)
            continue
        if lock is None:
            remove_folder(copy)
        else:
            lock.remove_copy()
            lock.close()
        removed += 1
    sweep(home)
    with suppress(OSError):  # not empty, or somebody is just about to use it
        home.rmdir()
    return removed, used


def _enter(source: Path, how: Staging, *, keep: bool) -> tuple[Path, Lock]:
    """The copy, made if need be, and its lock. keep: one that is there is proved to be right."""
    manifest = read_manifest(source)
    end, told = time.monotonic() + how.lock_timeout_s, False
    proved, damaged = not keep, False
    while True:
        copy = make_home(how.to) / name_of(manifest, how.part)  # again: the last user removes it
        whole = is_whole(copy, manifest)
        lock = Lock.take(copy, alone=damaged or not whole)
        if lock is not None:
            # while nobody waited the copy may have come or gone
            if is_whole(copy, manifest) != whole:
                lock.close()
                continue
            if whole and (proved or is_intact(copy, manifest, how.checked)):
                if keep:
                    mark_kept(copy)
                return copy, lock
            if not whole or damaged:  # nobody else holds it
                try:
                    _replace(copy, source.resolve(), manifest, how, keep)
                    proved, damaged = True, False
                finally:
                    lock.close()
            else:
                damaged = True
                lock.close()
            continue
        if time.monotonic() > end:
            raise DataError(
                f"{copy}: {'damaged, and ' if damaged else ''}another process has been staging, "
                f"removing or using it for {how.lock_timeout_s:g} s. See which (fuser "
                f"{lock_file(copy)}), or wait longer (--lock-timeout)"
            )
        if not told:
            why = f"uses a damaged copy of {source}" if damaged else f"stages {source}"
            how.say(f"waiting for another process of this node that {why}")
            told = True
        time.sleep(random.uniform(*_POLL_S))


# the copy


def _replace(copy: Path, source: Path, manifest: Manifest, how: Staging, keep: bool) -> None:
    """As the lock's only holder: make the copy, in the place of what is no longer right."""
    home, temp = copy.parent, copy.with_name(TEMP_PREFIX + copy.name)
    remove_folder(copy)
    sweep(home, mine=copy)
    for other in copies_in(home):
        note = note_of(other)
        if note and note.source == str(source) and note.identity != manifest.identity:
            lock = Lock.take(other, alone=True)
            if lock is not None:
                lock.remove_copy()
                lock.close()
    wanted = part_shards(manifest, how.part)
    _check_room(home, sum(shard.bytes for shard in wanted))
    try:
        temp.mkdir(mode=0o700)
        _copy_shards(source, temp, wanted, how.progress)
        for shard in manifest.shards:
            if shard not in wanted:
                (temp / shard.file).symlink_to(source / shard.file)
        note = Note(source=str(source), identity=manifest.identity, part=how.part, keep=keep)
        write_text(temp / NOTE, note.model_dump_json())
        write_manifest(temp, manifest)
        temp.rename(copy)
        fsync_folder(home)
    except OSError as error:
        raise _explain(error, home, wanted) from error
    finally:
        remove_folder(temp)


def part_shards(manifest: Manifest, part: tuple[int, int] | None) -> list[ShardRecord]:
    """Shards that hold rows of part k of n of any split, as `Order(parts=n)` cuts them; None: all."""
    if part is None:
        return list(manifest.shards)
    k, n = part
    if not 0 <= k < n:
        raise DataError(f"part {k}/{n}: parts of {n} are numbered from 0 to {n - 1}")
    wanted = np.zeros(len(manifest.shards), dtype=bool)
    for counts in zip(*(shard.split_rows for shard in manifest.shards), strict=True):
        ends = np.cumsum(counts)
        rows = Order(0, int(ends[-1]), parts=n, batch_size=n).part_rows(k)
        starts = ends - counts
        wanted |= (np.array(counts) > 0) & (starts < rows.stop) & (ends > rows.start)
    return [shard for shard, is_in in zip(manifest.shards, wanted, strict=True) if is_in]


def _copy_shards(
    source: Path, temp: Path, shards: Sequence[ShardRecord], progress: Callable[[int], None]
) -> None:
    if not shards:
        return
    stop = threading.Event()
    with ThreadPoolExecutor(min(_THREADS, len(shards))) as pool:
        try:
            for _ in pool.map(lambda s: _copy(source, temp, s, stop, progress), shards):
                pass
        finally:
            stop.set()  # one failed, or Ctrl-C: the others end soon


def _copy(
    source: Path, temp: Path, shard: ShardRecord, stop: threading.Event, progress: Progress
) -> None:
    """Copy one shard, proved by its checksum, to the disk."""
    path, checksum, size = source / shard.file, xxhash.xxh3_64(), 0
    buffer = memoryview(bytearray(_PIECE))
    try:
        with path.open("rb", buffering=0) as old, (temp / shard.file).open("xb", 0) as new:
            while (count := old.readinto(buffer)) and not stop.is_set():
                piece = buffer[:count]
                checksum.update(piece)
                while piece:  # a disk that fills takes a part; writing on raises what it is
                    piece = piece[new.write(piece) :]
                size += count
                progress(count)
            if stop.is_set():
                return
            os.fsync(new.fileno())
    except BaseException:
        stop.set()
        raise
    if (size, checksum.hexdigest()) != (shard.bytes, shard.xxh3):
        stop.set()
        raise CorruptShardError(
            f"{path}: expected {shard.bytes} bytes with checksum xxh3 {shard.xxh3}, found {size} "
            f"with {checksum.hexdigest()}. {AGAIN}"
        )


def _check_room(home: Path, needed: int) -> None:
    free, kind = shutil.disk_usage(home).free, "free"
    if storage_of(home).tier == "memory" and free_memory() < free:
        free, kind = free_memory(), "free memory of this node or job"
    if needed > free:
        raise DataError(
            f"{home.parent}: no room for the copy: {size_text(needed)} needed, {size_text(free)} "
            f"{kind}. Stage elsewhere, or the node's part only (--part K/N)"
        )


def _explain(error: OSError, home: Path, shards: Sequence[ShardRecord]) -> DataError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(home).free
        needed = sum(shard.bytes for shard in shards)
        return DataError(
            f"{home.parent}: no space left: {size_text(needed)} needed, {size_text(free)} free, or "
            "your quota is spent. Nothing of the copy was kept. Stage elsewhere, or the node's part "
            "only (--part K/N)"
        )
    return DataError(f"cannot stage in {home.parent}: {error}")
