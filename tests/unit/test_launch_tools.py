"""What `dmi launch status | logs | cancel | resume | history` say and do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dmi_hpc.errors import LaunchError
from dmi_hpc.sessions import cancelled, sessions, submissions
from launch.cli import app
from launch.looking import history_lines, look, open_jobs, status_lines
from launch.machines import load_machine
from launch.scheduler import JobState, Phase, Unreachable


@dataclass
class FakeScheduler:
    """A batch system that knows the jobs it is given, and keeps what it is told."""

    jobs: dict[str, JobState] = field(default_factory=dict)
    told: list[tuple[str, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    silent: bool = False

    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        if self.silent:
            raise Unreachable("squeue: Socket timed out")
        self.asked = list(jobs)
        return {
            name: state
            for name, state in self.jobs.items()
            if name in jobs or name.partition("_")[0] in jobs
        }

    def cancel(self, job: str) -> None:
        self.told.append(("cancel", job))

    def release(self, job: str) -> None:
        self.told.append(("release", job))


def state(job: str, phase: Phase = "running", reason: str = "") -> JobState:
    return JobState(job, phase, {"queued": "PENDING"}.get(phase, "RUNNING"), reason, None, 2)


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> FakeScheduler:
    fake = FakeScheduler()
    monkeypatch.setattr("launch.tools.scheduler_of", lambda name: fake)
    monkeypatch.setattr("launch.looking.scheduler_of", lambda name, patience: fake)
    return fake


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "launch" / "jobs").mkdir(parents=True)
    return tmp_path


def write(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)


def submit(run: Path, job: str, ago: float = 1000.0, **values: Any) -> None:
    record = {"event": "submitted", "time": time.time() - ago, "job": job, "scheduler": "slurm"}
    write(run / "launch" / "submissions.jsonl", {**record, "why": "user", **values})


def session(
    run: Path,
    job: str,
    *,
    ago: float = 900.0,
    how: str | None = None,
    silent: bool = False,
    **end: Any,
) -> None:
    """how: None: it has not ended; silent: and nothing has been heard of it since."""
    path, began = run / "launch" / "jobs" / f"{job}.jsonl", time.time() - ago
    start = {"job": job, "nodes": ["n1", "n2"], "scheduler": "slurm", "machine": "cpu"}
    write(path, {"event": "started", "time": began, "ends": began + 7200, **start})
    write(path, {"event": "stage", "time": began + 1, "stage": "search", "state": "began"})
    if how is not None:
        code = {"event": "ended", "time": began + 60, "how": how, "code": 0, "node_s": 120.0}
        write(path, {**code, "next": "none", **end})
    alive = path.with_suffix(".alive")
    alive.touch()
    moment = began + 60 if silent or how is not None else time.time()
    os.utime(alive, (moment, moment))


def command(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, LaunchError):
        return 2, str(result.exception)
    return result.exit_code, result.output


def told(run: Path) -> str:
    return "\n".join(status_lines(look(run), time.time()))


def test_status_of_a_running_job(run: Path, scheduler: FakeScheduler) -> None:
    submit(run, "7")
    session(run, "7")
    scheduler.jobs = {"7": state("7")}
    text = told(run)
    assert "job 7     running on 2 nodes of cpu for 15 min" in text
    assert ", search" in text
    assert "0.500 node-hours in 1 session" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_dead_session_is_not_shown_as_running(run: Path, scheduler: FakeScheduler) -> None:
    submit(run, "7")
    session(run, "7", silent=True)
    text = told(run)
    assert "killed, last alive at" in text
    assert "running" not in text


def test_a_session_whose_job_the_scheduler_has_no_more_is_gone(
    run: Path, scheduler: FakeScheduler
) -> None:
    submit(run, "7")
    session(run, "7")
    text = told(run)
    assert "job 7     gone, last alive at" in text
    assert "running" not in text


def test_a_waiting_job_says_why(run: Path, scheduler: FakeScheduler) -> None:
    submit(run, "7")
    scheduler.jobs = {"7": state("7", "queued", "Resources")}
    assert "job 7     queued (Resources), 2 nodes" in told(run)


def test_a_requeued_job_waits_and_has_a_session_behind_it(
    run: Path, scheduler: FakeScheduler
) -> None:
    submit(run, "7")
    session(run, "7", how="interrupted", next="requeue")
    scheduler.jobs = {"7": state("7", "queued", "BeginTime")}
    assert "job 7     queued (BeginTime)" in told(run)


def test_without_the_scheduler_the_files_speak(run: Path, scheduler: FakeScheduler) -> None:
    submit(run, "7")
    session(run, "7")
    scheduler.silent = True
    text = told(run)
    assert "job 7     running" in text
    assert "the scheduler was not asked: squeue: Socket timed out" in text


def test_a_run_without_jobs(run: Path, scheduler: FakeScheduler) -> None:
    write(run / "search" / "journal.jsonl", {"event": "header", "time": 1.0})
    text = told(run)
    assert "none in a batch system" in text
    assert "search    0 evaluations" in text
    assert history_lines(run) == [f"{run}: no job of a batch system has run here"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, scheduler: FakeScheduler) -> None:
    for name in ("status", "history", "logs", "cancel", "resume"):
        code, text = command(name, str(tmp_path))
        assert (code, "no run here" in text) == (2, True), name


def test_status_as_json(run: Path, scheduler: FakeScheduler) -> None:
    submit(run, "7")
    session(run, "7", how="finished")
    code, text = command("status", str(run), "--json")
    found = json.loads(text)
    assert code == 0
    assert [s["how"] for s in found["sessions"]] == ["finished"]


def test_only_jobs_that_may_not_be_over_are_asked_for(run: Path) -> None:
    for job in ("1", "2", "3", "4"):
        submit(run, job)
    submit(run, "5", islands=2)
    session(run, "1", how="finished")
    session(run, "2", how="interrupted", next="requeue")
    session(run, "3", silent=True)  # Slurm may have put it back into the queue
    session(run, "5_0", how="finished")
    session(run, "6")  # by a script of the user's own
    asked = open_jobs(sessions(run), submissions(run))
    assert asked == ["2", "3", "4", "5", "6"]
    session(run, "5_1", how="failed")
    assert "5" not in open_jobs(sessions(run), submissions(run))


def test_cancel_says_so_on_disk_before_it_ends_the_jobs(
    run: Path, scheduler: FakeScheduler
) -> None:
    submit(run, "7")
    session(run, "7")
    chained = {"event": "submitted", "time": time.time(), "job": "8", "after": "7", "why": "chain"}
    write(run / "launch" / "jobs" / "7.jsonl", {**chained, "scheduler": "slurm"})
    scheduler.jobs = {"7": state("7"), "8": state("8", "queued", "Dependency")}
    code, text = command("cancel", str(run))
    assert (code, cancelled(run, "7"), cancelled(run, "8")) == (0, True, True)
    assert scheduler.told == [("cancel", "8"), ("cancel", "7")]
    assert "dmi launch resume" in text


def test_an_array_is_cancelled_as_a_whole(run: Path, scheduler: FakeScheduler) -> None:
    submit(run, "7", islands=2)
    scheduler.jobs = {"7_0": state("7_0"), "7_1": state("7_1")}
    command("cancel", str(run))
    assert scheduler.told == [("cancel", "7")]
    assert cancelled(run, "7_1")


def test_a_job_of_the_users_own_is_not_ended(run: Path, scheduler: FakeScheduler) -> None:
    session(run, "9")
    scheduler.jobs = {"9": state("9")}
    code, text = command("cancel", str(run))
    assert (code, scheduler.told) == (2, [])
    assert "not submitted by dmi launch" in text


def test_nothing_to_cancel(run: Path, scheduler: FakeScheduler) -> None:
    submit(run, "7")
    session(run, "7", how="finished")
    assert command("cancel", str(run)) == (0, "no job of this run is queued or running\n")


def description(run: Path) -> None:
    machine = load_machine("cpu").model_dump(mode="json")
    asked = {
        "stage": "search",
        "recipe": "/r.toml",
        "python": "/python",
        "time_s": 3600,
        "nodes": 2,
    }
    record = {**asked, "out": str(run), "after": "6", "machine": machine}
    (run / "launch" / "job.json").write_text(json.dumps(record))


def test_resume_submits_the_same_job_with_other_limits(
    run: Path, scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    description(run)
    submit(run, "7")
    session(run, "7", how="budget")
    given: list[Any] = []
    monkeypatch.setattr("launch.submit.hand_over", lambda job, why: given.append((job, why)))
    code, _ = command("resume", str(run), "-t", "30", "-N", "3", "--max-node-hours", "50")
    job, why = given[0]
    assert (code, why, job.time_s, job.nodes, job.max_node_hours) == (0, "resume", 1800, 3, 50)
    assert (job.after, job.stage, job.out) == (None, "search", run)


def test_resume_releases_a_job_that_is_held_after_a_requeue(
    run: Path, scheduler: FakeScheduler
) -> None:
    description(run)
    submit(run, "7")
    scheduler.jobs = {"7": state("7", "queued", "BeginTime")}
    assert command("resume", str(run))[0] == 0
    assert scheduler.told == [("release", "7")]


def test_resume_refuses_a_second_job(run: Path, scheduler: FakeScheduler) -> None:
    description(run)
    submit(run, "7")
    scheduler.jobs = {"7": state("7")}
    code, text = command("resume", str(run))
    assert (code, "job 7 (running) is still there" in text) == (2, True)


def test_resume_without_a_submitted_job(run: Path, scheduler: FakeScheduler) -> None:
    code, text = command("resume", str(run))
    assert (code, "no launch/job.json" in text) == (2, True)


def test_history_is_a_table_of_eighty_columns(run: Path) -> None:
    session(run, "1234567", ago=9000, how="interrupted", next="1234568")
    session(run, "1234568", ago=900, how="finished")
    lines = history_lines(run)
    assert max(map(len, lines)) <= 80
    assert lines[2].split()[:4] == ["2", "1234568", "1", "2"]
    assert "used    0.0667 node-hours" in lines


def log(run: Path, name: str, text: str, age: float = 0.0) -> None:
    path = run / "logs" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - age,) * 2)


def test_logs_show_the_end_of_the_latest_job(run: Path) -> None:
    log(run, "job-7.out", "old\n", age=100)
    log(run, "job-8.out", "one\ntwo\nthree\n")
    log(run, "rank-1.log", "of rank 1\n")
    assert command("logs", str(run), "--lines", "2")[1].splitlines()[1:] == ["two", "three"]
    assert command("logs", str(run), "--job", "7")[1].splitlines()[1:] == ["old"]
    assert command("logs", str(run), "--rank", "1")[1].splitlines()[1:] == ["of rank 1"]


def test_a_log_that_is_not_there_says_what_is(run: Path) -> None:
    log(run, "rank-1.log", "x")
    code, text = command("logs", str(run))
    assert (code, "found rank-1.log" in text) == (2, True)
    code, text = command("logs", str(run), "--job", "../../secret")
    assert (code, "id of a job" in text) == (2, True)


def test_following_goes_over_to_the_next_job(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log(run, "job-7.out", "one\n", age=10)
    steps = iter(
        [
            ("job-7.out", "one\ntwo\n", 10.0),
            ("job-8.out", "three\n", 0.0),
            ("job-8.out", "three\n", 0.0),
            None,
        ]
    )

    def pause(seconds: float) -> None:
        step = next(steps)
        if step is None:
            raise KeyboardInterrupt
        log(run, *step)

    monkeypatch.setattr("time.sleep", pause)
    code, text = command("logs", str(run), "--follow")
    shown = [line for line in text.splitlines() if not line.startswith("==>")]
    assert (code, shown) == (0, ["one", "two", "three"])
