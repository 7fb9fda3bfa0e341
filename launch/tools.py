"""``dmi launch status | logs | cancel | resume | history``: to see and steer what was launched."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dmi_hpc.cli.options import RunFolder
from dmi_hpc.config import parse
from dmi_hpc.errors import LaunchError, RunError
from dmi_hpc.sessions import Submission, sessions, submissions
from dmi_hpc.watch import say
from launch.job import Job, parse_time
from launch.looking import (
    as_json,
    gone,
    history_lines,
    live,
    look,
    require_run,
    scheduler_name,
    status_lines,
)
from launch.records import record_submission
from launch.scheduler import JobState, Scheduler, scheduler_of

WATCH_S = 10.0  # between questions to a scheduler that many ask
FOLLOW_S = 0.5
TAIL_BYTES = 2**20  # of a log, at most, for its last lines


def status(
    run: RunFolder,
    watch: Annotated[bool, typer.Option("--watch", help="again and again, until Ctrl-C")] = False,
    as_json_: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Jobs of a run, how far its stages are, node-hours used."""
    folder = run.resolve()
    if as_json_:
        say(json.dumps(as_json(look(folder)), indent=1))
    elif watch:
        _watch(folder)
    else:
        say("\n".join(status_lines(look(folder), time.time())))


def _watch(run: Path) -> None:
    from rich.live import Live
    from rich.text import Text

    try:
        with Live(auto_refresh=False) as screen:
            while True:
                lines = status_lines(look(run), time.time())
                screen.update(
                    Text("\n".join([*lines, f"{time.strftime('%H:%M:%S')}"])), refresh=True
                )
                time.sleep(WATCH_S)
    except KeyboardInterrupt:  # how a watch ends
        return


def history(run: RunFolder) -> None:
    """All jobs of a run: which goes on from which, time and node-hours, what each got done."""
    view = look(run.resolve())
    say("\n".join(history_lines(view.run, gone(view))))


def logs(
    run: RunFolder,
    job: Annotated[str | None, typer.Option(help="id; default: the latest")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="what this training rank says")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="what the Ray nodes of a search say")] = False,
    lines: Annotated[int, typer.Option("--lines", min=0, help="of the end")] = 40,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="until Ctrl-C")] = False,
) -> None:
    """The end of what a job printed; stages, ranks and jobs have files of their own in RUN/logs."""
    folder = run.resolve() / "logs"
    require_run(run.resolve())
    pattern = _pattern(job, rank, ray=ray)
    path = _newest(folder, pattern)
    if path is None:
        names = ", ".join(sorted(each.name for each in folder.glob("*"))) or "nothing"
        hint = "; a job that waits has no log yet: dmi launch status" if "job-" in pattern else ""
        raise LaunchError(f"{folder}: no {pattern} here, found {names}{hint}")
    say(f"==> {path} <==")
    position = path.stat().st_size
    for line in _tail(path, position, lines):
        say(line)
    if follow:
        try:
            _follow(folder, pattern, path, position)
        except KeyboardInterrupt:
            return


def _pattern(job: str | None, rank: int | None, *, ray: bool) -> str:
    if rank is not None:
        return f"rank-{rank}.log"
    if job is not None and not job.replace("_", "").replace(".", "").isalnum():
        raise LaunchError(f"--job {job!r}: expected the id of a job, such as 1234 or 1234_5")
    return f"ray-{job or '*'}.log" if ray else f"job-{job or '*'}.out"


def _newest(folder: Path, pattern: str) -> Path | None:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


def _tail(path: Path, end: int, lines: int) -> list[str]:
    with path.open("rb") as stream:
        stream.seek(max(0, end - TAIL_BYTES))
        text = stream.read(end - stream.tell()).decode("utf-8", "replace")
    return text.splitlines()[-lines:] if lines else []


def _follow(folder: Path, pattern: str, path: Path, position: int) -> None:
    """What is added; goes over to the file of the next job when there is one."""
    while True:
        for text in _added(path, position):
            position += len(text)
            sys.stdout.write(text.decode("utf-8", "replace"))
            sys.stdout.flush()
        newest = _newest(folder, pattern)
        if newest is not None and newest != path:
            path, position = newest, 0
            say(f"==> {path} <==")
        time.sleep(FOLLOW_S)


