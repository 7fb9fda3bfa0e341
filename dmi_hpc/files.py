"""Files that are never half-written: temp, fsync, rename; append-only JSON lines; locks.

A reader sees the old content or the new one, whatever is killed when.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmi_hpc.errors import RunError

TEMP_PREFIX = ".tmp-"
_TEMP = re.compile(r"\.tmp-.+-\d+-[0-9a-f]{8}", re.ASCII | re.DOTALL)  # as _temp_beside says
_LOCK = ".dmi-lock"


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temp_beside(path: Path) -> Path:
    return path.with_name(f"{TEMP_PREFIX}{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`.

    On any error the temporary file is removed and `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = _temp_beside(path)
    try:
        yield temp
        with temp.open("rb+") as stream:
            os.fsync(stream.fileno())
        temp.replace(path)
        fsync_folder(path.parent)
    finally:
        temp.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success fsync all files in it and rename it to `path`.

    An existing `path` is replaced, and killed in the middle both have hidden names: what cannot be
    made again must not be replaced. On error nothing of the temporary folder is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = _temp_beside(path)
    temp.mkdir()
    try:
        yield temp
        for file in temp.rglob("*"):
            if file.is_file():
                with file.open("rb+") as stream:
                    os.fsync(stream.fileno())
        fsync_folder(temp)
        if path.exists():
            old = _temp_beside(path)
            path.rename(old)
            temp.rename(path)
            shutil.rmtree(old)
        else:
            temp.rename(path)
        fsync_folder(path.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def remove_stale(folder: Path) -> None:
    """Remove what killed writers left in `folder`. The caller must be its only writer."""
    for path in folder.glob(f"{TEMP_PREFIX}*"):
        if not _TEMP.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def exclusive(folder: Path, what: str) -> Iterator[None]:
    """Hold the folder's lock; a second holder is refused (RunError). It dies with its process.

    what: the kind of job, for the message. The folder is made if need be. What is there under
    the lock's name but no plain file is refused, too.
    """
    path = folder / _LOCK
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise RunError(
                f"{path}: expected a plain file, which this program makes itself. Remove it"
            )
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle), path.lstat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            raise RunError(
                f"{folder}: its file system has no file locks ({error}), so nobody could tell whether "
                f"another {what} runs here. Choose a folder on another one, or have it mounted with "
                "flock"
            ) from error
        if not mine:  # held, or its holder has just left and removed it
            raise RunError(f"{folder}: another {what} is running here")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failed write to `folder` into a RunError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{folder}: cannot write: {error}") from error
        free = shutil.disk_usage(folder).free
        raise RunError(
            f"{folder}: no space left ({free / 1e6:.1f} MB are free, or your quota is spent). "
            "What is finished is kept: make room and continue (train, search: with --resume)"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Atomically replace `path` by `text` (UTF-8)."""
    with atomic_file(path) as temp:
        temp.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Atomically replace `path` by `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def append_json_line(path: Path, record: Mapping[str, Any], *, durable: bool = False) -> None:
    """Append one record in a single write; `durable` also waits for the disk.

    A tail torn by an earlier crash is closed first, so that it can only ever cost itself.
    """
    line = (json.dumps(record, separators=(",", ":")) + "\n").encode()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:  # a disk that fills takes a part; writing on raises what it is
            line = line[os.write(handle, line) :]
        if durable:
            os.fsync(handle)
    finally:
        os.close(handle)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """All whole records of an append-only file, in order; a torn line is skipped.

    A missing file has no records.
    """
    if not path.exists():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n"):
        if not line:
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # torn by a crash while it was appended
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
