"""Build a shard set in parallel: over MPI ranks, and over processes of each rank.

The content is a function of the plan alone: any number of ranks and processes gives the same bytes.
The manifest is written last; until then there is no set, and the same command continues.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dmi_hpc.data.manifest import (
    MANIFEST,
    SPLIT,
    SPLITS,
    BuildPlan,
    Field,
    Manifest,
    Moments,
    ShardRecord,
    read_manifest,
    split_of,
    write_manifest,
)
from dmi_hpc.data.shards import recover_shard, write_shard
from dmi_hpc.errors import DataError, DMIError, together
from dmi_hpc.files import exclusive, remove_stale, writing

__all__ = ["Alone", "BuildPlan", "Communicator", "MakeRows", "build"]

Array = np.ndarray[Any, np.dtype[Any]]
MakeRows = Callable[[Array], Mapping[str, Array]]

ROWS_PER_CALL = 16  # of make_rows: how finely progress is reported and a stop obeyed
_POLL_S = 0.25
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Communicator(Protocol):
    """The ranks that build one set together."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def gather(self, value: Any) -> list[Any] | None:
        """Values of all ranks in order on rank 0, None elsewhere."""

    def share(self, value: Any) -> list[Any]:
        """Values of all ranks in order, on every rank."""


class Alone:
    """The communicator of a single process."""

    rank = 0
    size = 1

    def gather(self, value: Any) -> list[Any] | None:
        return [value]

    def share(self, value: Any) -> list[Any]:
        return [value]


@dataclass(frozen=True)
class _Part:
    """What the manifest needs to know of one finished shard."""

    record: ShardRecord
    moments: dict[str, Moments]  # of training rows, by numeric field
    split_rows: tuple[int, ...]


def build(
    target: Path,
    plan: BuildPlan,
    make_rows: MakeRows,
    comm: Communicator,
    processes: int,
    progress: Callable[[int], None],
) -> Manifest:
    """Make the shard set `target`, or return it if this very plan is already carried out there.

    make_rows: (n,) int64 row numbers -> {field: (n, *shape)}; a pure function, picklable if
    `processes` > 1 (then started by spawn, one thread each). It may return "split" too, (n,) uint8,
    where rows share a key; else the key of a row is its number in decimal.
    progress: called with the number of rows that this rank has finished since the last call.

    Whole shards of an interrupted build of the same plan are kept. Raises DataError: another set is
    there, disk full, make_rows failed, its values are not finite or not what the plan says; RunError:
    another build is at work there.
    """
    with ExitStack() as held:
        done: Manifest | None = None
        with together(comm.share):
            if comm.rank == 0:
                done = _enter(target, plan, held)
        done = comm.share(done)[0]
        if done is not None:
            return done
        parts: dict[int, _Part] = {}
        with together(comm.share):
            parts = _parts(target, plan, make_rows, comm, processes, progress)
        gathered = comm.gather(parts)
        with together(comm.share):
            if gathered is not None:
                _commit(target, plan, gathered)
        return read_manifest(target)


def _enter(target: Path, plan: BuildPlan, held: ExitStack) -> Manifest | None:
    """On rank 0, first: the complete set of this plan, or None and `held` has the target's lock."""
    done = _carried_out(target, plan)
    if done is None:
        with writing(target.parent):
            held.enter_context(exclusive(target, "build of a data set"))
        done = _carried_out(target, plan)  # by another, just before we had the lock
        remove_stale(target)
    return done


def _parts(
    target: Path,
    plan: BuildPlan,
    make_rows: MakeRows,
    comm: Communicator,
    processes: int,
    progress: Callable[[int], None],
) -> dict[int, _Part]:
    """This rank's shards, made."""
    work = _Work(target, plan, plan.fingerprint(), make_rows)
    mine = range(comm.rank, plan.shard_count, comm.size)
    try:
        if processes == 1:
            return {shard: work.shard(shard, progress) for shard in mine}
        return _in_processes(work, mine, processes, progress)
    except OSError as problem:
        raise _explain(problem, target, plan) from problem


def _carried_out(target: Path, plan: BuildPlan) -> Manifest | None:
    """The complete set of this plan, None if there is none; DataError if another set is there."""
    if not (target / MANIFEST).exists():
        return None
    found = read_manifest(target)
    here, wanted = found.plan_json(), plan.plan_json()
    changed = [key for key in wanted if here[key] != wanted[key]]
    if changed:
        lines = "".join(f"\n  {key}: found {here[key]}, expected {wanted[key]}" for key in changed)
        raise DataError(
            f"{target}: holds another data set; it differs in:{lines}\n"
            "Choose another folder, or delete this one."
        )
    sizes = [(target / s.file).stat().st_size for s in found.shards if (target / s.file).exists()]
    return found if sizes == [shard.bytes for shard in found.shards] else None


def _commit(target: Path, plan: BuildPlan, gathered: Sequence[Mapping[int, _Part]]) -> None:
    """On rank 0, when all ranks are done: write the manifest."""
    parts = {shard: part for some in gathered for shard, part in some.items()}
    try:
        write_manifest(target, _manifest(plan, [parts[k] for k in range(plan.shard_count)]))
    except OSError as problem:
        raise _explain(problem, target, plan) from problem


