"""A session from its start to its end, with a batch system that does what the test wants."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dmi_hpc.config import Recipe
from dmi_hpc.errors import LaunchError
from dmi_hpc.files import read_json_lines
from dmi_hpc.sessions import sessions
from dmi_hpc.watch import stop_on_signals
from launch import conductor as module
from launch.allocation import Allocation
from launch.cluster import Part
from launch.conductor import Conductor
from launch.job import describe
from launch.machines import load_machine
from launch.parts import Parts
from launch.records import record_submission
from launch.scheduler import Details, JobState

RECIPE = Recipe.model_validate({"name": "a", "task": {"name": "toy_task:Toy"}})
ALLOCATION = Allocation("slurm", "7", ("node1", "node2"), cpus=2, gpus=0, end=None)


class Fake:
    """Slurm as the session calls it. refuses: names of calls that fail."""

    name = "slurm"

    def __init__(self, *refuses: str, **said: bool) -> None:
        self.refuses, self.calls = refuses, []
        self.said = Details("7", "running", "RUNNING", **said)

    def _called(self, name: str, *values: object) -> None:
        self.calls.append((name, *values))
        if name in self.refuses:
            raise LaunchError(f"{name}: not allowed here")

    def submit(self, script, *, cwd, after=None, array=None):
        self._called("submit", after, array)
        return "8"

    def states(self, jobs):
        return {job: JobState(job, "queued", "PENDING") for job in jobs}

    def details(self, job):
        return self.said

    def cancel(self, job):
        self._called("cancel", job)

    def requeue(self, job):
        self._called("requeue", job)


@pytest.fixture
def session(tmp_path, monkeypatch):
    """session(code, scheduler, ...): (exit code, what the records say), stages running `code`."""

    def run(code, scheduler=None, allocation=ALLOCATION, **changes):
        scheduler = scheduler or Fake()
        monkeypatch.setattr(module, "scheduler_of", lambda name, patience: scheduler)
        command = (sys.executable, "-c", f"import os, signal, sys, time\n{code}")
        part = Part("the stage", command, os.environ)
        monkeypatch.setattr(Parts, "of", lambda self, stage: [part])
        values = {
            "stage": "train",
            "recipe": Path("/r.toml"),
            "out": tmp_path,
            "machine": load_machine("cpu"),
            "python": Path(sys.executable),
            "nodes": 2,
            "time_s": 3600,
            "chain": "requeue",
        }
        before = signal.getsignal(signal.SIGUSR1)
        with stop_on_signals() as stop:
            job = describe({**values, **changes})
            ended = Conductor(job, RECIPE, allocation, scheduler, stop).run()
        signal.signal(signal.SIGUSR1, before)
        return ended, sessions(tmp_path)[-1]

    return run


def test_a_finished_session_is_followed_by_nothing(session):
    scheduler = Fake()
    code, found = session("print()", scheduler)
    assert (code, found.how, found.next, found.stages) == (0, "finished", "none", ("train",))
    assert [(run.stage, run.code) for run in found.runs] == [("train", 0)]
    assert scheduler.calls == []


def test_the_successor_of_a_finished_job_does_nothing_but_another_job_does_all(session):
    session("sys.exit(75)", Fake(), chain="dependency")
    session("print()", Fake("submit"), allocation=replace(ALLOCATION, job="9"))
    code, found = session("sys.exit(2)", Fake(), allocation=replace(ALLOCATION, job="8"))
    assert (code, found.how, found.runs) == (0, "finished", ())
    assert session("sys.exit(2)", Fake(), allocation=replace(ALLOCATION, job="10"))[0] == 2


def test_a_stage_that_fails_ends_the_chain_and_takes_its_successor_back(session):
    scheduler = Fake()
    code, found = session("sys.exit(2)", scheduler, chain="dependency")
    assert (code, found.how, found.next) == (2, "failed", "none")
    assert "the stage ended with exit code 2" in found.why
    assert scheduler.calls == [("submit", "7", None), ("cancel", "8")]


@pytest.mark.parametrize("stage", ["sys.exit(75)", "sys.exit(69)", "os.kill(os.getpid(), 9)"])
def test_what_is_interrupted_or_lost_is_requeued(session, stage):
    scheduler = Fake()
    code, found = session(stage, scheduler)
    assert (code, found.how, found.next) == (75, "interrupted", "requeue")
    assert scheduler.calls == [("requeue", "7")]


def test_where_requeueing_is_forbidden_a_job_goes_on_instead(session, capsys):
    scheduler = Fake("requeue")
    session("sys.exit(75)", scheduler)
    assert scheduler.calls == [("requeue", "7"), ("submit", "7", None)]
    assert "job 8 goes on instead" in capsys.readouterr().err


def test_where_no_successor_can_be_submitted_the_allocation_is_used_all_the_same(session, capsys):
    scheduler = Fake("submit")
    code, found = session("sys.exit(75)", scheduler, chain="dependency")
    assert (code, found.next) == (75, "requeue")
    assert scheduler.calls == [("submit", "7", None), ("requeue", "7")]
    assert "not allowed here" in capsys.readouterr().err


def test_a_requeued_session_finds_the_successor_of_the_one_before(session, tmp_path):
    scheduler = Fake(requeued=True)
    code, found = session("sys.exit(75)", scheduler, chain="dependency")
    assert (code, found.next) == (75, "requeue")
    again = Fake()
    session("print()", again, chain="dependency", allocation=replace(ALLOCATION, restart=1))
    assert ("submit", "7", None) not in again.calls


def test_a_cancelled_job_is_not_continued(session, tmp_path):
    scheduler = Fake(cancelled=True)
    code, found = session("sys.exit(75)", scheduler)
    assert (code, found.how, found.next) == (75, "cancelled", "none")
    record_submission(tmp_path, "cancel", job="9")
    code, found = session("print()", Fake(), allocation=replace(ALLOCATION, job="9"))
    assert (found.how, found.runs) == ("cancelled", ())


def test_a_stage_that_knows_nothing_of_time_is_stopped(session, monkeypatch):
    monkeypatch.setattr(module, "FLOOR_S", 3.0)
    end = replace(ALLOCATION, end=time.time() + module.KEEP_S + 4)
    code, found = session("time.sleep(60)", allocation=end)
    assert (code, found.how, found.stop) == (75, "interrupted", "the time is over")


def test_a_session_without_time_begins_nothing(session):
    code, found = session("print()", allocation=replace(ALLOCATION, end=time.time() + 3))
    assert (code, found.runs) == (75, ())
    assert "no time is left" in found.why


def test_the_warning_before_the_end_is_heeded_only_if_it_comes_early(session):
    code = "os.kill(os.getppid(), signal.SIGUSR1); time.sleep(1)"
    assert session(code, allocation=replace(ALLOCATION, end=time.time() + 100))[0] == 0
    signalled, found = session(code + "; time.sleep(60)", allocation=replace(ALLOCATION, job="9"))
    assert (signalled, found.how) == (75, "stuck")  # the second that finished nothing
    assert "SIGUSR1" in found.stop


def test_preemption_stops_the_stages(session, monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.2)
    code, found = session("time.sleep(60)", Fake(preempted=True))
    assert (code, found.how) == (75, "interrupted")
    assert "takes the nodes back" in found.stop


def test_node_hours_shorten_a_session(session, tmp_path):
    code, found = session("print()", max_node_hours=0.002)
    assert code == 75
    assert found.runs == ()
    limited = session("print()", max_node_hours=1.0, allocation=replace(ALLOCATION, job="9"))[1]
    assert limited.ends == pytest.approx(limited.began + 1800, abs=5)


def test_the_records_are_for_their_user_alone(session, tmp_path):
    session("print()")
    folder = tmp_path / "launch" / "jobs"
    assert folder.stat().st_mode & 0o077 == 0
    assert next(e["event"] for e in read_json_lines(folder / "7.jsonl")) == "started"
