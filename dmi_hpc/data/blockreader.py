"""Single blocks of a stored array: read with pread or past the page cache, checked, decoded."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from dmi_hpc.data.blocks import ArrayBlocks
from dmi_hpc.data.codecs import DamagedBlockError, decode, load_codec
from dmi_hpc.data.manifest import PAGE, Compression
from dmi_hpc.data.shardfiles import Handle
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]


class BlockReader:
    """Fetches single blocks of an array: pread, check, decode. direct: past the page cache."""

    def __init__(
        self,
        blocks: ArrayBlocks,
        handles: Callable[[int], Handle],
        compression: Compression | None,
        *,
        check: bool,
        direct: bool,
    ) -> None:
        self._blocks, self._handles, self._check = blocks, handles, check
        self._compression = compression if blocks.compressed else None
        if self._compression is not None:
            load_codec(self._compression.codec)
        self._direct = direct
        self._local = threading.local()

    def __call__(self, block: int, out: Array) -> None:
        """The block's entries as bytes into `out`."""
        raw = out if self._compression is None and not self._direct else None
        stored = self.stored(block, raw)
        if self._check:
            self._blocks.check(block, stored)
        if self._compression is not None:
            self._decode(block, stored, out)
        elif self._direct:
            out[:] = stored

    def read(self, start: int, stop: int, out: Array) -> None:
        """Entries start to stop, which begin and end with a block, into `out`."""
        first, last = self._blocks.of(np.array([start, stop - 1])).tolist()
        for block in range(first, last + 1):
            low, high = self._blocks.span(block)
            self(block, out[low - start : high - start].reshape(-1).view(np.uint8))

    def stored(self, block: int, out: Array | None = None) -> Array:
        """The block's bytes as the file holds them: in `out`, or in this thread's buffer."""
        shard, local = self._blocks.split(block)
        handle = self._handles(shard)  # held while it is read
        offset, size, _ = (int(n) for n in self._blocks.table(shard)[local])
        try:
            return self._read(handle.number, block, offset, size, out)
        except OSError as error:
            raise DataError(f"{self._blocks.where(block)}: cannot be read: {error}") from error

    def _decode(self, block: int, stored: Array, out: Array) -> None:
        assert self._compression is not None, "asked for compressed arrays only"
        array = self._blocks.array
        size = self._blocks.per_block * array.entry_bytes
        whole = out if len(out) == size else np.empty(size, dtype=np.uint8)
        try:
            decode(self._compression, stored, whole, array.numpy.itemsize)
        except DamagedBlockError as error:
            raise self._blocks.corrupt(block, f"cannot be decompressed: {error}") from None
        if whole is not out:
            out[:] = whole[: len(out)]

    def _read(self, handle: int, block: int, offset: int, size: int, out: Array | None) -> Array:
        before = offset % PAGE if self._direct else 0
        whole = -(-(before + size) // PAGE) * PAGE if self._direct else size
        buffer = out if out is not None else self._scratch(whole)
        got = 0
        while got < before + size:
            count = os.preadv(handle, [buffer[got:whole].data], offset - before + got)
            if count == 0:
                break
            got += count
            if self._direct and got % PAGE:
                break  # the end of the file
        if got < before + size:
            raise self._blocks.corrupt(block, f"expected {size} bytes at {offset}, the file ends")
        return buffer[before : before + size]

    def _scratch(self, size: int) -> Array:
        """This thread's buffer, page-aligned as O_DIRECT needs it."""
        buffer: Array | None = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < size:
            memory = mmap.mmap(-1, max(size, PAGE))
            buffer = self._local.buffer = np.frombuffer(memory, dtype=np.uint8)
        return buffer[:size]
