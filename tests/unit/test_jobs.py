"""The description of a job: its limits, and that the command inside the allocation says it again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from launch_jobs import LINE, NASTY, PATHS, SOME, job

from dmi_hpc.errors import LaunchError
from launch.cli import Group, app
from launch.job import Job, clock, describe, launch_arguments, parse_time, within_budget
from launch.machines import load_machine


@pytest.fixture(autouse=True)
def no_machines_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


COMMAND = typer.main.get_command(app)


def read_back(words: tuple[str, ...]) -> dict[str, Any]:
    """What `dmi launch` makes of its arguments: the fields of a job."""
    assert isinstance(COMMAND, Group)
    run = COMMAND.commands["run"]
    values = dict(run.make_context("run", list(words)).params)
    names = {"option": "options", "time": "time_s"}
    fields = {names.get(name, name): value for name, value in values.items()}
    fields |= {"machine": load_machine(fields["machine"]), "time_s": parse_time(fields["time_s"])}
    return {name: value for name, value in fields.items() if name in Job.model_fields}


TEXT = st.none() | LINE
FIELDS = st.fixed_dictionaries(
    {
        "stage": st.sampled_from(["search", "train", "all"]),
        "recipe": PATHS,
        "out": PATHS,
        "nodes": st.integers(1, 9000),
        "time_s": st.integers(60, 10**7),
        "name": TEXT,
        "account": TEXT,
        "queue": TEXT,
        "qos": TEXT,
        "reservation": TEXT,
        "constraint": TEXT,
        "options": st.lists(LINE.map(lambda text: f"--comment={text}"), max_size=3),
        "chain": st.sampled_from(["requeue", "dependency", "off"]),
        "max_jobs": st.integers(1, 99),
        "max_node_hours": st.none() | st.floats(0.01, 1e9),
        "after": TEXT,
        "packed": st.none() | PATHS,
        "dashboard": st.booleans(),
        "extra": st.lists(NASTY, max_size=3),
    }
)


@SOME
@given(FIELDS, st.integers(2, 9), st.integers(1, 99))
def test_the_command_inside_the_allocation_describes_the_same_job(
    values: dict[str, Any], islands: int, ranks: int
) -> None:
    own = {"islands": islands} if values["stage"] == "search" else {"ranks": ranks}
    described = job(**values, **own)
    found = read_back(launch_arguments(described))
    assert describe({**found, "python": described.python}) == described
    assert Job.model_validate_json(described.model_dump_json()) == described


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("2:00", 120),
        ("2:00:00", 7200),
        ("1-0", 86_400),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("1-12:30:15", 131_415),
        (" 90 ", 5400),
        ("01:02:03", 3723),
    ],
)
def test_times_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "2h", "-5", "1:2:3:4", "1-", "1.5", "0", "0:59", "٣٠", "9" * 5000]
)
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(LaunchError, match=f"time {re.escape(repr(text))}"):
        parse_time(text)


@given(st.integers(60, 10**8))
def test_a_clock_is_read_back(seconds: int) -> None:
    assert parse_time(clock(seconds)) == seconds


@pytest.mark.parametrize(
    ("machine", "changed", "message"),
    [
        ("frontier", {"nodes": 10_000}, r"10,000 nodes asked for, .* at most 9,472 \(-N\)"),
        (
            "frontier",
            {"nodes": 8, "time_s": 7201},
            r"batch of frontier .* of 8 nodes at most 02:00:00",
        ),
        ("frontier", {"queue": "extended", "time_s": 90_000}, r"frontier .* at most 24:00:00"),
        ("polaris", {"nodes": 4}, r"prod of polaris takes jobs of 10 or more"),
        ("polaris", {"nodes": 16, "qos": "x"}, r"PBS knows no --qos"),
        ("perlmutter", {"qos": "debug", "chain": "requeue"}, r"forbids chains of jobs in debug"),
        ("local", {}, r"local has no scheduler"),
        ("leonardo", {"packed": Path("/e.tar.gz")}, r"cannot copy a packed environment"),
        ("cpu", {"stage": "train", "islands": 2}, r"islands belong to a search"),
        ("cpu", {"islands": 1}, r"1 island has no other"),
        ("cpu", {"ranks": 4}, r"ranks \(-n\) belong to a training"),
        ("cpu", {"time_s": 30}, r"^--time: .* equal to 60; found 30"),
        ("cpu", {"nodes": 0}, r"^--nodes: .* equal to 1; found 0"),
        ("cpu", {"stage": "tune"}, r"^stage: Input should be 'data', "),
    ],
)
def test_a_job_that_its_machine_cannot_run_is_refused(
    machine: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(LaunchError, match=message):
        job(machine=load_machine(machine), **changed)


def test_limits_are_those_of_the_queue() -> None:
    frontier = load_machine("frontier")
    assert job(machine=frontier, nodes=92, time_s=21_600).time_s == 21_600
    assert job(machine=frontier, queue="extended", time_s=86_400).time_s == 86_400


def test_chains_are_the_machines_but_not_where_they_are_forbidden() -> None:
    assert job().chain == "requeue"
    assert job(chain="off").chain == "off"
    assert job(machine=load_machine("perlmutter"), qos="debug").chain == "off"


def test_a_job_is_shortened_to_its_node_hours() -> None:
    described = job(max_node_hours=4.0)
    shorter, said = within_budget(described)
    assert (shorter.time_s, described.time_s) == (3600, 7200)
    assert said.startswith("01:00:00 instead of 02:00:00: no more than 4 of 4 node-hours")
    assert within_budget(shorter) == (shorter, "")
    assert within_budget(described, 3.0)[0].time_s == 900
    assert within_budget(job(max_node_hours=4.0, islands=2))[0].time_s == 1800
    assert within_budget(job()) == (job(), "")
    with pytest.raises(LaunchError, match=r"0\.05 of 4 node-hours are left: less than a minute"):
        within_budget(described, 3.95)
