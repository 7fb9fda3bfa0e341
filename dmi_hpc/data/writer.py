"""Append rows as they come, without knowing how many there will be."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dmi_hpc.data.manifest import (
    MANIFEST,
    SPLIT,
    BuildPlan,
    Manifest,
    read_manifest,
    split_of,
    write_manifest,
)
from dmi_hpc.data.parts import Part, explain, make_part, manifest_of, remove_strays
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.shard import check_rows, concatenate
from dmi_hpc.errors import DataError
from dmi_hpc.files import exclusive, remove_stale, writing

Array = np.ndarray[Any, np.dtype[Any]]


class ShardWriter:
    """Writes a shard set by appending rows; memory is that of one shard.

        with ShardWriter(folder, plan) as writer:
            for rows in source:
                writer.append(rows)

    The set appears when the block ends: until then a reader finds the old set of this folder, or
    none; after an error, too. Raises RunError if another writer is at work in the folder, DataError
    if the disk is full or rows are not what the plan says.
    """

    def __init__(self, folder: Path | str, plan: BuildPlan) -> None:
        if plan.rows is not None:
            raise DataError("a plan to append to has no fixed number of rows (rows=None)")
        self.folder, self.plan = Path(folder), plan
        self.manifest: Manifest | None = None  # when it is written
        self._held = ExitStack()
        self._buffer: list[dict[str, Array | Ragged]] = []
        self._buffered = 0
        self._parts: list[Part] = []
        self._rows = 0

    def __enter__(self) -> ShardWriter:
        with ExitStack() as held:
            with writing(self.folder.parent):
                held.enter_context(exclusive(self.folder, "build of a data set"))
            old = read_manifest(self.folder) if (self.folder / MANIFEST).exists() else None
            names = [shard.file for shard in old.shards] if old else []
            with writing(self.folder):
                remove_stale(self.folder)
                remove_strays(self.folder, notes=False)
            generation = 0
            while any(name.startswith(_prefix(generation)) for name in names):
                generation += 1
            self._prefix = _prefix(generation)
            self._held = held.pop_all()
        return self

    def append(self, rows: Mapping[str, Array | Ragged]) -> None:
        """Rows of every field, (n, *shape) or Ragged; "split" (n,) uint8 if keys are shared.

        Without "split" the key of a row is its number in decimal, as always.
        """
        given = dict(rows)
        if SPLIT.name not in given:
            count = max((len(values) for values in given.values()), default=0)
            rule, numbers = self.plan.split_rule, range(self._rows, self._rows + count)
            splits = [split_of(rule.seed, str(n), rule.validation, rule.test) for n in numbers]
            given[SPLIT.name] = np.array(splits, dtype=np.uint8)
        count = check_rows(self.plan, given, f"rows from {self._rows}")
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
                    self._commit()
                    committed = True
            finally:
                remove_strays(self.folder, notes=committed)

    def _commit(self) -> None:
        if self._buffered:
            self._flush()
        if not self._parts:
            raise DataError(f"{self.folder}: no rows were appended, a set has at least one")
        manifest = manifest_of(self.plan, self._parts)
        try:
            write_manifest(self.folder, manifest)
        except OSError as problem:
            raise explain(problem, self.folder, None) from problem
        self.manifest = manifest


def _prefix(generation: int) -> str:
    """Of shard files: a set that replaces another has names of its own."""
    return "shard-" if generation == 0 else f"shard{generation}-"


def _slice(values: Array | Ragged, start: int, stop: int) -> Array | Ragged:
    if isinstance(values, Ragged):
        return values.take(np.arange(start, stop))
    return values[start:stop].copy()
