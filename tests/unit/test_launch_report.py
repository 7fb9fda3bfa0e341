"""The section about allocations in the report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dmi_hpc.errors import RunError
from dmi_hpc.report import write_report

T0 = 1_700_000_000.0


def run_folder(run: Path) -> None:
    (run / "launch" / "jobs").mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"name": "one", "task": "toy", "recipe": {}}))


def job(run: Path, name: str, *events: dict[str, Any]) -> None:
    path = run / "launch" / "jobs" / f"{name}.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


def started(name: str, at: float) -> dict[str, Any]:
    return {"event": "started", "time": at, "job": name, "nodes": ["n1", "n2"], "machine": "cpu"}


def stage(at: float, state: str, **values: Any) -> dict[str, Any]:
    return {"event": "stage", "stage": "search", "time": at, "state": state, **values}


def chained(run: Path) -> None:
    """100 s, then 50 s on two nodes, two workers: three evaluations of 50 s, one of them begun anew."""
    run_folder(run)
    end = {"event": "ended", "code": 75, "next": "8", "why": "<b>time</b>"}
    job(
        run,
        "7",
        started("7", T0),
        stage(T0 + 1, "began"),
        stage(T0 + 99, "ended", code=75, seconds=98.0),
        {**end, "time": T0 + 100, "how": "interrupted", "node_s": 200.0},
    )
    last = {"event": "ended", "time": T0 + 350, "how": "finished", "node_s": 100.0}
    job(run, "8", started("8", T0 + 300), stage(T0 + 301, "began"), last)
    asked = [T0 + 10, T0 + 10, T0 + 60]
    told = [T0 + 60, T0 + 60, T0 + 350]
    events = [{"event": "header", "time": T0, "config": {"workers": 2}}]
    events += [{"event": "ask", "id": i, "time": at} for i, at in enumerate(asked)]
    for i, at in enumerate(told):
        events.append(
            {"event": "tell", "id": i, "time": at, "seconds": 50, "status": "ok", "fitness": 1.0}
        )
    folder = run / "search"
    folder.mkdir()
    text = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "journal.jsonl").write_text(text)


def test_sessions_and_what_they_were_used_for(tmp_path: Path) -> None:
    chained(tmp_path)
    page = write_report(tmp_path).read_text("utf-8")
    assert '<a href="#allocation">Allocation</a>' in page
    section = page[page.index('<section id="allocation">') :].partition("</section>")[0]
    assert "2 sessions of 2 jobs on cpu used 0.0833 node-hours, 50 % of them" in section
    assert "0.0111 went into work that was begun again" in section  # 40 s of one of two workers
    cells = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<t[dh].*?</t[dh]>", section)]
    assert cells[9:13] == ["7", "–", "2", "2023-11-14 22:13"]
    assert "2 evaluations" in cells and "1 evaluation" in cells
    assert "&lt;b&gt;time&lt;/b&gt;" in section
    assert "<svg" in section


def test_a_run_without_jobs_has_no_such_section(tmp_path: Path) -> None:
    run_folder(tmp_path)
    assert "allocation" not in write_report(tmp_path).read_text("utf-8")


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    run_folder(tmp_path)
    job(tmp_path, "7", {**started("7", T0), "nodes": 2})
    with pytest.raises(RunError, match=r"7\.jsonl: nodes"):
        write_report(tmp_path)
