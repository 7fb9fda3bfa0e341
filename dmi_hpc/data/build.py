"""Build a shard set in parallel: over MPI ranks, and over processes of each rank.

The content is a function of the plan alone: any number of ranks and processes gives the same bytes.
The manifest is written last; until then there is no set, and the same build continues it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dmi_hpc.data.hdf5 import remove_stale_master
from dmi_hpc.data.manifest import (
    MANIFEST,
    SPLIT,
    BuildPlan,
    Manifest,
    ShardRecord,
    read_manifest,
    split_of,
    write_manifest,
)
from dmi_hpc.data.parts import (
    Part,
    explain,
    is_whole,
    make_part,
    manifest_of,
    note_part,
    noted_part,
    remove_strays,
    take_over,
    unfinished,
)
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.sampler import Order
from dmi_hpc.data.shard import check_rows, concatenate
from dmi_hpc.data.workers import CONTEXT, pool
from dmi_hpc.errors import DataError, DMIError, together
from dmi_hpc.files import exclusive, writing

__all__ = ["Alone", "BuildPlan", "Communicator", "MakeRows", "build"]

Array = np.ndarray[Any, np.dtype[Any]]
MakeRows = Callable[[Array], Mapping[str, "Array | Ragged"]]

ROWS_PER_CALL = 16  # of make_rows: how finely progress is reported and a stop obeyed
_POLL_S = 0.25


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


def build(
    target: Path,
    plan: BuildPlan,
    make_rows: MakeRows,
    comm: Communicator,
    processes: int,
    progress: Callable[[int], None],
    rows_per_call: int = ROWS_PER_CALL,
) -> Manifest:
    """Make the shard set `target`, or return it if this very plan is already carried out there.

    make_rows: (n,) int64 row numbers -> {field: (n, *shape) or Ragged}; a pure function, picklable
    if `processes` > 1 (then started by spawn, one thread each). It may return "split" too, (n,)
    uint8, where rows share a key; else the key of a row is its number in decimal.
    progress: called with the number of rows that this rank has finished since the last call.
    rows_per_call: at most so many go into one call of make_rows.

    Rows of a shard come in the order of their numbers, or of a shuffle if the plan says so, and are
    then grouped by split. Whole shards of an interrupted build of the same plan are kept. Raises
    DataError: another set is there, disk full, make_rows failed, its values are not finite or not
    what the plan says; RunError: another build is at work there.
    """
    with ExitStack() as held:
        before: Manifest | None = None
        whole = False
        with together(comm.share):
            if comm.rank == 0:
                before, whole = _enter(target, plan, held)
        before, whole = comm.share((before, whole))[0]
        if before is not None and whole:
            return before
        parts: dict[int, Part] = {}
        with together(comm.share):
            known = {shard.file: shard for shard in before.shards} if before else {}
            work = _Work(target, plan, plan.fingerprint(), make_rows, rows_per_call, known)
            parts = _parts(work, comm, processes, progress)
        gathered = comm.gather(parts)
        with together(comm.share):
            if gathered is not None:
                _commit(target, plan, gathered, before)
        return read_manifest(target)


def _enter(target: Path, plan: BuildPlan, held: ExitStack) -> tuple[Manifest | None, bool]:
    """On rank 0, first: (manifest of this plan, whether its shards are all there).

    If there is something left to do, `held` has the target's lock.
    """
    before, whole = _carried_out(target, plan)
    if not whole or unfinished(target):
        with writing(target.parent):
            held.enter_context(exclusive(target, "build of a data set"))
        before, whole = _carried_out(target, plan)  # by another, just before we had the lock
        take_over(target)
        if whole:  # killed just behind its commit
            remove_strays(target, notes=True)
    return before, whole


def _parts(
    work: _Work, comm: Communicator, processes: int, progress: Callable[[int], None]
) -> dict[int, Part]:
    """This rank's shards, made."""
    mine = range(comm.rank, work.plan.shard_count, comm.size)
    try:
        if processes == 1:
            return {shard: work.shard(shard, progress) for shard in mine}
        return _in_processes(work, mine, processes, progress)
    except OSError as problem:
        raise explain(problem, work.target, _needed(work.plan)) from problem


def _needed(plan: BuildPlan) -> int | None:
    """Bytes of the whole set, if its fields tell."""
    assert plan.rows is not None, "rows of a plan to build are known"
    known = not plan.axes and plan.compression is None
    return plan.rows * sum(field.entry_bytes for field in plan.fields) if known else None


