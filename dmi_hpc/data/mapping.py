"""Pieces of many files as one array: mapped side by side into one range of addresses.

Each piece starts where its first entry falls on a multiple of both the page and the entry size, so
the whole range is one C-contiguous array with unused entries between the pieces. A gather over any
number of shards is then a single `np.take`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import math
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dmi_hpc.data.manifest import PAGE
from dmi_hpc.data.shardfiles import Stamp, open_same
from dmi_hpc.errors import CorruptShardError, DataError

Array = np.ndarray[Any, np.dtype[Any]]

# mmap(2); Python's own mmap cannot choose an address. The same on all Linux architectures but
# MAP_NORESERVE, which MAP_PRIVATE of PROT_NONE pages does not need.
_PROT_NONE, _PROT_READ = 0, 1
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_MOST = 2**57  # bytes of addresses that any processor has
_FAILED = ctypes.c_void_p(-1).value


class Piece(NamedTuple):
    """Entries stored one after the other in a file."""

    path: Path
    offset: int  # a multiple of PAGE
    length: int  # entries
    stamp: Stamp | None = None  # of the file that is meant


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    numbers = (ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *numbers)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc


def map_pieces(
    pieces: Sequence[Piece], dtype: np.dtype[Any], shape: tuple[int, ...]
) -> tuple[Array, list[int]]:
    """(all entries, (n, *shape), read-only; index of each piece's first entry).

    Unmapped when the last view of the array is gone. No file stays open. Raises DataError if a file
    cannot be opened or the system allows no more maps, CorruptShardError if it is another one.
    """
    entry = dtype.itemsize * math.prod(shape)
    step = math.lcm(max(PAGE, mmap.PAGESIZE), entry)  # pages of 64 KiB exist
    starts, end = [], 0
    for piece in pieces:
        starts.append(end)
        end += -(-piece.length * entry // step) * step
    if end == 0:
        nothing: Array = np.empty((0, *shape), dtype=dtype)
        nothing.flags.writeable = False
        return nothing, [0 for _ in pieces]
    base = _reserve(end, pieces[0].path)
    memory = (ctypes.c_ubyte * end).from_address(base)
    release = weakref.finalize(memory, _libc().munmap, base, end)  # also if a piece below fails
    release.atexit = False  # other threads and exit handlers may still read
    for piece, start in zip(pieces, starts, strict=True):
        if piece.length:
            _map_file(base + start, piece, piece.length * entry)
    whole = np.frombuffer(memoryview(memory).cast("B"), dtype=np.uint8)
    whole.flags.writeable = False
    return whole.view(dtype).reshape(-1, *shape), [start // entry for start in starts]


def _reserve(size: int, path: Path) -> int:
    """Addresses for all pieces."""
    try:
        if size >= _MOST:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return _map(None, size, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS, -1, 0)
    except OSError as error:
        raise DataError(
            f"{path}: {size / 1e12:.1f} TB of addresses to map this array: {error}. Use backend pread"
        ) from error


def _map_file(address: int, piece: Piece, size: int) -> None:
    try:
        handle = open_same(piece.path, piece.stamp)
        try:
            found = os.fstat(handle).st_size
            if found < piece.offset + size:  # to read past the end of a mapped file is to be killed
                raise CorruptShardError(
                    f"{piece.path}: found {found} bytes, expected at least {piece.offset + size}: it "
                    "was cut short after the set was opened"
                )
            _map(address, size, _PROT_READ, _MAP_SHARED | _MAP_FIXED, handle, piece.offset)
        finally:
            os.close(handle)
    except OSError as error:
        more = ""
        if error.errno == errno.ENOMEM:
            more = ". More maps than the system allows (vm.max_map_count)? Use larger shards"
        raise DataError(f"{piece.path}: cannot be mapped: {error}{more}") from error


def _map(address: int | None, size: int, protection: int, flags: int, file: int, at: int) -> int:
    found = _libc().mmap(address, size, protection, flags, file, at)
    if found == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(found)
