"""What a batch system has given to this job: nodes, cores, GPUs, time. Read from the environment.

Pure: what only the scheduler's commands can tell comes in as arguments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dmi_hpc import knobs
from dmi_hpc.errors import LaunchError
from dmi_hpc.world import in_slurm_step

SchedulerName = Literal["slurm", "pbs", "none"]


@dataclass(frozen=True)
class Allocation:
    """nodes: host names, the one of the batch script first; cpus, gpus: of each node (the least);
    job: its id, ID_TASK of an array's; restart: how often it was requeued; end: epoch seconds."""

    scheduler: SchedulerName
    job: str
    nodes: tuple[str, ...]
    cpus: int
    gpus: int
    restart: int = 0
    end: float | None = None
    task: str = ""  # of a job array


def scheduler_around(env: Mapping[str, str]) -> SchedulerName | None:
    """Whose allocation this process is in, as its batch script or shell; None in none, in a step of
    one (unless DMI_LAUNCH=allocation), and where DMI_LAUNCH=local asks to take no notice."""
    place = env.get(knobs.PLACE)
    if place == "local" or env.get(knobs.WORLD) == "single":
        return None
    if env.get("SLURM_JOB_ID") and (place == "allocation" or not in_slurm_step(env)):
        return "slurm"
    if env.get("PBS_JOBID") and env.get("PBS_NODEFILE"):
        return "pbs"
    return None


def require_place(env: Mapping[str, str]) -> None:
    """LaunchError if DMI_LAUNCH says something that is not known."""
    if env.get(knobs.PLACE, "") not in ("", "local", "allocation"):
        raise LaunchError(
            f"{knobs.PLACE}: found '{env[knobs.PLACE]}', expected local or allocation, or unset it"
        )


def job_id(env: Mapping[str, str]) -> str:
    """The id by which the scheduler's commands know this job: ID_TASK in an array."""
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return env.get("SLURM_JOB_ID") or env.get("PBS_JOBID", "")


def of_slurm(
    env: Mapping[str, str], nodes: tuple[str, ...], end: float | None, gpus: int
) -> Allocation:
    """nodes, end: as Slurm's commands say; gpus: of a node, where Slurm does not say it."""
    if env.get("SLURM_HET_SIZE", "1") != "1":
        raise LaunchError(
            f"this is a heterogeneous job of {env['SLURM_HET_SIZE']} parts; expected equal nodes: ask "
            "for one part"
        )
    here = env.get("SLURM_GPUS_ON_NODE", "")
    listed = [part for part in env.get("SLURM_JOB_GPUS", "").split(",") if part]
    return Allocation(
        scheduler="slurm",
        job=job_id(env),
        nodes=nodes,
        cpus=cpus_of_slurm(
            env.get("SLURM_JOB_CPUS_PER_NODE") or env.get("SLURM_CPUS_ON_NODE", "1")
        ),
        gpus=int(here) if here.isdigit() else len(listed) or gpus,
        restart=int(env.get("SLURM_RESTART_COUNT") or 0),
        end=end,
        task=env.get("SLURM_ARRAY_TASK_ID", ""),
    )


def cpus_of_slurm(text: str) -> int:
    """The least of a list by node.

    >>> cpus_of_slurm("128(x3),64")
    64
    """
    counts = [int(found[1]) for found in re.finditer(r"(\d+)(?:\(x\d+\))?(?:,|$)", text)]
    if not counts:
        raise LaunchError(f"SLURM_JOB_CPUS_PER_NODE: found {text!r}, expected e.g. '64(x4)'")
    return min(counts)


def of_pbs(env: Mapping[str, str], end: float | None, cpus: int, gpus: int) -> Allocation:
    """Nodes by PBS_NODEFILE; cpus, gpus: of a node, which PBS says to nobody."""
    lines = Path(env["PBS_NODEFILE"]).read_text(encoding="utf-8").split()
    return Allocation(
        scheduler="pbs",
        job=job_id(env),
        nodes=tuple(dict.fromkeys(lines)),
        cpus=cpus,
        gpus=gpus,
        end=end,
        task=env.get("PBS_ARRAY_INDEX", ""),
    )