def _carried_out(target: Path, plan: BuildPlan) -> tuple[Manifest | None, bool]:
    """(manifest of this plan, if any; whether its shards are all there, by their sizes).

    Raises DataError if another set is there.
    """
    if not (target / MANIFEST).exists():
        return None, False
    found = read_manifest(target)
    here, wanted = found.plan.model_dump(mode="json"), plan.model_dump(mode="json")
    changed = [key for key in wanted if here[key] != wanted[key]]
    if changed:
        lines = "".join(f"\n  {key}: found {here[key]}, expected {wanted[key]}" for key in changed)
        raise DataError(
            f"{target}: holds another data set; it differs in:{lines}\n"
            "Choose another folder, or delete this one."
        )
    sizes = [(target / s.file).stat().st_size for s in found.shards if (target / s.file).exists()]
    return found, sizes == [shard.bytes for shard in found.shards]


def _commit(
    target: Path,
    plan: BuildPlan,
    gathered: Sequence[Mapping[int, Part]],
    before: Manifest | None,
) -> None:
    """On rank 0, when all ranks are done: write the manifest."""
    parts = {shard: part for some in gathered for shard, part in some.items()}
    manifest = manifest_of(plan, [parts[k] for k in range(plan.shard_count)])
    if before is not None:  # lost shards were made again; rows, so statistics, are the plan's
        manifest = manifest.model_copy(update={"statistics": before.statistics})
    try:
        remove_stale_master(target, manifest.identity)
        write_manifest(target, manifest)
        remove_strays(target, notes=True)
    except OSError as problem:
        raise explain(problem, target, _needed(plan)) from problem


class _Stopped(Exception):
    """Another worker failed."""


@dataclass(frozen=True)
class _Work:
    """Makes single shards; sent to the worker processes."""

    target: Path
    plan: BuildPlan
    fingerprint: str
    make_rows: MakeRows
    rows_per_call: int
    known: Mapping[str, ShardRecord]  # of a set that has lost some of its shards

    def shard(self, shard: int, advance: Callable[[int], None]) -> Part:
        rows, path = self.plan.shard_rows(shard), self.target / f"shard-{shard:05d}.h5"
        part = noted_part(path, self.fingerprint)
        record = self.known.get(path.name)
        if part is None and record is not None and is_whole(path, record):
            part = Part(fingerprint=self.fingerprint, record=record, moments={})
        if part is not None:
            advance(len(rows))
            return part
        part = make_part(path, self.plan, self._rows(rows, advance))
        note_part(path, part)
        return part

    def _rows(self, rows: range, advance: Callable[[int], None]) -> dict[str, Array | Ragged]:
        pieces = []
        for start in range(rows.start, rows.stop, self.rows_per_call):
            ids = np.arange(start, min(start + self.rows_per_call, rows.stop), dtype=np.int64)
            if self.plan.shuffled:
                assert self.plan.rows is not None, "rows of a plan to build are known"
                ids = Order(self.plan.seed, self.plan.rows).index(0, ids)
            pieces.append(self._made(ids))
            advance(len(ids))
        return concatenate(self.plan, pieces)

    def _made(self, ids: Array) -> dict[str, Array | Ragged]:
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
        found = check_rows(self.plan, made, where)
        if found != len(ids):
            raise DataError(f"{where}: expected {len(ids)} rows, found {found}")
        return made


def _in_processes(
    work: _Work, shards: range, processes: int, progress: Callable[[int], None]
) -> dict[int, Part]:
    counter, stop = CONTEXT.Value("q", 0), CONTEXT.Event()
    workers = max(1, min(processes, len(shards)))
    with pool(workers, _start_worker, (work, counter, stop)) as executor:
        futures = {shard: executor.submit(_one_shard, shard) for shard in shards}
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
    return {shard: future.result() for shard, future in futures.items()}


_worker: tuple[_Work, Any, Event] | None = None  # set once in each worker process


def _start_worker(work: _Work, counter: Any, stop: Event) -> None:
    global _worker
    _worker = work, counter, stop


def _one_shard(shard: int) -> Part:
    assert _worker is not None, "runs in workers only"
    work, counter, stop = _worker

    def advance(rows: int) -> None:
        if stop.is_set():
            raise _Stopped
        with counter.get_lock():
            counter.value += rows

    return work.shard(shard, advance)
