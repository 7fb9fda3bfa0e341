"""A job is handed to the batch system: its script is made, kept in the run folder, submitted."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmi_hpc.errors import LaunchError
from dmi_hpc.files import write_json, write_text, writing
from dmi_hpc.sessions import node_hours
from dmi_hpc.watch import say
from launch.job import Job, describe, parse_time, within_budget
from launch.machines import Machine, detect_machine, load_machine
from launch.records import record_submission
from launch.scheduler import scheduler_of
from launch.script import script

SCRIPT, DESCRIPTION = "job.sh", "job.json"  # in RUN/launch


def submission(job: Job, number: str, *, after: str | None, why: str) -> dict[str, Any]:
    """What is recorded of it (dmi_hpc.sessions.Submission)."""
    return {
        "job": number,
        "scheduler": job.machine.scheduler,
        "machine": job.machine.name,
        "nodes": job.nodes,
        "time_s": job.time_s,
        "islands": job.islands,
        "after": after,
        "why": why,
    }


def submitted(values: Mapping[str, Any], *, dry_run: bool) -> None:
    """Submit the job that the command line describes, or print its script."""
    machine = machine_for(values["machine"])
    if values["time"] is None:
        raise LaunchError("--time is missing: a job needs one, e.g. -t 2:00:00")
    job = describe(
        {
            **{key: value for key, value in values.items() if key != "time"},
            "machine": machine,
            "python": Path(sys.executable),
            "time_s": parse_time(values["time"]),
        }
    )
    if dry_run:
        job, shorter = within_budget(job, node_hours(job.out))
        _say_aside(shorter)
        say(script(job).rstrip("\n"))
        return
    hand_over(job, why="user")


def machine_for(name: str | None) -> Machine:
    """The machine asked for, or the one that this host belongs to, which is said. LaunchError if it
    is not known."""
    if name is not None:
        return load_machine(name)
    found = detect_machine(os.environ, socket.gethostname())
    if found is None:
        raise LaunchError(
            f"no machine is named, and {socket.gethostname()} is none that is known: -m gpu or -m cpu "
            "for any cluster with Slurm; dmi launch machines lists all, docs/machines.md adds yours"
        )
    machine, reason = found
    sys.stderr.write(f"machine {machine.name}: {reason}\n")
    return machine


def hand_over(job: Job, *, why: str) -> str:
    """Write script and description of `job`, submit it, record and say that; returns its id."""
    scheduler = scheduler_of(job.machine.scheduler)
    job, shorter = within_budget(job, node_hours(job.out))
    text = script(job)
    folder = job.out / "launch"
    with writing(job.out):
        job.out.mkdir(parents=True, exist_ok=True, mode=0o700)
        for each in (folder, job.out / "logs"):
            each.mkdir(exist_ok=True, mode=0o700)
        write_text(folder / SCRIPT, text)
        write_json(folder / DESCRIPTION, job.model_dump(mode="json"))
    number = scheduler.submit(folder / SCRIPT, after=job.after, cwd=job.out)
    record_submission(job.out, "submitted", **submission(job, number, after=job.after, why=why))
    _say_aside(shorter)
    say(f"job {number} on {job.nodes} nodes of {job.machine.name}, run folder {job.out}")
    goes_on = {
        "off": "it does not go on by itself when its time is over (--chain)",
        "requeue": f"when its time is over it is requeued, for at most {job.max_jobs} jobs in all",
        "dependency": f"a job after it goes on, at most {job.max_jobs} in all",
    }
    _say_aside(
        f"{goes_on[job.chain]}; to look at it: dmi launch status {shlex.quote(str(job.out))}"
    )
    return number


def _say_aside(text: str) -> None:
    if text:
        sys.stderr.write(f"{text}\n")
