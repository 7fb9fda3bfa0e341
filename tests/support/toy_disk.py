"""Disks that fill and folders that cannot be written to, for tests."""

from __future__ import annotations

import errno
import io
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest


class _Full(io.FileIO):
    """A file that takes what is left of a number of bytes, as write(2) does."""

    def __init__(self, path, mode, left):
        super().__init__(path, mode)
        self._left = left

    def write(self, data):
        piece = memoryview(data).cast("B")[: self._left[0]]
        if not len(piece) and len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._left[0] -= len(piece)
        return super().write(piece)


@contextmanager
def room(size):
    """Only `size` more bytes can be written through Path.open; yields [bytes left]."""
    left, real = [size], Path.open

    def opened(self, mode="r", buffering=-1, encoding=None, errors=None, newline=None):
        if "w" not in mode:
            return real(self, mode, buffering, encoding, errors, newline)
        raw = _Full(self, "w", left)
        if buffering == 0:
            return raw
        buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", opened)
        yield left


@contextmanager
def small_disk(folder, size):
    """Mount a RAM disk of `size` bytes at a new folder; skips the test where that is not allowed."""
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True, timeout=30)


@contextmanager
def read_only(folder):
    """Nothing can be written in `folder`: by its mode, or for root by a mount."""
    if os.geteuid():
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)
        return
    _mount("--bind", folder, folder)
    try:
        _mount("-o", "remount,ro,bind", folder)
        yield
    finally:
        subprocess.run(["umount", folder], check=True, timeout=30)


def _mount(*arguments):
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("no mount(8) here")
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.strip()}")
