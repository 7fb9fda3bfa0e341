"""What kind of storage a set lies on, and the way of reading that suits it.

Measured (cold virtual disk, samples of 344 bytes): whole blocks in random order 165 times faster
than single samples; from memory both cost the same, and a global shuffle mixes best.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from dmi_hpc.data.blocks import ArrayBlocks
from dmi_hpc.data.manifest import Manifest

Tier = Literal["memory", "local", "shared"]

_MEMORY = {"tmpfs", "ramfs"}
# overlay and squashfs: images of containers. What is not known is treated as shared: reading whole
# blocks is never slow
_LOCAL = {
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "bcachefs", "jfs", "reiserfs"),
    *("overlay", "squashfs", "vfat", "exfat", "ntfs3"),
}
_MOUNTS = Path("/proc/self/mountinfo")
_DEVICES = Path("/sys/dev/block")
_CGROUP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
# files of a memory cgroup: limit, use, and the part of memory.stat that is unused cache
_CGROUP_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_CGROUP_2 = ("memory.max", "memory.current", "inactive_file")
_MB = 2**20
_WINDOW = (16 * _MB, 128 * _MB)  # least and most of a shuffling window; the arena holds two
_LITTLE = 4 * 2**30  # bytes: read in a second from memory, in ten from a busy file system


@dataclass(frozen=True)
class Mount:
    """A line of mountinfo."""

    point: Path
    kind: str  # of file system
    device: str  # major:minor
    source: str


@dataclass(frozen=True)
class Storage:
    """Where a path lies. rotational: a spinning disk, as far as the system knows."""

    tier: Tier
    kind: str  # of file system
    rotational: bool = False


@dataclass(frozen=True)
class Access:
    """How to read a set. window_bytes: rows shuffled together in block shuffle, else 0."""

    backend: Literal["mmap", "pread", "direct", "ram", "h5py"]
    shuffle: Literal["global", "block"]
    window_bytes: int
    reason: str  # one sentence, for the log


def mounts(mountinfo: str) -> list[Mount]:
    """Parse /proc/<pid>/mountinfo (proc(5)); spaces and the like in paths are octal there."""
    found = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        before, after = left.split(" "), right.split(" ")
        if len(before) >= 5 and len(after) >= 2:
            found.append(Mount(Path(_plain(before[4])), after[0], before[2], _plain(after[1])))
    return found


def _plain(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def mount_of(path: Path, known: Iterable[Mount]) -> Mount | None:
    """The mount that an absolute path lies on: the deepest, of those the one mounted last."""
    found: Mount | None = None
    for mount in known:
        inside = path == mount.point or mount.point in path.parents
        if inside and (found is None or len(mount.point.parts) >= len(found.point.parts)):
            found = mount
    return found


def tier_of(kind: str) -> Tier:
    """Of a file system's type as mountinfo names it."""
    return "memory" if kind in _MEMORY else "local" if kind in _LOCAL else "shared"


def storage_of(path: Path) -> Storage:
    """Where an existing path lies; a system without /proc tells nothing, so "shared"."""
    if not _MOUNTS.exists():
        return Storage("shared", "unknown")
    text = _MOUNTS.read_text(errors="surrogateescape")
    mount = mount_of(path.resolve(), mounts(text))
    if mount is None:
        return Storage("shared", "unknown")
    tier = tier_of(mount.kind)
    return Storage(tier, mount.kind, tier == "local" and _rotational(mount))


def _rotational(mount: Mount) -> bool:
    """Of the disk below; a partition's queue is its disk's. False where the system does not say."""
    number, source = mount.device, Path(mount.source)
    if source.is_block_device():  # btrfs has a device number of its own
        raw = source.stat().st_rdev
        number = f"{os.major(raw)}:{os.minor(raw)}"
    device = _DEVICES / number
    for flag in (device / "queue/rotational", device.resolve().parent / "queue/rotational"):
        if flag.is_file():
            return flag.read_text().strip() == "1"
    return False


def free_memory() -> int:
    """Bytes that this process could still use: of the node, within the limits of its cgroups.

    Batch systems give a job a share of the node by a cgroup (of either version).
    """
    limits = [psutil.virtual_memory().available]
    if _CGROUP.exists():
        for line in _CGROUP.read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = _CGROUPS / "memory" if controllers else _CGROUPS
            names = _CGROUP_1 if controllers else _CGROUP_2
            group = root / name.lstrip("/")
            for folder in (group, *group.parents):
                limits += _room(folder, *names)
                if folder == root:
                    break
    return int(min(limits))