def _manifest(plan: BuildPlan, parts: Sequence[_Part]) -> Manifest:
    """Merged in the order of shards: the same floats for any number of ranks."""
    statistics: dict[str, Moments] = {}
    for part in parts:
        for name, moments in part.moments.items():
            merged = statistics.get(name)
            statistics[name] = merged.merge(moments) if merged else moments
    totals = np.sum([part.split_rows for part in parts], axis=0)
    return Manifest(
        **dict(plan),
        shards=tuple(part.record for part in parts),
        split_rows={name: int(n) for name, n in zip(SPLITS, totals, strict=True)},
        statistics={name: moments.statistics() for name, moments in statistics.items()},
    )


def _explain(problem: OSError, target: Path, plan: BuildPlan) -> Exception:
    if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"{target}: cannot write the data set: {problem}")
    needed = plan.rows * sum(field.row_bytes for field in plan.fields)
    free = shutil.disk_usage(target if target.exists() else target.parent).free
    return DataError(
        f"{target}: no space left. The whole set needs about {needed / 1e6:.1f} MB, "
        f"{free / 1e6:.1f} MB are free here (or your quota is spent). Make room and repeat the "
        "command: finished shards are kept."
    )


class _Stopped(Exception):
    """Another worker failed."""


@dataclass(frozen=True)
class _Work:
    """Makes single shards; sent to the worker processes."""

    target: Path
    plan: BuildPlan
    fingerprint: str
    make_rows: MakeRows

    def shard(self, shard: int, advance: Callable[[int], None]) -> _Part:
        rows, path = self.plan.shard_rows(shard), self.target / f"shard-{shard:05d}.h5"
        kept = recover_shard(path, len(rows), self.plan.fields, self.fingerprint)
        if kept is not None:
            record, arrays = kept
            advance(len(rows))
        else:
            arrays = self._arrays(rows, advance)
            record = write_shard(path, arrays, self.plan.fields, self.fingerprint)
        train = arrays[SPLIT.name] == 0
        moments = {
            field.name: Moments.of(arrays[field.name][train])
            for field in self.plan.fields
            if field.numeric and field != SPLIT and train.any()
        }
        counts = np.bincount(arrays[SPLIT.name], minlength=len(SPLITS))
        return _Part(record, moments, tuple(int(n) for n in counts))

    def _arrays(self, rows: range, advance: Callable[[int], None]) -> dict[str, Array]:
        pieces = []
        for start in range(rows.start, rows.stop, ROWS_PER_CALL):
            ids = np.arange(start, min(start + ROWS_PER_CALL, rows.stop), dtype=np.int64)
            pieces.append(self._made(ids))
            advance(len(ids))
        names = pieces[0].keys()
        return {name: np.concatenate([piece[name] for piece in pieces]) for name in names}

    def _made(self, ids: Array) -> dict[str, Array]:
        where = f"rows {ids[0]} to {ids[-1]}"
        try:
            made = dict(self.make_rows(ids))
        except DMIError:
            raise
        except Exception as error:
            raise DataError(f"{where}: {type(error).__name__}: {error}") from error
        if SPLIT.name not in made:
            rule = self.plan.split_rule
            splits = [split_of(rule.seed, str(i), rule.validation, rule.test) for i in ids]
            made[SPLIT.name] = np.array(splits, dtype=np.uint8)
        for field in self.plan.fields:
            _check(field, made, len(ids), where)
        return made


def _check(field: Field, made: Mapping[str, Array], rows: int, where: str) -> None:
    if field.name not in made:
        raise DataError(f"{where}: no field {field.name!r}; found {', '.join(made)}")
    array = made[field.name]
    if array.shape != (rows, *field.shape) or array.dtype.newbyteorder("<") != field.numpy:
        raise DataError(
            f"{where}: field {field.name!r}: expected {field.dtype} {(rows, *field.shape)}, "
            f"found {array.dtype} {array.shape}"
        )
    if field.numeric and not np.isfinite(array).all():
        raise DataError(f"{where}: field {field.name!r} has values that are not finite")
    if field == SPLIT and array.max() >= len(SPLITS):
        raise DataError(f"{where}: field 'split': expected 0, 1 or 2, found {array.max()}")


def _in_processes(
    work: _Work, shards: range, processes: int, progress: Callable[[int], None]
) -> dict[int, _Part]:
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    workers = max(1, min(processes, len(shards)))
    with (
        _one_thread_each(),
        ProcessPoolExecutor(workers, context, _start_worker, (work, counter, stop)) as pool,
    ):
        futures = {shard: pool.submit(_one_shard, shard) for shard in shards}
        waiting, reported = set(futures.values()), 0
        try:
            while waiting:
                finished, waiting = wait(waiting, _POLL_S, FIRST_COMPLETED)
                made = counter.value
                progress(made - reported)
                reported = made
                for future in finished:
                    future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (killed, or out of memory). Use fewer processes and repeat "
                "the command: finished shards are kept."
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)  # waits: a worker may still be starting
    return {shard: future.result() for shard, future in futures.items()}


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Spawned children read these when they load numpy and torch."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_worker: tuple[_Work, Any, Event] | None = None  # set once in each worker process


def _start_worker(work: _Work, counter: Any, stop: Event) -> None:
    global _worker
    _worker = work, counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent cannot stop its pool: without this its workers would stay for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"
    wait_for([parent.sentinel])
    os._exit(1)


def _one_shard(shard: int) -> _Part:
    assert _worker is not None, "runs in workers only"
    work, counter, stop = _worker

    def advance(rows: int) -> None:
        if stop.is_set():
            raise _Stopped
        with counter.get_lock():
            counter.value += rows

    return work.shard(shard, advance)
