"""What the allocations of a run were used for, by the files of its jobs and of its stages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dmi_hpc.files import read_json_lines
from dmi_hpc.report.checked import validate
from dmi_hpc.report.journals import FILE, MAIN
from dmi_hpc.sessions import ALIVE_S, KILLED, Session, sessions

_WHOLE = ("data", "evaluate", "report")  # stages whose time is useful if they reach their end


@dataclass(frozen=True)
class Stay:
    """One session. evaluations, epochs: that ended in it and count; useful_s, lost_s: of its wall
    time (an evaluation counts as its share of the workers); first_s: until the first evaluation or
    training step began."""

    session: Session
    evaluations: int
    epochs: int
    useful_s: float
    lost_s: float
    first_s: float | None

    @property
    def share(self) -> float | None:
        """Of its wall time, the useful part."""
        return self.useful_s / self.session.seconds if self.session.seconds > 0 else None


@dataclass(frozen=True)
class Allocations:
    """Of a run, by their beginning. Times in node-hours: wall time, times nodes."""

    stays: tuple[Stay, ...]

    @cached_property
    def used_h(self) -> float:
        return sum(stay.session.node_s for stay in self.stays) / 3600

    @cached_property
    def useful_h(self) -> float:
        return self._hours(stay.useful_s for stay in self.stays)

    @cached_property
    def lost_h(self) -> float:
        return self._hours(stay.lost_s for stay in self.stays)

    @property
    def share(self) -> float | None:
        return self.useful_h / self.used_h if self.used_h > 0 else None

    @property
    def waited_s(self) -> float:
        return sum(stay.session.waited_s or 0.0 for stay in self.stays)

    def _hours(self, seconds: Iterable[float]) -> float:
        nodes = (len(stay.session.nodes) for stay in self.stays)
        return sum(s * n for s, n in zip(seconds, nodes, strict=True)) / 3600


@dataclass(frozen=True)
class _Line:
    event: str
    time: float
    id: int = 0
    seconds: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Metric:
    kind: str
    epoch: int = -1
    seconds: float | None = None
    time: float | None = None


@dataclass(frozen=True)
class _Evaluation:
    asked: float
    told: float = math.inf
    seconds: float = 0.0


@dataclass(frozen=True)
class _Epoch:
    """ended: seconds since 1970, as its last step tells; last: no later line repeats it."""

    ended: float
    seconds: float
    last: bool


@dataclass(frozen=True)
class _Search:
    workers: int
    evaluations: tuple[_Evaluation, ...]
    left: tuple[_Line, ...] = ()  # with a checkpoint, to go on in the next session


def read_allocations(run: Path, now: float | None = None) -> Allocations | None:
    """None if the run has had no job of a batch system. Raises RunError as its siblings do."""
    found = sessions(run, now)
    if not found:
        return None
    searches = {island: _search(path) for island, path in _journals(run / "search").items()}
    epochs, steps = _training(run / "train" / "metrics.jsonl")
    return Allocations(tuple(_stay(each, searches, epochs, steps) for each in found))


def _journals(search: Path) -> dict[str, Path]:
    islands = {path.parent.name: path for path in sorted(search.glob(f"islands/*/{FILE}"))}
    return {MAIN: search / FILE, **islands} if (search / FILE).exists() else islands


def _search(path: Path) -> _Search:
    workers = 0
    found: dict[int, _Evaluation] = {}
    left: list[_Line] = []
    for raw in read_json_lines(path):
        if raw.get("event") not in ("header", "ask", "tell", "left"):
            continue
        line = validate(raw, _Line, path)
        if line.event == "header":
            workers = int(line.config.get("workers") or 0)
        elif line.event == "left":
            left.append(line)
        elif line.event == "ask":
            found[line.id] = _Evaluation(line.time)
        elif line.id in found:
            found[line.id] = _Evaluation(found[line.id].asked, line.time, line.seconds)
    return _Search(workers, tuple(found.values()), tuple(left))


def _training(path: Path) -> tuple[list[_Epoch], list[float]]:
    """Epochs as they ended, and when steps were recorded."""
    lines = [validate(raw, _Metric, path) for raw in read_json_lines(path)]
    last = {line.epoch: i for i, line in enumerate(lines) if line.kind == "epoch"}
    epochs, steps = [], []
    for i, line in enumerate(lines):
        if line.time is not None:
            steps.append(line.time)
        elif line.kind == "epoch" and steps:
            epochs.append(_Epoch(steps[-1], line.seconds or 0.0, last[line.epoch] == i))
    return epochs, steps


def _stay(
    session: Session, searches: Mapping[str, _Search], epochs: list[_Epoch], steps: list[float]
) -> Stay:
    began, end = session.began, session.until
    if session.how == KILLED:
        end += ALIVE_S  # it may have lived so long after it was last known to
    search = searches.get(session.island or MAIN, _Search(0, ()))
    told = [e for e in search.evaluations if began <= e.told <= end]
    trained = [e for e in epochs if began <= e.ended <= end]
    left = sum(line.seconds for line in search.left if began <= line.time <= end)
    useful = sum(min(e.seconds, e.told - began) for e in told) / max(1, search.workers)
    useful += left / max(1, search.workers)
    useful += sum(e.seconds for e in trained if e.last)
    useful += sum(r.seconds or 0.0 for r in session.runs if r.stage in _WHOLE and r.code == 0)
    lost = sum(e.seconds for e in trained if not e.last)
    if session.ended is not None:
        open_ = [e for e in search.evaluations if e.asked < session.until and e.told > end]
        cut = sum(session.until - max(e.asked, began) for e in open_)
        lost += max(0.0, cut - left) / max(1, search.workers)
        mine = [time for time in (*(e.ended for e in trained), *steps) if began <= time <= end]
        if session.how == KILLED and mine and session.runs and session.runs[-1].stage == "train":
            lost += max(0.0, session.until - max((e.ended for e in trained), default=min(mine)))
    first = [e.asked for e in search.evaluations] + [e.told - e.seconds for e in told] + steps
    return Stay(
        session=session,
        evaluations=len(told),
        epochs=sum(e.last for e in trained),
        useful_s=min(useful, session.seconds),
        lost_s=min(lost, session.seconds),
        first_s=min((time - began for time in first if began <= time <= end), default=None),
    )