def _room(group: Path, limit: str, used: str, cache: str) -> list[int]:
    """[limit - use] of a cgroup that has a limit; cached files give way, so they are not in use."""
    texts = {}
    for name in (limit, used, "memory.stat"):
        file = group / name
        texts[name] = file.read_text().split() if file.is_file() else []
    if not (texts[limit] and texts[limit][0].isdigit()):
        return []
    stat = dict(zip(texts["memory.stat"][::2], texts["memory.stat"][1::2], strict=False))
    held = int((texts[used] or ["0"])[0]) - int(stat.get(cache, 0))
    return [max(0, int(texts[limit][0]) - max(0, held))]


def size_text(count: float) -> str:
    """Bytes for people: three digits, decimal prefixes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:,.0f} TB"


def decoded_bytes(manifest: Manifest) -> int:
    """Of all arrays of a set, as they are in memory."""
    return sum(
        shard.arrays[array.name].length * array.entry_bytes
        for array in manifest.plan.arrays
        for shard in manifest.shards
    )


def stored_bytes(folder: Path, manifest: Manifest) -> dict[str, int]:
    """Of each field's data in the shard files. Raises CorruptShardError, OSError."""
    found = {}
    for field in manifest.fields:
        if manifest.plan.compressed(field):
            blocks = ArrayBlocks(folder, manifest, field)
            tables = [blocks.table(shard) for shard in range(len(manifest.shards))]
            found[field.name] = sum(int(table[:, 1].sum()) for table in tables)
        else:
            entries = sum(shard.arrays[field.name].length for shard in manifest.shards)
            found[field.name] = entries * field.entry_bytes
    return found


def choose(
    storage: Storage,
    set_bytes: int,
    *,
    memory_bytes: int,
    compressed: bool = False,
    processes_on_node: int = 1,
) -> Access:
    """The way of reading that suits the storage: a pure function.

    set_bytes: decoded bytes of what is to be read; memory_bytes: free memory of the node. Each
    process keeps its own copy of a set that is little beside that: an array has large pages, and
    gathers from it were measured a fifth faster than from a mapped file. Else, where random access is
    cheap, or will be once the page cache holds the set, rows are shuffled globally; or whole blocks
    are read and rows shuffled in windows of them.
    """
    half, size = memory_bytes // 2, size_text(set_bytes)
    room = f"half of the free memory ({size_text(half)})"
    spinning = ", spinning disk as the system says" if storage.rotational else ""
    where = f"{storage.kind} ({storage.tier}{spinning})"
    low, high = _WINDOW
    window = min(high, max(low, memory_bytes // (8 * max(1, processes_on_node))))
    if compressed:
        copies = set_bytes * processes_on_node
        if copies <= half:
            each = "" if processes_on_node == 1 else f" in each of {processes_on_node} processes"
            reason = f"compressed, {size} decoded{each} fit in {room}: decoded once, kept in memory"
            return Access("ram", "global", 0, reason)
        reason = f"compressed, {size} decoded do not fit in {room}: whole blocks are decoded"
        return Access("pread", "block", window, reason)
    if set_bytes * processes_on_node <= memory_bytes // 8 and set_bytes <= _LITTLE:
        reason = (
            f"on {where}: {size} are little beside the free memory: read as a whole, kept there"
        )
        return Access("ram", "global", 0, reason)
    if storage.tier == "memory":
        return Access("mmap", "global", 0, f"on {where}: any row costs the same")
    if storage.tier == "local" and not storage.rotational:
        return Access("mmap", "global", 0, f"on {where}: random access is cheap")
    if set_bytes <= half:
        reason = (
            f"on {where}, but {size} fit in {room}: slow in the first epoch, then the page cache "
            "holds the set"
        )
        return Access("mmap", "global", 0, reason)
    reason = (
        f"on {where}, and {size} do not fit in {room}: whole blocks are read, rows shuffled within "
        f"{window // _MB} MiB; staging the set makes a global shuffle cheap"
    )
    return Access("pread", "block", window, reason)


def access_of(path: Path, manifest: Manifest, *, processes_on_node: int = 1) -> Access:
    """`choose` for the set in `path` on this node as it is now."""
    return choose(
        storage_of(path),
        decoded_bytes(manifest),
        memory_bytes=free_memory(),
        compressed=manifest.plan.compression is not None,
        processes_on_node=processes_on_node,
    )


def evict(file: Path) -> bool:
    """Ask the kernel to forget a file's pages; whether it did, as far as samples tell."""
    with file.open("rb", buffering=0) as stream:
        handle = stream.fileno()
        size = os.fstat(handle).st_size
        os.fdatasync(handle)  # pages not yet written are kept
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)  # asking must not read ahead
        offsets = range(0, size, max(1, size // 8))
        # a fast disk may bring a page while its absence is asked about
        return sum(_is_cached(handle, offset) for offset in offsets) <= len(offsets) // 2


def _is_cached(handle: int, offset: int) -> bool:
    """Whether a byte can be read without the disk; True if the file system does not tell."""
    try:
        return os.preadv(handle, [bytearray(1)], offset, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:
        return True
