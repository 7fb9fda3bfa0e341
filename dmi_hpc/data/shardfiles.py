"""Shard files of a set that is open: always the files that were there when it was opened.

A set may be replaced while others read it, and names of files return. Two sets must never be mixed.
"""

from __future__ import annotations

import errno
import os
import weakref
from pathlib import Path
from typing import NamedTuple

from dmi_hpc.errors import CorruptShardError, DataError


class Stamp(NamedTuple):
    """Which file it is, as it was last written."""

    device: int
    inode: int
    size: int
    written: int  # ns

    @classmethod
    def of(cls, file: Path | int) -> Stamp:
        """Of a path or an open file."""
        found = os.fstat(file) if isinstance(file, int) else file.stat()
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def require_same(path: Path, handle: int, stamp: Stamp | None) -> None:
    """Raise CorruptShardError unless the open file is the one stamped; None takes any."""
    if stamp is not None and Stamp.of(handle) != stamp:
        raise CorruptShardError(f"{path}: replaced since the set was opened: open it again")


def open_same(path: Path, stamp: Stamp | None, flags: int = 0) -> int:
    """The file opened for reading. Raises OSError, CorruptShardError if it is another one."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        require_same(path, handle, stamp)
    except BaseException:
        os.close(handle)
        raise
    return handle


class Handle:
    """An open shard file, closed with its last reference.

    Whoever reads holds it, so that its number cannot become another file's meanwhile.
    """

    def __init__(self, path: Path, stamp: Stamp, *, direct: bool) -> None:
        try:
            self.number = open_same(path, stamp, os.O_DIRECT if direct else 0)
        except OSError as error:
            raise _explained(path, error, direct) from None
        weakref.finalize(self, os.close, self.number).atexit = False  # threads may still read


def _explained(path: Path, error: OSError, direct: bool) -> DataError:
    if error.errno == errno.EMFILE:
        return DataError(
            f"{path}: too many open files, this back end needs one a shard. Raise the limit "
            "(ulimit -n), use backend mmap, or build the set with more rows per shard."
        )
    if error.errno == errno.EINVAL and direct:
        return DataError(f"{path}: this file system has no O_DIRECT. Use backend pread or mmap.")
    return DataError(f"{path}: cannot be opened: {error}")
