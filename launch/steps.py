"""Command lines that start processes on the nodes of an allocation: srun, mpirun, mpiexec. Pure."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dmi_hpc.errors import LaunchError
from launch.allocation import Allocation
from launch.machines import Machine

# What srun takes from its environment and would understand as options of ours: the batch job's own
# values are of the batch script, and newer Slurms refuse two that differ.
SRUN_READS = (
    *("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS", "SLURM_NPROCS"),
    *("SLURM_NTASKS_PER_NODE", "SLURM_NTASKS_PER_GPU", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
    *("SLURM_DISTRIBUTION", "SLURM_CPU_BIND", "SLURM_GPU_BIND", "SLURM_MPI_TYPE"),
)
# seconds that the other tasks may take, once one has ended: to name the lost, to save
WAIT_S = 120


@dataclass(frozen=True)
class Step:
    """`command` as `per_node` tasks on each of `nodes` nodes.

    cpus: of a task; kind: "ranks" meet by an address, "mpi" through MPI's own start, "nodes" are
    daemons, of which each may fail alone.
    """

    command: tuple[str, ...]
    nodes: int
    per_node: int = 1
    cpus: int = 1
    kind: str = "ranks"

    @property
    def size(self) -> int:
        return self.nodes * self.per_node


def per_node(ranks: int | None, nodes: int, usual: int) -> tuple[int, int]:
    """(nodes, ranks on each) of `ranks` in all; None: `usual` on each. LaunchError if they do not
    divide: unequal nodes would wait for the fullest."""
    if ranks is None:
        return nodes, usual
    used = min(nodes, ranks)
    if ranks % used:
        raise LaunchError(
            f"{ranks} ranks on {nodes} nodes: expected a multiple of {nodes}, or at most {nodes}; e.g. "
            f"-n {nodes * max(1, ranks // nodes)}"
        )
    return used, ranks // used


@dataclass(frozen=True)
class Meeting:
    """address: host:port where ranks meet; interfaces: of their network, in order of preference."""

    address: str
    interfaces: tuple[str, ...] = ()


def rank_step(
    command: Sequence[str], size: tuple[int, int], allocation: Allocation, meeting: Meeting
) -> Step:
    """`command` on ranks that find torchrun's variables. size: (nodes, ranks on each)."""
    nodes, each = size
    shim = [sys.executable, "-P", "-m", "launch.rank", "--size", str(nodes * each)]
    shim += ["--address", meeting.address]
    shim += [word for name in meeting.interfaces for word in ("--interface", name)]
    return Step(
        (*shim, "--", *command), nodes, each, cpus=max(1, allocation.cpus // each), kind="ranks"
    )


def command_of(
    step: Step, allocation: Allocation, machine: Machine, env: Mapping[str, str]
) -> list[str]:
    """The whole command line; env: of which mpirun passes some on. LaunchError if the step is larger
    than the allocation."""
    if step.nodes > len(allocation.nodes):
        raise LaunchError(
            f"a step on {step.nodes} nodes in an allocation of {len(allocation.nodes)}"
        )
    if machine.launcher == "mpirun" or (step.kind == "mpi" and not machine.mpi):
        passed = sorted({*machine.environment, *PASSED_ON} & set(env))
        return _mpirun(step, allocation, passed)
    return (_srun if machine.launcher == "srun" else _mpiexec)(step, allocation, machine)


def _srun(step: Step, allocation: Allocation, machine: Machine) -> list[str]:
    alone = step.kind == "nodes"
    binding: Iterable[str] = (
        machine.rank_options if step.kind == "ranks" and allocation.gpus else ()
    )
    return [
        "srun",
        "--overlap",
        f"--nodes={step.nodes}",
        f"--ntasks={step.size}",
        f"--ntasks-per-node={step.per_node}",
        f"--cpus-per-task={step.cpus}",
        f"--mpi={machine.mpi if step.kind == 'mpi' else 'none'}",
        # a rank that ends first, with everything saved, must not have the others killed
        "--kill-on-bad-exit=0",
        *(["--no-kill"] if alone else [f"--wait={WAIT_S}"]),
        *binding,
        *step.command,
    ]


def _mpirun(step: Step, allocation: Allocation, passed: Sequence[str]) -> list[str]:
    """Open MPI: nodes by name, so that one that has failed is left out."""
    hosts = ",".join(f"{node}:{step.per_node}" for node in allocation.nodes[: step.nodes])
    return [
        "mpirun",
        *("--host", hosts),
        *("-n", str(step.size)),
        *("--map-by", f"ppr:{step.per_node}:node"),
        *("--bind-to", "none"),
        *(word for name in passed for word in ("-x", name)),
        *step.command,
    ]


def _mpiexec(step: Step, allocation: Allocation, machine: Machine) -> list[str]:
    """PALS, as ALCF's machines have it."""
    binding = machine.rank_options if step.kind == "ranks" else ()
    return [
        "mpiexec",
        *("-n", str(step.size)),
        *("-ppn", str(step.per_node)),
        *("--hosts", ",".join(allocation.nodes[: step.nodes])),
        *(binding or ("--depth", str(step.cpus), "--cpu-bind", "depth")),
        *step.command,
    ]


# besides the machine's own; Slurm and PALS pass everything on anyway
PASSED_ON = ("PYTHONPATH", "PATH", "LD_LIBRARY_PATH")


def step_environment(env: Mapping[str, str], *, root: bool) -> dict[str, str]:
    """The environment of the launcher's own process. root: it is root, as in a container, which
    mpirun refuses without being told."""
    kept = {name: value for name, value in env.items() if name not in SRUN_READS}
    kept["PYTHONSAFEPATH"] = "1"
    if root:
        kept |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        kept |= {"PRTE_ALLOW_RUN_AS_ROOT": "1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return kept
