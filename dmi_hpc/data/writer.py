"""Append rows as they come, without knowing how many there will be."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from dmi_hpc.data.hdf5 import remove_stale_master
from dmi_hpc.data.manifest import (
    MANIFEST,
    SPLIT,
    BuildPlan,
    Manifest,
    read_manifest,
    split_of,
    write_manifest,
)
from dmi_hpc.data.parts import Part, explain, make_part, manifest_of, remove_strays, take_over
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.shard import check_rows, concatenate
from dmi_hpc.errors import DataError
from dmi_hpc.files import exclusive, writing

Array = np.ndarray[Any, np.dtype[Any]]


class ShardWriter:
    """Writes a shard set by appending rows; memory is that of one shard.

        with ShardWriter(folder, plan) as writer:
            for rows in source:
                writer.append(rows)

    The set appears when the block ends: until then a reader finds the old set of this folder, or
    none; after an error, too. Raises RunError if another writer is at work in the folder, DataError
    if the disk is full, rows are not what the plan says, or files of others are in the way. Refused
    rows may be mended and appended again; after any other error nothing can be.
    """

    def __init__(self, folder: Path | str, plan: BuildPlan) -> None:
        if plan.rows is not None:
            raise DataError("a plan to append to has no fixed number of rows (rows=None)")
        self.folder, self.plan = Path(folder), plan
        self.manifest: Manifest | None = None  # when it is written
        self._state: Literal["new", "open", "failed", "ended"] = "new"
        self._held = ExitStack()
        self._buffer: list[dict[str, Array | Ragged]] = []
        self._buffered = 0
        self._parts: list[Part] = []
        self._rows = 0

    def __enter__(self) -> ShardWriter:
        if self._state != "new":
            raise DataError(f"{self.folder}: a writer writes one set; make another for the next")
        with ExitStack() as held:
            with writing(self.folder.parent):
                held.enter_context(exclusive(self.folder, "build of a data set"))
            old = read_manifest(self.folder) if (self.folder / MANIFEST).exists() else None
            with writing(self.folder):
                take_over(self.folder)
                names = [path.name for path in self.folder.iterdir()]
            names += [shard.file for shard in old.shards] if old else []
            generation = 0
            while any(name.startswith(_prefix(generation)) for name in names):
                generation += 1
            self._prefix = _prefix(generation)
            self._held = held.pop_all()
        self._state = "open"
        return self

    def append(self, rows: Mapping[str, Array | Ragged]) -> None:
        """Rows of every field, (n, *shape) or Ragged; "split" (n,) uint8 if keys are shared.

        Without "split" the key of a row is its number in decimal, as always.
        """
        self._check_open()
        given = dict(rows)
        if SPLIT.name not in given:
            count = max((len(v) for v in given.values() if _has_rows(v)), default=0)
            rule, numbers = self.plan.split_rule, range(self._rows, self._rows + count)
            splits = [split_of(rule.seed, str(n), rule.validation, rule.test) for n in numbers]
            given[SPLIT.name] = np.array(splits, dtype=np.uint8)
        count = check_rows(self.plan, given, f"rows from {self._rows}")
        self._state = "failed"  # until all of them are taken: a part of them would be lost
        self._rows += count
        start = 0
        while start < count:
            stop = min(count, start + self.plan.rows_per_shard - self._buffered)
            # copies: the caller may use its arrays again
            piece = {f.name: _slice(given[f.name], start, stop) for f in self.plan.fields}
            self._buffer.append(piece)
            self._buffered += stop - start
            start = stop
            if self._buffered == self.plan.rows_per_shard:
                self._flush()
        self._state = "open"

    def _check_open(self) -> None:
        if self._state == "new":
            raise DataError(
                f"{self.folder}: rows are appended in the block of `with ShardWriter(...) as writer:`"
            )
        if self._state == "ended":
            raise DataError(f"{self.folder}: the block of this writer has ended; make another one")
        if self._state == "failed":
            raise DataError(
                f"{self.folder}: rows are lost since an append failed, so there will be no set. "
                "Leave the block, mend what failed, and write all rows again"
            )

    def _flush(self) -> None:
        path = self.folder / f"{self._prefix}{len(self._parts):05d}.h5"
        rows = concatenate(self.plan, self._buffer)
        try:
            self._parts.append(make_part(path, self.plan, rows))
        except OSError as problem:
            raise explain(problem, self.folder, None) from problem
        self._buffer.clear()
        self._buffered = 0

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._held:
            committed = False
            try:
                if kind is None:
                    self._check_open()
                    self._commit()
                    committed = True
            finally:
                self._state = "ended"
                remove_strays(self.folder, notes=committed)

    def _commit(self) -> None:
        if self._buffered:
            self._flush()
        if not self._parts:
            raise DataError(f"{self.folder}: no rows were appended, a set has at least one")
        manifest = manifest_of(self.plan, self._parts)
        try:
            remove_stale_master(self.folder, manifest.identity)
            write_manifest(self.folder, manifest)
        except OSError as problem:
            raise explain(problem, self.folder, None) from problem
        self.manifest = manifest


def _prefix(generation: int) -> str:
    """Of shard files: a set that replaces another has names of its own."""
    return "shard-" if generation == 0 else f"shard{generation}-"


def _has_rows(values: object) -> bool:
    return isinstance(values, Ragged) or (isinstance(values, np.ndarray) and values.ndim > 0)


def _slice(values: Array | Ragged, start: int, stop: int) -> Array | Ragged:
    if isinstance(values, Ragged):
        return values.take(np.arange(start, stop))
    return values[start:stop].copy()
