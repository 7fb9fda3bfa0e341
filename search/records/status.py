"""What a search does, as its journals say: for a terminal on any node that sees the run folder."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dmi_hpc.errors import counted
from dmi_hpc.run import open_run
from search.records.control import read_control
from search.records.history import Evaluation, Reader, best_first, readers, reading
from search.records.lines import PATIENCE_S

SILENT_S = 120.0  # a search without an event for so long, and for
SILENT_EVALUATIONS = 3.0  # times its slowest evaluation, was perhaps killed


@dataclass(frozen=True)
class Searching:
    """One search (island) of a run. silent_s: since its last event; busy: share of worker time."""

    island: str
    state: str  # running, silent, or how it ended: finished, stopped, interrupted, failed
    silent_s: float
    finished: int
    running: int
    failed: int
    best: float | None
    workers: int
    busy: float | None
    per_hour: float
    damaged: int


@dataclass(frozen=True)
class Status:
    """A run's searches together. left_s: at the present rate; budget: None if it is not known."""

    name: str
    unit: str
    budget: int | None
    finished: int
    failures: dict[str, int]
    best: Evaluation | None
    best_of: str  # where it came from
    per_hour: float
    left_s: float | None
    code: str
    islands: tuple[Searching, ...]

    @property
    def alive(self) -> bool:
        """Something may still come."""
        return any(island.state in ("running", "silent") for island in self.islands)

    def as_json(self) -> dict[str, Any]:
        best = self.best
        found = None if best is None else {"network": best.name, "fitness": best.fitness}
        return {**asdict(self), "best": found}


class Observer:
    """Follows the searches of a run; `look` costs what came since the last one."""

    def __init__(self, place: Path, *, watching: bool = False) -> None:
        """place: run folder or journal. RunError if there is no search."""
        self._place, self._watching = place, watching
        self._readers: dict[str, Reader] = {}
        self._found: list[Evaluation] = []

    def look(self, now: float) -> Status:
        """now: seconds since 1970. RunError if a journal cannot be read."""
        with reading(self._place):
            for reader in readers(self._place, PATIENCE_S if self._watching else 0.0):
                reader = self._readers.setdefault(reader.island, reader)
                self._found += reader.poll()
        followed = list(self._readers.values())
        islands = tuple(self._searching(reader, now) for reader in followed)
        budget = self._budget()
        per_hour = sum(island.per_hour for island in islands)
        left = None if budget is None else max(0, budget - _networks(self._found))
        best = next(iter(best_first(self._found)), None)
        config = followed[0].header.get("config", {})
        return Status(
            name=self._place.name,
            unit=str(config.get("unit", "")),
            budget=budget,
            finished=_networks(self._found),
            failures=_failures(self._found),
            best=best,
            best_of="" if best is None else _origin(best),
            per_hour=per_hour,
            left_s=None if left is None or not per_hour else 3600 * left / per_hour,
            code=_code(followed),
            islands=islands,
        )

    def _budget(self) -> int | None:
        if self._place.is_file():
            return None
        planned = open_run(self._place).recipe.search.evaluations
        return max(planned, read_control(self._place / "search").evaluations)

    def _searching(self, reader: Reader, now: float) -> Searching:
        clock = reader.clock
        own = [e for e in self._found if e.island == reader.island and not e.known]
        silent = max(0.0, now - clock.last)
        slowest = max((e.seconds for e in own), default=0.0)
        state = clock.ended or "running"
        if state == "running" and silent > max(SILENT_S, SILENT_EVALUATIONS * slowest):
            state = "silent"
        running = len(reader.running) if state == "running" else 0
        worker_s, busy_s = clock.worker_s, clock.busy_s
        if state == "running":
            worker_s += clock.workers * silent
            busy_s += sum(max(0.0, now - float(ask["time"])) for ask in reader.running.values())
        session_s = now - clock.began
        return Searching(
            island=reader.island,
            state=state,
            silent_s=silent,
            finished=_networks(own),
            running=running,
            failed=sum(e.failure is not None for e in own),
            best=min((e.fitness for e in own if e.fitness is not None), default=None),
            workers=clock.workers,
            busy=min(1.0, busy_s / worker_s) if worker_s > 0 else None,
            per_hour=3600 * clock.told / session_s if state == "running" and session_s > 0 else 0.0,
            damaged=reader.damaged,
        )


