"""Append-only files of JSON lines, each with its own checksum: written by one, read by anyone.

A line is a JSON object whose last key, "sum", is the xxh3-64 (16 hex digits) of all bytes before it.
Readers take no lock: what is torn, or (on NFS) filled with zeros until its data arrives, does not
check, and a damaged line costs itself alone.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from dmi_hpc.errors import RunError

_SUM, _END = b',"sum":"', b'"}'
_TAIL = len(_SUM) + 16 + len(_END)
# A line that does not check may be one whose bytes have not arrived: attribute and page caches of
# NFS clients last up to a minute.
PATIENCE_S = 60.0


def encode(record: Mapping[str, Any]) -> bytes:
    """One line with its checksum. Raises ValueError for nan and inf."""
    body = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()[:-1]
    return body + _SUM + xxhash.xxh3_64_hexdigest(body).encode() + _END + b"\n"


def decode(line: bytes, *, unsigned: bool = False) -> dict[str, Any] | None:
    """The record of one line (without its newline), less its checksum; None if it does not check.

    unsigned: a line without checksum is taken as it is.
    """
    line = line.strip(b"\0")
    body, end = line[:-_TAIL], line[-_TAIL:]
    signed = end.startswith(_SUM) and end.endswith(_END)
    if signed and end[len(_SUM) : -len(_END)] != xxhash.xxh3_64_hexdigest(body).encode():
        return None
    if not signed and not unsigned:
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    record.pop("sum", None)
    return record


@dataclass(frozen=True)
class Lines:
    """The whole records of a file, and the numbers (from 1) of the lines that are damaged."""

    records: tuple[dict[str, Any], ...]
    damaged: tuple[int, ...] = ()


def read_lines(path: Path, *, unsigned: bool = False) -> Lines:
    """All of a file. Its end may be torn: a line without newline does not count as damaged."""
    *lines, torn = path.read_bytes().split(b"\n")
    decoded = [decode(line, unsigned=unsigned) for line in lines]
    last = decode(torn, unsigned=unsigned)  # whole but for its newline
    records = [record for record in [*decoded, last] if record is not None]
    # an append after a torn tail first closes it, which may leave an empty line
    damaged = [n for n, record in enumerate(decoded, 1) if record is None and lines[n - 1]]
    return Lines(tuple(records), tuple(damaged))


class Tail:
    """Follows a file that another process, perhaps on another machine, appends to."""

    def __init__(self, path: Path, *, patience_s: float = PATIENCE_S) -> None:
        """patience_s: for which a line that does not check is read again, before it is given up."""
        self.path, self.unsigned = path, False
        self.damaged = 0
        self._patience_s = patience_s
        self._offset = 0
        self._doubted: tuple[int, float] | None = None  # where, since when

    def read(self) -> list[dict[str, Any]]:
        """Whole records that came since the last call; empty if there is no file (yet).

        What follows a line that does not check waits until it is whole or given up.
        """
        try:
            with self.path.open("rb") as stream:
                if os.fstat(stream.fileno()).st_size < self._offset:
                    self._offset = 0  # the file was made anew
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        records = []
        for line in data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]:
            record = decode(line, unsigned=self.unsigned)
            if record is not None:
                records.append(record)
            elif line and self._may_arrive():
                break
            elif line:
                self.damaged += 1
            self._offset += len(line) + 1
        return records

    def _may_arrive(self) -> bool:
        now = time.monotonic()
        if self._doubted is None or self._doubted[0] != self._offset:
            self._doubted = (self._offset, now)
        return now - self._doubted[1] < self._patience_s


class Appender:
    """Appends lines to a file whose only writer it is.

    Every line is one write with O_APPEND, and on disk when `append` returns. Locks do not work on
    every parallel file system: a file that grew by somebody else's hand is refused.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size: int | None = None

    def append(self, record: Mapping[str, Any]) -> None:
        """Raises OSError, or RunError if another process writes here."""
        line = encode(record)
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            size = os.fstat(handle).st_size
            if self._size not in (None, size):
                raise RunError(
                    f"{self._path}: another process has written here (size {size}, expected "
                    f"{self._size}). End one of the two searches and continue with --resume"
                )
            if self._size is None and size and os.pread(handle, 1, size - 1) != b"\n":
                line = b"\n" + line  # a tail torn by a crash can only ever cost itself
            self._size = None  # until the line is whole
            total = size + len(line)
            while line:  # a disk that fills takes a part; writing on raises what it is
                line = line[os.write(handle, line) :]
            os.fsync(handle)
            self._size = total
        finally:
            os.close(handle)
