"""The private folder that staged copies lie in: who may use, replace and remove them.

    dmi-stage-<uid>/<identity>/            a copy: a shard set like any other, and staged.json
    dmi-stage-<uid>/<identity>.lock        held alone to make or remove the copy, shared to use it
    dmi-stage-<uid>/.tmp-<identity>/       on the way in or out

or `<identity>-<k>-of-<n>` for the part of one node. The kernel drops a lock with its process, so
kill -9 leaves no false user and nobody waiting; the next one here removes what it left.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dmi_hpc.data.check import Progress
from dmi_hpc.data.manifest import MANIFEST, Manifest, read_manifest
from dmi_hpc.data.parts import file_checksum
from dmi_hpc.errors import DataError
from dmi_hpc.files import TEMP_PREFIX, write_text

NOTE = "staged.json"
_LOCK = ".lock"
_THREADS = 8
_COPY = re.compile(r"[0-9a-f]{32}(-[0-9]+-of-[0-9]+)?")


def home_of(to: Path) -> Path:
    return to / f"dmi-stage-{os.geteuid()}"


def name_of(manifest: Manifest, part: tuple[int, int] | None) -> str:
    return manifest.identity + (f"-{part[0]}-of-{part[1]}" if part else "")


def copies_in(home: Path) -> list[Path]:
    return sorted(path for path in home.iterdir() if _COPY.fullmatch(path.name))


def is_ours(home: Path) -> bool:
    """A private folder of this user, not a link to one: in /dev/shm anybody can make folders."""
    try:
        found = home.lstat()
    except OSError:
        return False
    mine = found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return mine and stat.S_ISDIR(found.st_mode)


def make_home(to: Path) -> Path:
    """The user's private folder in `to`. Raises DataError."""
    if not to.is_dir():
        raise DataError(f"{to}: no such folder; expected node-local storage, e.g. /dev/shm")
    if to.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
        raise DataError(
            f"{to}: anybody may replace folders in it (mode o+w without the sticky bit, +t). Stage "
            "elsewhere"
        )
    home = home_of(to.resolve())
    try:
        home.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot stage in {to}: {error}") from error
    if not is_ours(home):
        raise DataError(
            f"{home}: not a private folder of yours (another owner, or open to others). It is not "
            "used; stage elsewhere, or have it removed"
        )
    return home


def remove_folder(path: Path) -> None:
    """All at once to others: hidden first. Links in it are removed, not followed."""
    hidden = path.with_name(TEMP_PREFIX + path.name.removeprefix(TEMP_PREFIX))
    if path.exists() and path != hidden:
        if hidden.exists():
            shutil.rmtree(hidden)
        path.rename(hidden)
    if hidden.exists():
        shutil.rmtree(hidden)


def sweep(home: Path, mine: Path | None = None) -> None:
    """Remove what killed processes left: unfinished copies, and locks of copies that are no more."""
    left = {path.name.removeprefix(TEMP_PREFIX) for path in home.glob(f"{TEMP_PREFIX}*")}
    left |= {path.name.removesuffix(_LOCK) for path in home.glob(f"*{_LOCK}")}
    for name in left:
        copy = home / name
        if copy == mine or (copy.exists() and not (home / (TEMP_PREFIX + name)).exists()):
            continue
        lock = Lock.take(copy, alone=True)
        if lock is None:
            continue
        hidden = home / (TEMP_PREFIX + name)
        if hidden.exists():
            shutil.rmtree(hidden)
        if not copy.exists():
            lock_file(copy).unlink(missing_ok=True)
        lock.close()


class Note(BaseModel):
    """staged.json. keep: the copy stays until it is removed by command, whoever used it last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    identity: str
    part: tuple[int, int] | None = None
    keep: bool = False


def is_whole(copy: Path, manifest: Manifest) -> bool:
    """A finished copy of this very content: a copy is renamed into place, so sizes tell enough."""
    note = note_of(copy)
    if note is None or note.identity != manifest.identity:
        return False
    try:
        sizes = [(copy / shard.file).stat().st_size for shard in manifest.shards]
        return (copy / MANIFEST).is_file() and sizes == [s.bytes for s in manifest.shards]
    except OSError:
        return False


def is_intact(copy: Path, manifest: Manifest, progress: Progress) -> bool:
    """Whether a copy's own shards, not those that are links, have the bytes of the manifest."""
    own = [shard for shard in manifest.shards if not (copy / shard.file).is_symlink()]
    try:
        if read_manifest(copy).identity != manifest.identity:
            return False
        with ThreadPoolExecutor(max(1, min(_THREADS, len(own)))) as pool:
            sums = pool.map(lambda shard: file_checksum(copy / shard.file, progress), own)
            return all(found == shard.xxh3 for found, shard in zip(sums, own, strict=True))
    except (OSError, DataError):
        return False


def note_of(copy: Path) -> Note | None:
    try:
        return Note.model_validate_json((copy / NOTE).read_bytes())
    except (OSError, ValidationError):
        return None


def mark_kept(copy: Path) -> None:
    note = note_of(copy)
    if note is not None and not note.keep:
        write_text(copy / NOTE, note.model_copy(update={"keep": True}).model_dump_json())


class Lock:
    """The lock of a copy, held by an open file of this process; the kernel ends it with the process."""

    def __init__(self, copy: Path, handle: int) -> None:
        self.copy, self._handle = copy, handle

    @classmethod
    def take(cls, copy: Path, *, alone: bool) -> Lock | None:
        """Alone or shared with others; None if that cannot be now."""
        path = lock_file(copy)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            return None  # the whole folder has just been removed
        try:
            kind = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), path.stat()):
                return cls(copy, handle)
        except (BlockingIOError, FileNotFoundError):
            pass  # held by others; or its holder has just removed it
        except OSError as error:
            os.close(handle)
            raise DataError(f"{path.parent}: this file system has no locks: {error}") from error
        os.close(handle)
        return None

    def alone(self) -> bool:
        """Become the only holder, if there is no other."""
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def remove_copy(self) -> None:
        """As the only holder: the copy, then the lock file; who waits at it notices."""
        remove_folder(self.copy)
        lock_file(self.copy).unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._handle)


def lock_file(copy: Path) -> Path:
    return copy.with_name(copy.name + _LOCK)
