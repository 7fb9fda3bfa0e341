"""What sessions write of themselves, and what is made of it."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from dmi_hpc.errors import RunError
from dmi_hpc.report.launching import read_allocations
from dmi_hpc.sessions import DEAD_S, cancelled, node_hours, sessions, submissions
from launch.records import Recorder, progress_of, record_submission

T0 = 1_800_000_000.0


def lines(path: Path, *records: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.writelines(json.dumps(record, separators=(",", ":")) + "\n" for record in records)


def job(run: Path, name: str, *records: dict[str, Any], alive: float | None = None) -> None:
    lines(run / "launch" / "jobs" / f"{name}.jsonl", *records)
    if alive is not None:
        path = run / "launch" / "jobs" / f"{name}.alive"
        path.touch()
        os.utime(path, (alive, alive))


def started(name: str, at: float, **values: Any) -> dict[str, Any]:
    known = {
        "event": "started",
        "time": at,
        "job": name,
        "nodes": ["n1", "n2"],
        "scheduler": "slurm",
    }
    return {**known, "machine": "cpu", "stages": ["search"], **values}


def ended(at: float, how: str, **values: Any) -> dict[str, Any]:
    return {"event": "ended", "time": at, "how": how, "code": 75, "node_s": 0.0, **values}


def test_a_session_is_written_and_read_back(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, "7")
    with recorder.alive():
        recorder.event(
            "started", job="7", nodes=["n1"], restart=0, scheduler="slurm", machine="cpu"
        )
        recorder.event("stage", stage="search", state="began")
        recorder.event("stage", stage="search", state="ended", code=0, seconds=1.5)
        running = sessions(tmp_path)[0]
        recorder.event("ended", how="finished", code=0, node_s=2.0, next="none", why="")
    assert running.running
    session = sessions(tmp_path)[0]
    assert (session.how, session.code, session.node_s, session.running) == (
        "finished",
        0,
        2.0,
        False,
    )
    assert session.runs[0].seconds == 1.5


def test_the_files_are_their_owners_alone(tmp_path: Path) -> None:
    with Recorder(tmp_path, "7").alive():
        folder = tmp_path / "launch"
        assert [stat.S_IMODE(f.stat().st_mode) for f in (folder, folder / "jobs")] == [0o700, 0o700]


def test_a_killed_session_ends_when_it_was_last_alive(tmp_path: Path) -> None:
    job(tmp_path, "7", started("7", T0), alive=T0 + 100)
    still = sessions(tmp_path, now=T0 + 100 + DEAD_S - 1)[0]
    assert (still.running, still.how, still.node_s) == (True, "", 2 * (100 + DEAD_S - 1))
    dead = sessions(tmp_path, now=T0 + 100 + DEAD_S + 1)[0]
    assert (dead.running, dead.how, dead.ended, dead.node_s) == (False, "killed", T0 + 100, 200.0)
    assert node_hours(tmp_path, now=T0 + 1000) == pytest.approx(200 / 3600)


def test_a_requeued_job_has_several_sessions(tmp_path: Path) -> None:
    job(
        tmp_path,
        "7",
        started("7", T0),
        {"event": "stage", "stage": "search", "state": "began", "time": T0 + 5},
        started("7", T0 + 500, restart=1, before=T0 + 60),
        ended(T0 + 560, "interrupted", node_s=120.0, next="requeue", moved=True),
        started("7", T0 + 700, restart=2),
        alive=T0 + 710,
    )
    first, second, third = sessions(tmp_path, now=T0 + 720)
    assert (first.how, first.ended) == ("killed", T0 + 60)  # not when the third was alive
    assert (second.how, second.moved, second.waited_s) == ("interrupted", True, 440.0)
    assert third.running
    assert [s.continues for s in (first, second, third)] == ["", "7", "7"]
    assert third.waited_s == 140.0


def test_a_recorder_keeps_the_end_of_the_session_before_it(tmp_path: Path) -> None:
    before = time.time() - 1000
    job(tmp_path, "7", started("7", before), alive=before + 60)
    recorder = Recorder(tmp_path, "7")
    with recorder.alive():
        recorder.event("started", job="7", nodes=["n1"], restart=1)
    assert sessions(tmp_path)[0].ended == pytest.approx(before + 60)


def test_islands_go_on_each_from_its_own(tmp_path: Path) -> None:
    job(tmp_path, "7_0", started("7_0", T0, island="0"), ended(T0 + 9, "interrupted", next="8"))
    job(tmp_path, "7_1", started("7_1", T0 + 1, island="1"), ended(T0 + 9, "finished"))
    job(tmp_path, "8", started("8", T0 + 20, island="0"), ended(T0 + 30, "finished"))
    assert [(s.job, s.continues) for s in sessions(tmp_path)] == [
        ("7_0", ""),
        ("7_1", ""),
        ("8", "7_0"),
    ]


def test_time_in_the_queue_begins_when_the_job_before_ends(tmp_path: Path) -> None:
    record_submission(tmp_path, "submitted", job="7")
    at = submissions(tmp_path)[0].time
    chained = {"event": "submitted", "time": at + 11, "job": "8", "after": "7", "why": "chain"}
    job(tmp_path, "7", started("7", at + 10), chained, ended(at + 20, "interrupted", next="8"))
    job(tmp_path, "8", started("8", at + 25), ended(at + 30, "finished"))
    assert [s.waited_s for s in sessions(tmp_path)] == pytest.approx([10, 5])


def test_a_cancelled_array_cancels_its_tasks(tmp_path: Path) -> None:
    record_submission(tmp_path, "cancel", job="7")
    assert cancelled(tmp_path, "7")
    assert cancelled(tmp_path, "7_3")
    assert not cancelled(tmp_path, "70")


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    job(tmp_path, "7", {"event": "started", "time": T0, "job": "7", "nodes": "n1"})
    with pytest.raises(RunError, match=r"7\.jsonl: nodes"):
        sessions(tmp_path)


def test_no_jobs_at_all(tmp_path: Path) -> None:
    assert sessions(tmp_path) == []
    assert node_hours(tmp_path) == 0
    assert read_allocations(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("search/journal.jsonl", '{"event":"tell","id":0}\n'),
        ("search/islands/0/journal.jsonl", '{"event":"tell","id":0}\n'),
        ("search/trials/3/checkpoints/step-00000004/checkpoint.json", "{}"),
        ("train/checkpoints/step-00000010/checkpoint.json", "{}"),
        ("data/shard-00003.h5", "x"),
        ("evaluation.json", "{}"),
    ],
)
def test_whatever_is_finished_is_progress(tmp_path: Path, name: str, content: str) -> None:
    before = progress_of(tmp_path)
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    assert progress_of(tmp_path) != before
    assert progress_of(tmp_path) == progress_of(tmp_path)


def test_asking_and_half_written_checkpoints_are_no_progress(tmp_path: Path) -> None:
    before = progress_of(tmp_path)
    lines(tmp_path / "search" / "journal.jsonl", {"event": "ask", "id": 0})
    (tmp_path / "train" / "checkpoints" / ".tmp-step-00000010-1-12345678").mkdir(parents=True)
    assert progress_of(tmp_path) == before


def test_an_island_is_judged_by_itself(tmp_path: Path) -> None:
    before = progress_of(tmp_path, "a")
    lines(tmp_path / "search" / "islands" / "b" / "journal.jsonl", {"event": "tell", "id": 0})
    assert progress_of(tmp_path, "a") == before


def test_what_an_allocation_was_used_for(tmp_path: Path) -> None:
    """Two workers for 100 s: two evaluations of 60 s, and one that was killed after 40 s."""
    job(tmp_path, "7", started("7", T0), alive=T0 + 100)
    lines(
        tmp_path / "search" / "journal.jsonl",
        {"event": "header", "time": T0 + 10, "config": {"workers": 2}},
        *({"event": "ask", "id": i, "time": T0 + 10} for i in (0, 1)),
        *({"event": "tell", "id": i, "time": T0 + 70, "seconds": 60} for i in (0, 1)),
        {"event": "ask", "id": 2, "time": T0 + 60},
        {"event": "tell", "id": 2, "time": T0 + 400, "seconds": 60},
    )
    found = read_allocations(tmp_path, now=T0 + 1000)
    assert found is not None
    stay = found.stays[0]
    assert (stay.evaluations, stay.useful_s, stay.lost_s, stay.first_s) == (2, 60.0, 20.0, 10.0)
    assert found.used_h == pytest.approx(200 / 3600)
    assert found.share == pytest.approx(0.6)


def test_epochs_that_were_trained_twice_count_once(tmp_path: Path) -> None:
    job(tmp_path, "7", started("7", T0), ended(T0 + 100, "interrupted", node_s=200.0))
    job(tmp_path, "8", started("8", T0 + 200), ended(T0 + 300, "finished", node_s=200.0))
    metrics = tmp_path / "train" / "metrics.jsonl"
    for at, epoch in ((T0 + 40, 0), (T0 + 80, 1), (T0 + 240, 1), (T0 + 280, 2)):
        lines(metrics, {"kind": "step", "epoch": epoch, "step": 1, "time": at})
        lines(metrics, {"kind": "epoch", "epoch": epoch, "step": 1, "seconds": 30.0})
    found = read_allocations(tmp_path)
    assert found is not None
    assert [(s.epochs, s.useful_s, s.lost_s) for s in found.stays] == [
        (1, 30.0, 30.0),
        (2, 60.0, 0.0),
    ]
