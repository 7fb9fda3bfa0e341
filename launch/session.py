"""``dmi launch`` inside an allocation: what there is, and the job that it is to be used for."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmi_hpc import knobs
from dmi_hpc.config import Recipe
from dmi_hpc.errors import LaunchError
from dmi_hpc.watch import stop_on_signals
from launch.allocation import Allocation, SchedulerName, job_id, of_pbs, of_slurm
from launch.check import shown
from launch.cluster import command_line
from launch.conductor import Conductor
from launch.job import SHORTEST_S, Job, describe
from launch.machines import Machine, detect_machine, load_machine
from launch.parts import Parts
from launch.scheduler import Scheduler, scheduler_of

ENDLESS_S = 365 * 86_400  # what an allocation without an end is called


def conducted(inside: SchedulerName, values: Mapping[str, Any], recipe: Recipe | None) -> int:
    """Run the job that the command line describes in this allocation; returns the exit code.

    recipe: None for a check.
    """
    scheduler = scheduler_of(inside)
    machine = _machine(inside, values["machine"])
    allocation = allocation_of(inside, scheduler, machine)
    _move_to_first_node(allocation)
    allocation = _part(allocation, values["nodes"])
    job = job_in(allocation, machine, values)
    sys.stderr.write(
        f"job {allocation.job}: {job.stage} on {len(allocation.nodes)} nodes of {machine.name}, "
        f"{allocation.cpus} CPUs and {allocation.gpus} GPUs each\n"
    )
    with stop_on_signals() as stop:
        if recipe is None:
            return shown(Parts(job, None, allocation, None).check(stop))
        return Conductor(job, recipe, allocation, scheduler, stop).run()


def _machine(inside: SchedulerName, name: str | None) -> Machine:
    """As asked for, or this host's, or any with such a scheduler; the latter are said."""
    if name is not None:
        return load_machine(name)
    found = detect_machine(os.environ, socket.gethostname())
    if found is None and inside != "slurm":
        raise LaunchError("which machine is this? -m NAME; dmi launch machines lists them")
    gpus = bool(os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_GPUS_ON_NODE"))
    machine, reason = found or (
        load_machine("gpu" if gpus else "cpu"),
        "no other one is known here",
    )
    sys.stderr.write(f"machine {machine.name}: {reason}\n")
    return machine


def allocation_of(inside: SchedulerName, scheduler: Scheduler, machine: Machine) -> Allocation:
    """This job's allocation, by its environment and by what the scheduler says."""
    details = scheduler.details(job_id(os.environ))
    if inside == "slurm":
        nodes = scheduler.hostnames(os.environ["SLURM_JOB_NODELIST"])
        return of_slurm(os.environ, tuple(nodes), details.end, machine.gpus_per_node)
    cpus = machine.cpus or len(os.sched_getaffinity(0))
    return of_pbs(os.environ, details.end, cpus, machine.gpus_per_node)


def _move_to_first_node(allocation: Allocation) -> None:
    """From a login node, where some sites' salloc leaves its shell: steps are started, and meet, at
    the first node. Does not return if it moves."""
    here = os.environ.get("SLURMD_NODENAME") or socket.gethostname().partition(".")[0]
    first = allocation.nodes[0]
    if allocation.scheduler != "slurm" or here in (first, first.partition(".")[0]):
        return
    sys.stderr.write(f"going from {here} to {first}, the first node of the allocation\n")
    sys.stderr.flush()
    os.environ[knobs.PLACE] = "allocation"
    step = ["srun", "--nodes=1", "--ntasks=1", f"--nodelist={first}", "--overlap", "--mpi=none"]
    os.execvp("srun", [*step, *command_line(sys.argv[1:])])


def _part(allocation: Allocation, nodes: int | None) -> Allocation:
    """The first `nodes` of it."""
    if nodes is None:
        return allocation
    if nodes > len(allocation.nodes):
        raise LaunchError(
            f"--nodes {nodes}, but this shell is inside an allocation of {len(allocation.nodes)} "
            f"(job {allocation.job}): take fewer, or submit a job of its own (--submit)"
        )
    return replace(allocation, nodes=allocation.nodes[:nodes])


def job_in(allocation: Allocation, machine: Machine, values: Mapping[str, Any]) -> Job:
    """The job that the command line describes. By hand, in an interactive shell or a script of the
    user's own, nothing goes on by itself unless --chain says so."""
    now = time.time()
    left = ENDLESS_S if allocation.end is None else max(SHORTEST_S, int(allocation.end - now))
    known = {key: value for key, value in values.items() if key not in ("time", "chain")}
    return describe(
        {
            **known,
            "machine": machine.model_copy(update={"time_max_s": None, "time_bins": ()}),
            "python": Path(sys.executable),
            "nodes": len(allocation.nodes),
            "time_s": left,
            "chain": values["chain"] or "off",
        }
    )
