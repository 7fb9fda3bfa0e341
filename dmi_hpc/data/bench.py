"""How fast a set is read on this machine, next to what its memory can do, measured in the same run."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Literal, cast

import numpy as np

from dmi_hpc.data.manifest import SPLIT, Manifest, SplitName
from dmi_hpc.data.ragged import Ragged, places_of
from dmi_hpc.data.reader import Backend, ShardSet
from dmi_hpc.data.shardloader import ShardLoader, Tensors
from dmi_hpc.data.storage import decoded_bytes, evict, free_memory
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
Ids = np.ndarray[Any, np.dtype[np.int64]]
Rate = tuple[int, float]  # samples, seconds
Progress = Callable[[str], None]

_ROUNDS = 3  # each measures everything once: medians of the rates, and of ratios within a round
_SAMPLE_BYTES = 2**30  # of rows that are measured: far beyond any processor's cache
_COLD = 4.0  # times the seconds of a measurement: a disk needs them
_COPY, _GATHER = "memory: copied in order", "memory: gathered, shuffled"


@dataclass(frozen=True)
class BenchOptions:
    """fields: () for all numeric ones. seconds: of one measurement, about."""

    fields: tuple[str, ...] = ()
    split: SplitName | Literal["all"] = "train"
    batch_size: int = 256
    threads: int = 2
    seconds: float = 0.5


@dataclass(frozen=True)
class Figure:
    """One measured rate. share: of the same work on arrays in memory, in the same round."""

    what: str
    samples_per_s: float
    bytes_per_s: float
    share: float | None = None


@dataclass(frozen=True)
class Bench:
    """Figures, and what their reader should know."""

    fields: tuple[str, ...]
    rows: int  # measured
    row_bytes: float
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Asked:
    """What is read in every measurement."""

    path: Path
    names: tuple[str, ...]
    rows: Ids
    options: BenchOptions


def bench(path: Path, options: BenchOptions, progress: Progress = lambda what: None) -> Bench:
    """Measure the ways of reading that a set allows here: cold, in the first epoch, and warm.

    progress: called with what is measured next. Raises DataError: unknown or text fields, no rows.
    """
    with ShardSet.open(path, verify="none") as shards, ExitStack() as held:
        manifest, access = shards.manifest, shards.access
        names = _fields(manifest, options.fields)
        row_bytes = _row_bytes(manifest, names)
        whole = shards.rows(options.split)
        if not len(whole):
            raise DataError(f"{path}: the split {options.split} is empty; choose another --split")
        most = int(max(1.0, min(_SAMPLE_BYTES, free_memory() // 4) / row_bytes))
        asked = _Asked(path, names, whole[np.arange(min(len(whole), most))], options)
        notes = [
            f"dmi reads this set by {access.backend}, {access.shuffle} shuffle: {access.reason}"
        ]
        if most < len(whole):
            notes.append(f"measured on the first {most:,} of {len(whole):,} rows")
        once, why = _cold(asked, manifest, progress)
        notes += why
        progress("reading into memory")
        reference = _Reference(shards.fields(names, asked.rows), asked)
        runs = {_COPY: reference.copy, _GATHER: reference.gather}
        for backend in _backends(manifest):
            progress(f"{backend}, first epoch")
            reader = held.enter_context(_Reader(asked, backend))
            once[f"{backend}: shuffled, first epoch"] = reader.first_epoch()
            runs[f"{backend}: shuffled"] = reader.shuffled
            runs[f"{backend}: in order"] = reader.in_order
        rounds = _rounds(runs, progress)
    figures = []
    for what in runs:
        base = _COPY if what.endswith("in order") else _GATHER
        against = None if what in (_COPY, _GATHER) else [found[base] for found in rounds]
        figures.append(_figure(what, [found[what] for found in rounds], row_bytes, against))
    figures += [_figure(what, [rate], row_bytes) for what, rate in once.items()]
    return Bench(names, len(asked.rows), row_bytes, tuple(figures), tuple(notes))


def _rounds(runs: Mapping[str, Callable[[], Rate]], progress: Progress) -> list[Mapping[str, Rate]]:
    found: list[Mapping[str, Rate]] = []
    for number in range(_ROUNDS):
        rates = {}
        for what, run in runs.items():
            progress(f"{what}, round {number + 1} of {_ROUNDS}")
            rates[what] = run()
        found.append(rates)
    return found


def _figure(
    what: str, rates: Sequence[Rate], row_bytes: float, against: Sequence[Rate] | None = None
) -> Figure:
    found = [samples / seconds for samples, seconds in rates]
    share = None
    if against is not None:
        bases = [samples / seconds for samples, seconds in against]
        share = median(rate / base for rate, base in zip(found, bases, strict=True))
    return Figure(what, median(found), median(found) * row_bytes, share)


def _backends(manifest: Manifest) -> list[Backend]:
    """Ways of reading that this set allows on this machine."""
    plain = manifest.plan.compression is None
    fits = decoded_bytes(manifest) <= min(free_memory() // 2, 4 * _SAMPLE_BYTES)
    known: list[tuple[Backend, bool]] = [("mmap", plain), ("pread", True), ("ram", fits)]
    return [backend for backend, usable in known if usable]


def _fields(manifest: Manifest, asked: tuple[str, ...]) -> tuple[str, ...]:
    numeric = tuple(f.name for f in manifest.fields if f.numeric and f != SPLIT)
    names = asked or numeric
    text = [name for name in names if not manifest.field(name).numeric]
    if text or not names:
        raise DataError(
            f"fields to measure: found {', '.join(text) or 'none'}, expected fields of numbers: "
            f"{', '.join(numeric) or 'the set has none'}"
        )
    return names


def _row_bytes(manifest: Manifest, names: Sequence[str]) -> float:
    """Of these fields, on average."""
    fields = [manifest.field(name) for name in names]
    sizes = [f.entry_bytes * sum(s.arrays[f.name].length for s in manifest.shards) for f in fields]
    return sum(sizes) / manifest.rows


class _Reference:
    """The same rows as arrays in memory, and the same work on them by one thread."""

    def __init__(self, fields: Mapping[str, Any], asked: _Asked) -> None:
        self._columns: list[tuple[Array, Ids | None]] = [
            (found.values, found.offsets) if isinstance(found, Ragged) else (found, None)
            for found in fields.values()
        ]
        self._buffers = [np.zeros((0, *v.shape[1:]), dtype=v.dtype) for v, _ in self._columns]
        self._rows, self._options = len(asked.rows), asked.options
        self._order = np.random.default_rng(0).permutation(self._rows)

    def copy(self) -> Rate:
        """Consecutive rows, into buffers that are used again."""
        return self._run(self._copied)

    def gather(self) -> Rate:
        """Shuffled rows by np.take; where they lie is known before."""
        return self._run(self._taken)

    def _run(self, work_on: Callable[[int, slice], Callable[[], None]]) -> Rate:
        done, spent = 0, 0.0
        while spent < self._options.seconds:
            for start in range(0, self._rows, self._options.batch_size):
                rows = slice(start, min(start + self._options.batch_size, self._rows))
                work = [work_on(column, rows) for column in range(len(self._columns))]
                begin = time.perf_counter()
                for step in work:
                    step()
                spent += time.perf_counter() - begin
                done += rows.stop - rows.start
                if spent >= self._options.seconds:
                    break
        return done, spent

    def _copied(self, column: int, rows: slice) -> Callable[[], None]:
        values, offsets = self._columns[column]
        span = rows if offsets is None else slice(offsets[rows.start], offsets[rows.stop])
        out = self._buffer(column, span.stop - span.start)
        return lambda: np.copyto(out, values[span])

    def _taken(self, column: int, rows: slice) -> Callable[[], None]:
        values, offsets = self._columns[column]
        places = self._order[rows]
        if offsets is not None:
            places = places_of(offsets[places], offsets[places + 1] - offsets[places])
        out = self._buffer(column, len(places))

        def take() -> None:
            np.take(values, places, axis=0, out=out, mode="clip")

        return take

    def _buffer(self, column: int, count: int) -> Array:
        if len(self._buffers[column]) < count:
            like = self._buffers[column]
            self._buffers[column] = np.zeros((count + count // 4, *like.shape[1:]), like.dtype)
        return self._buffers[column][:count]


class _Reader:
    """One back end, as a training would use it."""

    def __init__(self, asked: _Asked, backend: Backend) -> None:
        self._asked, self.backend = asked, backend
        self._shards = ShardSet.open(asked.path, verify="read", backend=backend)
        fields = [self._shards.manifest.field(name) for name in asked.names]
        self._dense = {f.name: f for f in fields} if all(f.axis is None for f in fields) else {}
        self._shuffled = self._loader(None)
        self._ordered = self._loader("none")

    def _loader(self, shuffle: Literal["none"] | None) -> ShardLoader:
        asked = self._asked
        how: Literal["none", "global", "block"] = "block" if self.backend == "pread" else "global"
        return ShardLoader(
            self._shards,
            asked.names,
            rows=asked.rows,
            batch_size=asked.options.batch_size,
            shuffle=shuffle or how,
            rank=0,
            size=1,
            threads=asked.options.threads,
        )

    def shuffled(self) -> Rate:
        """ShardLoader, global shuffle, or block shuffle of pread."""
        return self._batches(self._shuffled, self._asked.options.seconds)

    def first_epoch(self, seconds: float = math.inf) -> Rate:
        """The same, for one epoch or as long as this."""
        return self._batches(self._shuffled, seconds, epochs=1)

    def in_order(self) -> Rate:
        """ShardSet.read, one thread; of ragged fields ShardLoader."""
        seconds = self._asked.options.seconds
        return self._consecutive() if self._dense else self._batches(self._ordered, seconds)

    def _batches(self, loader: ShardLoader, seconds: float, epochs: float = math.inf) -> Rate:
        done, begin, spent = 0, time.perf_counter(), 0.0
        while spent < seconds and epochs > 0:
            loader.set_epoch(loader.epoch + 1)
            with closing(cast(Generator[Tensors], iter(loader))) as batches:
                for batch in batches:
                    done += len(batch["_rows"])
                    spent = time.perf_counter() - begin
                    if spent >= seconds:
                        break
            epochs -= 1
        return done, spent

    def _consecutive(self) -> Rate:
        rows, size = self._asked.rows, self._asked.options.batch_size
        outs = {n: np.zeros((size, *f.shape), f.numpy) for n, f in self._dense.items()}
        done, begin, spent = 0, time.perf_counter(), 0.0
        while spent < self._asked.options.seconds:
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                in_one_piece = batch[-1] - batch[0] == len(batch) - 1
                for name, out in outs.items():
                    if in_one_piece:
                        self._shards.read(name, batch[0], batch[-1] + 1, out[: len(batch)])
                    else:
                        self._shards.gather(name, batch, out[: len(batch)])
                done += len(batch)
                spent = time.perf_counter() - begin
                if spent >= self._asked.options.seconds:
                    break
        return done, spent

    def __enter__(self) -> _Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._shards.close()


def _cold(
    asked: _Asked, manifest: Manifest, progress: Progress
) -> tuple[dict[str, Rate], list[str]]:
    """Rates with nothing in the page cache; or why there are none."""
    files = [asked.path / shard.file for shard in manifest.shards]
    found: dict[str, Rate] = {}
    for backend in _backends(manifest):
        if backend == "ram":
            continue
        progress(f"{backend}, cold")
        if not _evicted(files):
            note = "no cold figures: the page cache cannot be emptied here (in memory, or in use)"
            return found, [note]
        with _Reader(asked, backend) as reader:
            found[f"{backend}: shuffled, cold"] = reader.first_epoch(_COLD * asked.options.seconds)
    return found, ["cold: this node's page cache was emptied, not the caches of disk or server"]


def _evicted(files: Sequence[Path]) -> bool:
    for wait_s in (0.1, 0.2, 0.4):
        gc.collect()  # pages that a closed reader still maps would stay
        if all(evict(file) for file in files):
            return True
        time.sleep(wait_s)  # reads ahead may still be under way
    return False
