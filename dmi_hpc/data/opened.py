"""What a process has open of a shard set: files, and sources made from them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

from dmi_hpc.data.hdf5 import H5Reader
from dmi_hpc.data.manifest import BuildPlan
from dmi_hpc.data.shardfiles import Handle, Stamp
from dmi_hpc.data.sources import MappedSource, RamSource, Source
from dmi_hpc.errors import DataError


class Opened:
    """Each source, file and reader once, opened when it is first asked for; for several threads.

    files: of the shards. direct: handles read past the page cache.
    """

    def __init__(self, plan: BuildPlan, files: list[tuple[Path, Stamp]], *, direct: bool) -> None:
        self._plan, self._files, self._direct = plan, files, direct
        self._sources: dict[str, Source] = {}
        self._handles: dict[int, Handle] = {}
        self._readers: dict[int, H5Reader] = {}
        # two: while a source is made, threads that help to fill it open files
        self._source_lock, self._file_lock = threading.RLock(), threading.RLock()
        self._closed = False

    def in_child(self) -> Opened:
        """For the child of a fork, where threads that held locks or read blocks are no more.

        It keeps what has no lock.
        """
        new = Opened(self._plan, self._files, direct=self._direct)
        whole = (MappedSource, RamSource)
        new._sources.update({n: s for n, s in self._sources.items() if isinstance(s, whole)})
        new._handles.update(self._handles)
        new._closed = self._closed
        return new

    def source(self, name: str, make: Callable[[Opened], Source]) -> Source:
        """Of an array."""
        found = self._sources.get(name)
        if found is None:
            with self._source_lock:
                self._require_open()
                found = self._sources.get(name) or make(self)
                self._sources[name] = found
        return found

    def handle(self, shard: int) -> Handle:
        """A shard's file."""
        found = self._handles.get(shard)
        if found is None:
            with self._file_lock:
                self._require_open()
                found = self._handles.get(shard) or self._new_handle(shard)
                self._handles[shard] = found
        return found

    def _new_handle(self, shard: int) -> Handle:
        return Handle(*self._files[shard], direct=self._direct)

    def reader(self, shard: int) -> H5Reader:
        """A shard's file as h5py opens it."""
        with self._file_lock:
            self._require_open()
            if shard not in self._readers:
                path, stamp = self._files[shard]
                self._readers[shard] = H5Reader(path, self._plan, stamp)
            return self._readers[shard]

    def _require_open(self) -> None:
        if self._closed:
            raise DataError(f"{self._files[0][0].parent}: the shard set is closed: open it again")

    def close(self) -> None:
        """Forget everything; a file is closed, a map gone, when no thread reads from it any more."""
        with self._source_lock, self._file_lock:
            self._closed = True
            self._sources.clear()
            self._handles.clear()
            self._readers.clear()


class PerProcess:
    """`Opened` of the process that asks."""

    def __init__(self, opened: Opened) -> None:
        self._known = {os.getpid(): opened}

    def __call__(self) -> Opened:
        process, known = os.getpid(), self._known
        found = known.get(process)
        if found is None:
            # setdefault: threads of the child may be here at once
            found = known.setdefault(process, next(iter(list(known.values()))).in_child())
            for other in [pid for pid in list(known) if pid != process]:
                known.pop(other, None)
        return found