def _added(path: Path, position: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(position)
        while text := stream.read(TAIL_BYTES):
            yield text


def cancel(run: RunFolder) -> None:
    """End the run's jobs, running or queued; what they have got done is kept, nothing goes on."""
    folder = run.resolve()
    require_run(folder)
    scheduler, jobs, given = _live(folder)
    if scheduler is None or not jobs:
        say("no job of this run is queued or running")
        return
    own = {entry.job for entry in given}
    whole = list(dict.fromkeys(_submitted_as(job, own) for job in jobs))
    foreign = [job for job in whole if job not in own]
    for job in whole:
        if job not in foreign:
            record_submission(folder, "cancel", job=job)  # before: nothing may go on from it
    # those that wait for others first, or they would start
    for job in reversed([job for job in whole if job not in foreign]):
        scheduler.cancel(job)
        say(f"job {job} is cancelled; dmi launch resume {run} goes on from what it has got done")
    if foreign:
        raise LaunchError(
            f"job {', '.join(foreign)} was not submitted by dmi launch: it may be more than this run. "
            "Press Ctrl-C in it, or end all of it by the batch system's own command"
        )


def _live(run: Path) -> tuple[Scheduler | None, dict[str, JobState], list[Submission]]:
    found, given = sessions(run), submissions(run)
    name = scheduler_name(found, given)
    if not name:
        return None, {}, given
    scheduler = scheduler_of(name)
    return scheduler, live(scheduler, found, given), given


def _submitted_as(job: str, own: set[str]) -> str:
    """The array's id for a task of one that was submitted as a whole."""
    return job if job in own else job.partition("_")[0]


def resume(
    run: RunFolder,
    time_: Annotated[str | None, typer.Option("--time", "-t", help="of the job")] = None,
    nodes: Annotated[int | None, typer.Option("--nodes", "-N", min=1, help="of the job")] = None,
    account: Annotated[str | None, typer.Option("--account", "-A", help="that pays")] = None,
    queue: Annotated[str | None, typer.Option("--queue", "-p", help="partition or queue")] = None,
    max_jobs: Annotated[int | None, typer.Option(min=1, help="in a chain")] = None,
    max_node_hours: Annotated[float | None, typer.Option(help="of all jobs together")] = None,
) -> None:
    """Submit the run's job once more, as it was or with other limits; it goes on from what is kept.

    A job that waits after a requeue starts as soon as there is room.
    """
    from launch.submit import hand_over

    folder = run.resolve()
    require_run(folder)
    job = described(folder)
    scheduler, jobs, _ = _live(folder)
    if scheduler is not None and jobs:
        _hurry(scheduler, jobs, run)
        return
    given: dict[str, Any] = {
        "time_s": None if time_ is None else parse_time(time_),
        "nodes": nodes,
        "account": account,
        "queue": queue,
        "max_jobs": max_jobs,
        "max_node_hours": max_node_hours,
    }
    changed = {key: value for key, value in given.items() if value is not None}
    where = "dmi launch resume"
    plain = {**job.model_dump(mode="json"), "after": None, **changed}
    hand_over(parse(Job, plain, where=where), why="resume")


def described(run: Path) -> Job:
    """What was submitted last. LaunchError if nothing was."""
    path = run / "launch" / "job.json"
    if not path.exists():
        raise LaunchError(
            f"{run}: no job was submitted for this run (no launch/job.json). On this machine the same "
            "dmi launch STAGE RECIPE goes on; with -N and -t it becomes a job"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{path}: not JSON ({error}); submit again: dmi launch STAGE RECIPE"
        ) from None
    return parse(Job, raw, where=str(path))


def _hurry(scheduler: Scheduler, jobs: dict[str, JobState], run: Path) -> None:
    """Jobs held after a requeue are released; others make a second submission a mistake."""
    held = [job for job, state in jobs.items() if state.reason == "BeginTime"]
    for job in held:
        scheduler.release(job)
        say(f"job {job} starts as soon as there is room")
    if not held:
        text = ", ".join(f"{job} ({state.words.lower()})" for job, state in jobs.items())
        raise LaunchError(
            f"job {text} is still there and goes on by itself; dmi launch cancel {run} ends it"
        )


TOOLS = (status, logs, cancel, resume, history)
