"""What there is to see of a run that was launched: its jobs, how far its stages are, what was used.

`look` reads files and asks the scheduler once; the rest turns that into lines, and is pure.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmi_hpc.errors import DMIError, LaunchError, RunError, counted
from dmi_hpc.files import read_json_lines
from dmi_hpc.report.formatting import MISSING, duration, number
from dmi_hpc.report.journals import read_searches
from dmi_hpc.report.launching import Stay, read_allocations
from dmi_hpc.sessions import Session, Submission, sessions, submissions
from launch.scheduler import JobState, Scheduler, scheduler_of

LOOK_PATIENCE_S = 5.0  # a person waits for the answer
_GOES_ON = "requeue"
WIDTH = 80


@dataclass(frozen=True)
class View:
    """One look. jobs: what the scheduler has of the run's; silent: why it could not be asked."""

    run: Path
    sessions: tuple[Session, ...]
    jobs: Mapping[str, JobState]
    silent: str
    progress: Mapping[str, str]

    @property
    def node_hours(self) -> float:
        return sum(session.node_s for session in self.sessions) / 3600


def require_run(run: Path) -> None:
    """LaunchError if there is no run, and nothing that was launched."""
    if not (run / "run.json").exists() and not (run / "launch").is_dir():
        raise LaunchError(
            f"{run}: no run here (no run.json, no launch/). Give the run folder, as dmi launch said it"
        )


def look(run: Path, ask: Callable[[str], Scheduler] | None = None) -> View:
    """ask: gives the scheduler of a name; default: the real one, with little patience."""
    require_run(run)
    found, given = sessions(run), submissions(run)
    jobs: dict[str, JobState] = {}
    silent = ""
    name = scheduler_name(found, given)
    if name:
        try:
            scheduler = ask(name) if ask else scheduler_of(name, LOOK_PATIENCE_S)
            jobs = live(scheduler, found, given)
        except LaunchError as error:
            silent = str(error)
    return View(run, tuple(found), jobs, silent, progress(run))


def scheduler_name(found: Sequence[Session], given: Sequence[Submission]) -> str:
    """Of the latest job; "" if there was none of a batch system."""
    names = [(s.began, s.scheduler) for s in found] + [(s.time, s.scheduler) for s in given]
    return max(((t, name) for t, name in names if name in ("slurm", "pbs")), default=(0, ""))[1]


def live(
    scheduler: Scheduler, found: Sequence[Session], given: Sequence[Submission]
) -> dict[str, JobState]:
    """The run's jobs that wait, run or end at this moment."""
    states = scheduler.states(open_jobs(found, given))
    return {job: state for job, state in states.items() if state.phase not in ("ended", "unknown")}


def open_jobs(found: Sequence[Session], given: Sequence[Submission]) -> list[str]:
    """Ids of those that, by the run's own files, may not be over; of arrays as a whole."""
    last = {session.job: session for session in found}
    over = {job for job, s in last.items() if s.how not in ("", "killed") and s.next != _GOES_ON}
    tasks = {entry.job: entry.islands for entry in given if entry.islands}
    ended = {
        job: sum(name.partition("_")[0] == job for name in over) >= count
        for job, count in tasks.items()
    }
    submitted = [entry.job for entry in given if entry.job not in over and not ended.get(entry.job)]
    own = [job for job in last if job not in over and job.partition("_")[0] not in tasks]
    return list(dict.fromkeys([*submitted, *own]))


# how far the stages are


def progress(run: Path) -> dict[str, str]:
    """A line for each stage that has begun, from its own files. What cannot be read says so."""
    known = {"data": _data, "search": _search, "train": _train, "evaluate": _evaluate}
    recipe = _json(run / "run.json").get("recipe", {})
    lines = {}
    for stage, tell in known.items():
        try:
            line = tell(run, recipe)
        except DMIError as error:
            line = str(error)
        if line:
            lines[stage] = line
    return lines


def _data(run: Path, recipe: Mapping[str, Any]) -> str:
    if not (run / "data").is_dir():
        return ""
    rows = _json(run / "data" / "manifest.json").get("rows")
    shards = counted(sum(1 for _ in (run / "data").glob("shard-*")), "shard")
    return f"{rows:,} rows in {shards}, complete" if isinstance(rows, int) else f"{shards} so far"


def _search(run: Path, recipe: Mapping[str, Any]) -> str:
    found = read_searches(run / "search")
    if found is None:
        return ""
    total = recipe.get("search", {}).get("evaluations")
    done = len(found.finished) + len(found.failed)
    parts = [
        f"{done:,} of {total * found.islands:,} evaluations" if total else f"{done:,} evaluations"
    ]
    if found.failed:
        parts.append(f"{len(found.failed)} failed")
    if found.unfinished:
        parts.append(f"{found.unfinished} begun")
    if found.best is not None:
        parts.append(f"best {number(found.best.fitness, 4)}")
    return ", ".join(parts)


def _train(run: Path, recipe: Mapping[str, Any]) -> str:
    lines = read_json_lines(run / "train" / "metrics.jsonl")
    status = _json(run / "train" / "status.json")
    if not lines and not status:
        return ""
    epochs = [line for line in lines if line.get("kind") == "epoch"]
    total = recipe.get("train", {}).get("epochs")
    count = (epochs[-1]["epoch"] + 1) if epochs else 0
    parts = [f"epoch {count} of {total}" if total else counted(count, "epoch")]
    if epochs and isinstance(epochs[-1].get("validation_error"), float):
        parts.append(f"validation error {number(epochs[-1]['validation_error'], 4)}")
    if status.get("state") not in (None, "running"):
        parts.append(
            f"{status['state']}" + (f" ({status['reason']})" if status.get("reason") else "")
        )
    return ", ".join(parts)


