"""The jobs that a run has had on a machine with a batch system, from ``RUN/launch``.

A *session* is one stay of a job in an allocation. A job that is requeued has several, one after the
other. Files, each with one writer, all JSON lines with "event" and "time" (seconds since 1970):

submissions.jsonl   what was submitted or cancelled from a login node
jobs/JOB.jsonl      what the sessions of that job say of themselves (of an array: jobs/ID_TASK.jsonl)
jobs/JOB.alive      touched every `ALIVE_S` while a session lives: the end of one that was killed
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dmi_hpc.files import read_json_lines
from dmi_hpc.report.checked import validate

FOLDER, JOBS = "launch", "jobs"
SUBMISSIONS = "submissions.jsonl"
ALIVE = ".alive"
ALIVE_S = 20.0
# nobody has touched the file for so long: dead. Clocks of nodes and file servers differ by seconds
DEAD_S = 4 * ALIVE_S
KILLED = "killed"


@dataclass(frozen=True)
class Submission:
    """after: the job it waits for; why: "user", "chain" (by the job before) or "resume"."""

    job: str
    time: float
    scheduler: str = ""
    machine: str = ""
    nodes: int = 0
    time_s: float = 0.0
    islands: int = 0
    after: str | None = None
    why: str = "user"


@dataclass(frozen=True)
class StageRun:
    """code: its exit code, and seconds: what it took; None while it runs, or if it was killed."""

    stage: str
    began: float
    seconds: float | None = None
    code: int | None = None


@dataclass(frozen=True)
class Session:
    """began, ended, until, alive: seconds since 1970; alive: when it was last known to live; ended:
    None if it runs, as far as its files tell; until: its end, or now. how: "" while it runs, "killed"
    if it could not say more. next: "requeue", the job that goes on, or "none". moved: did it finish
    anything, if it says so. continues: the job before it that it goes on from, "" if none; waited_s:
    in the queue.
    """

    job: str
    began: float
    restart: int = 0
    scheduler: str = ""
    machine: str = ""
    nodes: tuple[str, ...] = ()
    cpus_per_node: int = 0
    gpus_per_node: int = 0
    ends: float | None = None
    island: str = ""
    stages: tuple[str, ...] = ()
    alive: float = 0.0
    until: float = 0.0
    ended: float | None = None
    how: str = ""
    code: int | None = None
    node_s: float = 0.0
    next: str = ""
    why: str = ""
    moved: bool | None = None
    stop: str = ""
    ready_s: float | None = None
    runs: tuple[StageRun, ...] = ()
    continues: str = ""
    waited_s: float | None = None

    @property
    def running(self) -> bool:
        return self.ended is None

    @property
    def seconds(self) -> float:
        return max(0.0, self.until - self.began)


@dataclass(frozen=True)
class _Event:
    event: str
    time: float


@dataclass(frozen=True)
class _Started:
    job: str
    time: float
    nodes: tuple[str, ...]
    restart: int = 0
    scheduler: str = ""
    machine: str = ""
    cpus_per_node: int = 0
    gpus_per_node: int = 0
    ends: float | None = None
    island: str = ""
    stages: tuple[str, ...] = ()
    before: float | None = None  # when the job's session before this one was last alive


@dataclass(frozen=True)
class _Stage:
    stage: str
    state: str
    time: float
    code: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class _Ended:
    how: str
    time: float
    code: int | None = None
    node_s: float = 0.0
    next: str = "none"
    why: str = ""
    moved: bool | None = None


@dataclass(frozen=True)
class _Said:
    """Of the events "ready" and "stop"."""

    what: str = ""
    seconds: float | None = None
    why: str = ""


@dataclass
class _Open:
    """A session while its file is read."""

    session: Session
    runs: list[StageRun] = field(default_factory=list)

    def closed(self, alive: float | None, now: float | None = None) -> Session:
        """alive: when it was last heard of, besides its own lines; now: given, if it still runs."""
        session = replace(self.session, runs=tuple(self.runs))
        if session.ended is not None:
            return replace(session, until=session.ended)
        last = max(session.alive, alive or 0.0)
        until = last if now is None else max(now, last)
        return replace(
            session,
            alive=last,
            until=until,
            ended=last if now is None else None,
            how=KILLED if now is None else "",
            node_s=(until - session.began) * len(session.nodes),
        )


def sessions(run: Path, now: float | None = None) -> list[Session]:
    """All sessions of the run, by their beginning; [] without any.

    now: seconds since 1970, by which one that is silent is taken for killed. Raises RunError if a
    file holds something else.
    """
    moment = time.time() if now is None else now
    paths = sorted((run / FOLDER / JOBS).glob("*.jsonl"))
    found = [session for path in paths for session in _of_job(path, moment)]
    found.sort(key=lambda session: session.began)
    return _joined(found, submissions(run))


def submissions(run: Path) -> list[Submission]:
    """What was submitted, from login nodes and by jobs for those that go on, in order of time."""
    folder = run / FOLDER
    paths = (folder / SUBMISSIONS, *sorted((folder / JOBS).glob("*.jsonl")))
    return sorted((e for path in paths for e in _submitted_by(path)), key=lambda e: e.time)


def cancelled(run: Path, job: str) -> bool:
    """Was this job, or the array it is a task of, given up by ``dmi launch cancel``?"""
    path = run / FOLDER / SUBMISSIONS
    names = {job, job.partition("_")[0]}
    lines = read_json_lines(path)
    return any(line.get("event") == "cancel" and line.get("job") in names for line in lines)


def node_hours(run: Path, now: float | None = None) -> float:
    """Of all sessions, up to now."""
    return sum(session.node_s for session in sessions(run, now)) / 3600


def _submitted_by(path: Path) -> list[Submission]:
    lines = (line for line in read_json_lines(path) if line.get("event") == "submitted")
    return [validate(line, Submission, path) for line in lines]


def _of_job(path: Path, now: float) -> list[Session]:
    found: list[Session] = []
    current: _Open | None = None
    for line in read_json_lines(path):
        event = validate(line, _Event, path)
        if event.event == "started":
            started = validate(line, _Started, path)
            if current is not None:
                found.append(current.closed(started.before))
            current = _opened(started)
        elif current is not None:
            _add(current, event, line, path)
    if current is not None:
        try:
            alive = path.with_suffix(ALIVE).stat().st_mtime
        except FileNotFoundError:
            alive = current.session.alive
        dead = now - max(alive, current.session.alive) > DEAD_S
        found.append(current.closed(alive, None if dead else now))
    return found


def _opened(started: _Started) -> _Open:
    known = {key: value for key, value in vars(started).items() if key not in ("time", "before")}
    return _Open(Session(**known, began=started.time, alive=started.time))


def _add(current: _Open, event: _Event, line: Mapping[str, Any], path: Path) -> None:
    session = replace(current.session, alive=max(event.time, current.session.alive))
    match event.event:
        case "stage":
            stage = validate(line, _Stage, path)
            if stage.state == "began":
                current.runs.append(StageRun(stage.stage, stage.time))
            elif current.runs:
                current.runs[-1] = replace(current.runs[-1], seconds=stage.seconds, code=stage.code)
        case "ready":
            session = replace(session, ready_s=validate(line, _Said, path).seconds)
        case "stop":
            session = replace(session, stop=validate(line, _Said, path).why)
        case "ended":
            said = vars(validate(line, _Ended, path))
            session = replace(
                session, ended=event.time, **{k: v for k, v in said.items() if k != "time"}
            )
    current.session = session


def _joined(found: Sequence[Session], submitted: Iterable[Submission]) -> list[Session]:
    """Each with the job it goes on from, and its time in the queue."""
    by_job = {entry.job: entry for entry in submitted}
    last: dict[str, Session] = {}  # by island
    ends: dict[str, float] = {}  # by job
    joined = []
    for session in found:
        entry = by_job.get(session.job) or by_job.get(session.job.partition("_")[0])
        before = last.get(session.island)
        queued = ends.get(session.job, entry.time if entry else None)
        if entry is not None and session.job not in ends and entry.after in ends:
            queued = max(entry.time, ends[entry.after])  # it could not begin earlier
        joined.append(
            replace(
                session,
                continues=before.job if before is not None else "",
                waited_s=None if queued is None else max(0.0, session.began - queued),
            )
        )
        last[session.island] = session
        ends[session.job] = session.until
    return joined