def _networks(evaluations: list[Evaluation]) -> int:
    """Of the evaluations; one that paused and went on counts once, and one of several islands too."""
    return len({evaluation.hash for evaluation in evaluations})


def _failures(evaluations: list[Evaluation]) -> dict[str, int]:
    """Kinds, the most frequent first; a network that failed on several islands counts once."""
    kinds = {e.hash: e.failure for e in evaluations if e.failure is not None}
    return dict(Counter(kinds.values()).most_common())


def _origin(evaluation: Evaluation) -> str:
    parents = ", ".join(map(str, evaluation.parents))
    return f"{evaluation.origin} of {parents}" if parents else evaluation.origin


def _code(followed: Sequence[Reader]) -> str:
    versions = {str(r.header["code"].get("dmi_hpc")) for r in followed if "code" in r.header}
    commits = {str(r.header["code"].get("git")) for r in followed if "code" in r.header}
    known = sorted(versions) + sorted(commit[:12] for commit in commits if commit != "None")
    return " ".join(known)


def ago(seconds: float) -> str:
    """12 s, 0:08:20, 2 days, 1:00:00."""
    return f"{seconds:.0f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def page(status: Status) -> RenderableType:
    """The whole status for a terminal of any width."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in _lines(status):
        grid.add_row(name, text)
    return Group(grid, Text(""), _table(status)) if len(status.islands) > 1 else grid


def _lines(status: Status) -> list[tuple[str, str]]:
    unit = f" {status.unit}" if status.unit else ""
    done, running = counted(status.finished, "evaluation"), sum(i.running for i in status.islands)
    if status.budget is not None:
        share = 100 * status.finished / status.budget
        done = f"{status.finished:,} of {status.budget:,} evaluations ({share:.0f} %)"
    failures = ", ".join(f"{count} {kind}" for kind, count in status.failures.items())
    best = "none yet"
    if status.best is not None:
        since = ago(max(0.0, time.time() - status.best.told))
        best = f"{status.best.fitness:.4g}{unit} by network {status.best.name}"
        best += f" ({status.best_of}), {since} ago"
    first = status.islands[0]
    lines = [(status.name, done), ("running", str(running)), ("failed", failures or "none")]
    lines.append(("best", best))
    if status.per_hour:
        left = "" if status.left_s is None else f", {ago(status.left_s)} left"
        lines.append(("rate", f"{status.per_hour:,.4g} evaluations an hour{left}"))
    if len(status.islands) == 1:
        busy = "" if first.busy is None else f", {100 * first.busy:.0f} % busy"
        lines += [("workers", f"{first.workers}{busy}"), ("state", _state(first))]
    damaged = sum(island.damaged for island in status.islands)
    if damaged:
        lines.append(("damaged", f"{counted(damaged, 'line')} of the journals, passed over"))
    return [*lines, ("code", status.code)] if status.code else lines


def _state(island: Searching) -> str:
    if island.state == "running":
        return f"running, last event {ago(island.silent_s)} ago"
    if island.state == "silent":
        return f"silent for {ago(island.silent_s)}: killed? --resume would continue it"
    return f"{island.state} {ago(island.silent_s)} ago"


def _table(status: Status) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("island", "done", "running", "failed", "best", "workers", "busy", "state"):
        table.add_column(name, justify="left" if name in ("island", "state") else "right")
    for island in status.islands:
        table.add_row(
            island.island,
            f"{island.finished:,}",
            str(island.running),
            str(island.failed),
            "" if island.best is None else f"{island.best:.4g}",
            str(island.workers),
            "" if island.busy is None else f"{100 * island.busy:.0f} %",
            _state(island),
        )
    return table