def _evaluate(run: Path, recipe: Mapping[str, Any]) -> str:
    return "done" if (run / "evaluation.json").exists() else ""


def _json(path: Path) -> dict[str, Any]:
    """{} if there is no such file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path}: not JSON ({error})") from None
    return found if isinstance(found, dict) else {}


# lines for people


def status_lines(view: View, now: float) -> list[str]:
    """The view as text, a label before each line."""
    lines = [("run", str(view.run))]
    shown = {session.job: session for session in view.sessions}
    for job in dict.fromkeys([*(j for j in view.jobs if "[" not in j), *_interesting(view)]):
        lines.append((f"job {job}", _job_line(view.jobs.get(job), shown.get(job), view, now)))
    if view.silent:
        lines.append(("", f"the scheduler was not asked: {view.silent}"))
    if not view.sessions and not view.jobs:
        lines.append(("jobs", "none in a batch system; started on a machine directly, if at all"))
    lines += list(view.progress.items())
    if view.sessions:
        count = counted(len(view.sessions), "session")
        lines.append(("used", f"{number(view.node_hours)} node-hours in {count}"))
    return [f"{label:<10}{text}" for label, text in lines]


def _interesting(view: View) -> list[str]:
    """Jobs that are known here alone: the last one of each island, and any that seems to run."""
    last = {session.island: session.job for session in view.sessions}
    return [*last.values(), *(s.job for s in view.sessions if s.running)]


def _job_line(state: JobState | None, session: Session | None, view: View, now: float) -> str:
    if state is not None and state.phase == "queued":
        when = "" if state.start is None else f", to start at {clock(state.start)}"
        return f"queued ({state.reason or state.words}), {counted(state.nodes, 'node')}{when}"
    if session is None:
        where = "" if state is None else f" on {counted(state.nodes, 'node')}"
        return f"{'not begun' if state is None else state.words.lower()}{where}"
    if session.job in gone(view) and session.running:
        return f"gone, last alive at {clock(session.alive)}: the scheduler has it no more"
    if session.running or state is not None:
        return _running_line(session, now)
    return _ended_line(session)


def _running_line(session: Session, now: float) -> str:
    where = f"{counted(len(session.nodes), 'node')} of {session.machine}"
    text = f"{'running' if session.running else 'ending'} on {where} for {duration(now - session.began)}"
    if session.ends is not None:
        text += f", until {clock(session.ends)}"
    under_way = [run.stage for run in session.runs if run.seconds is None]
    if under_way and session.running:
        text += f", {under_way[-1]}"
    if session.continues == session.job:
        text += f"; restart {session.restart}"
    elif session.continues:
        text += f"; goes on from job {session.continues}"
    return text


def _ended_line(session: Session) -> str:
    at = clock(session.ended or session.alive)
    if session.how == "killed":
        return f"killed, last alive at {at}"
    goes_on = {"requeue": ", goes on in the same job", "none": "", "": ""}
    then = goes_on.get(session.next, f", job {session.next} goes on")
    return f"{session.how} at {at}{f': {session.why}' if session.why else ''}{then}"


def gone(view: View) -> set[str]:
    """Jobs whose session has not ended by its own files, but the scheduler has them no more."""
    running = {session.job for session in view.sessions if session.running}
    return set() if view.silent else running - set(view.jobs)


def history_lines(run: Path, gone: Collection[str] = ()) -> list[str]:
    """A table of the sessions, not wider than 80 columns if ids are short, and their totals. gone:
    jobs that are no more, whatever their files say."""
    found = read_allocations(run)
    if found is None:
        return [f"{run}: no job of a batch system has run here"]
    header = ("#", "job", "from", "nodes", "began", "time", "node-h", "done", "ended")
    numbers: dict[str, str] = {}
    rows: list[tuple[str, ...]] = [header]
    for i, stay in enumerate(found.stays, start=1):
        how = stay.session.how or ("gone" if stay.session.job in gone else "running")
        rows.append((str(i), *_cells(stay, numbers), how))
        numbers[stay.session.job] = str(i)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    gap = "  " if sum(widths) + 2 * len(widths) <= WIDTH else " "
    lines = [
        gap.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    share = "" if found.share is None else f" ({100 * found.share:.0f} %)"
    return [
        *lines,
        "",
        f"used    {number(found.used_h)} node-hours",
        f"useful  {number(found.useful_h)}{share}: evaluations, epochs and stages that count",
        f"lost    {number(found.lost_h)}: work that was begun again",
        f"queues  {duration(found.waited_s)} of waiting",
    ]


def _cells(stay: Stay, numbers: Mapping[str, str]) -> tuple[str, ...]:
    """numbers: of the latest row of each job."""
    session = stay.session
    done = [f"{stay.evaluations} eval"] if stay.evaluations else []
    done += [f"{stay.epochs} ep"] if stay.epochs else []
    return (
        session.job,
        numbers.get(session.continues, MISSING),
        str(len(session.nodes)),
        time.strftime("%m-%d %H:%M", time.localtime(session.began)),
        _hms(session.seconds),
        number(session.node_s / 3600),
        " ".join(done) or MISSING,
    )


def _hms(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def clock(moment: float) -> str:
    """Local time, with the day if it is another one."""
    same = time.localtime(moment)[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if same else "%d %b %H:%M", time.localtime(moment))


def as_json(view: View) -> dict[str, Any]:
    """For programs: the keys of `View`, plain."""
    return {
        "run": str(view.run),
        "jobs": [asdict(state) for state in view.jobs.values()],
        "scheduler_silent": view.silent,
        "sessions": [asdict(session) for session in view.sessions],
        "progress": dict(view.progress),
        "node_hours": view.node_hours,
    }
