"""Who this process is among the ranks of a job, found from the environment that started it.

Vocabulary: a *rank* is one process of a job, numbered 0 .. size-1; *local* numbers count within a
node. Each launcher says this in other variables; ``detect`` is the one place that knows them.
DeepSpeed's own discovery is not used: under srun without PMI it makes every rank 0 of 1.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import psutil

from dmi_hpc import knobs
from dmi_hpc.errors import LaunchError

Source = Literal["torchrun", "openmpi", "pmi", "slurm", "single"]


@dataclass(frozen=True)
class World:
    """Rank and size of this process, and which launcher said so."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    source: Source = "single"
    starter: str = ""  # the launcher behind torchrun's variables, if `dmi launch` has set those

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_bound(self) -> bool:
        """Whether the launcher gives each rank cores and GPUs of its own, if it is told to."""
        return (self.starter or self.source) in ("openmpi", "pmi", "slurm")

    @property
    def ranks_on_cores(self) -> int:
        """Ranks that share the cores this process may run on.

        mpirun and srun bind: a mask smaller than the machine is the rank's own. torchrun and dmi
        launch never do: their ranks share whatever mask there is.
        """
        machine = psutil.cpu_count() or 1
        return 1 if self.is_bound and len(os.sched_getaffinity(0)) < machine else self.local_size


Names = tuple[str, ...]

# launcher -> names of (rank, size, local rank, local size), the first one set counts; the first two
# are required. MPICH and Intel MPI say MPI_LOCAL*, PALS PMI_LOCAL_* and PALS_LOCAL_RANKID.
_VARIABLES: dict[Source, tuple[str, str, Names, Names]] = {
    "torchrun": ("RANK", "WORLD_SIZE", ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",)),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    "pmi": (
        "PMI_RANK",
        "PMI_SIZE",
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", ("SLURM_LOCALID",), ()),
}


def detect(env: Mapping[str, str] | None = None) -> World:
    """World of this process from torchrun, Open MPI, PMI (MPICH, PALS) or Slurm variables.

    A Ray actor, or any other starter, sets torchrun's.

    Raises LaunchError if the variables contradict each other, if Slurm started several tasks and this
    process would silently be a world of its own, or if dmi launch meant another number of ranks.
    """
    env = os.environ if env is None else env
    single = env.get(knobs.WORLD) == "single"
    readings = () if single else (_read(env, source) for source in _VARIABLES)
    world = next((found for found in readings if found is not None), World())
    tasks = int(env.get("SLURM_NTASKS", "1")) if in_slurm_step(env) and not single else 1
    if world.size == 1 and tasks > 1:
        raise LaunchError(
            f"Slurm runs {tasks} tasks here but this process finds itself alone "
            f"(source: {world.source}): {tasks} independent jobs would overwrite each other. "
            f"Start with 'srun --mpi=none dmi ...', or set {knobs.WORLD}=single if one is meant."
        )
    if world.size == 1 and world.source == "single" and "PMIX_RANK" in env and not single:
        raise LaunchError(
            f"PMIx says that this is rank {env['PMIX_RANK']} of a job, but not of how many: it may "
            "be alone or overwrite the others. Start with mpirun or srun, or set RANK and WORLD_SIZE "
            f"for each rank, or {knobs.WORLD}=single if one is meant."
        )
    meant = _number(env, (knobs.LAUNCHED,), world.size)
    if meant != world.size:
        raise LaunchError(
            f"dmi launch started {meant} ranks but this process finds itself in a world of "
            f"{world.size} (source: {world.source}): they would overwrite each other. "
            f"Unset {knobs.LAUNCHED} if this process is not one of them."
        )
    return world


def require_gpu(world: World, env: Mapping[str, str] | None = None) -> None:
    """Raise LaunchError, which says why, unless torch finds a GPU: a CPU is no silent substitute."""
    import torch

    if torch.cuda.is_available():
        return
    shown = (os.environ if env is None else env).get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None and torch.version.hip is None:
        why = f"torch {torch.__version__} is built for CPUs only: install one built for your GPUs"
    elif shown is not None:
        why = f"CUDA_VISIBLE_DEVICES is '{shown}': name a GPU that nvidia-smi lists, or unset it"
    else:
        why = "torch finds none: look at nvidia-smi, and ask the scheduler for one (Slurm: --gpus)"
    raise LaunchError(
        f'rank {world.rank}: the recipe asks for a GPU (train.device is "cuda"), but {why}; or set '
        'train.device = "auto" to train on the CPU'
    )


def in_slurm_step(env: Mapping[str, str]) -> bool:
    """True in a task of srun; false in the batch shell (its step id is a special large number)."""
    step = env.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < 0xFFFF0000


def slurm_address(world: World, env: Mapping[str, str]) -> str | None:
    """host:port where the ranks can meet if they are the tasks of one srun; else None.

    Nothing is exchanged: the host is the step's first, where Slurm's usual distributions put rank 0;
    the port is a number made of the ids of job and step, so that two steps on a node differ.
    """
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    first = _first_host(nodes)
    # mpirun starts its own helpers by srun: their tasks are not the ranks
    tasks = (_number(env, ("SLURM_PROCID",), -1), _number(env, ("SLURM_NTASKS",), 0))
    own = world.source in ("slurm", "pmi") and tasks == (world.rank, world.size)
    if not own or not in_slurm_step(env) or first is None:
        return None
    step = f"{env.get('SLURM_JOB_ID', '')}.{env['SLURM_STEP_ID']}"
    port = _PORTS.start + zlib.crc32(step.encode()) % len(_PORTS)
    return f"{'127.0.0.1' if env.get('SLURM_STEP_NUM_NODES') == '1' else first}:{port}"


_PORTS = range(20_000, 30_000)  # below those that Linux gives to outgoing connections


def _first_host(nodes: str) -> str | None:
    """First of a list of Slurm's, such as ``gpu[003-005,9]-ib,login1``."""
    found = re.match(r"([^,\[\]]*)(?:\[(\w+)[^\]]*\]([^,\[\]]*))?", nodes)
    host = "".join(part or "" for part in found.groups()) if found else ""
    return host or None


def _read(env: Mapping[str, str], source: Source) -> World | None:
    rank_name, size_name, local_names, local_size_names = _VARIABLES[source]
    if rank_name not in env or size_name not in env:
        return None
    if source == "slurm" and not in_slurm_step(env):
        return None
    rank, size = _number(env, (rank_name,), 0), _number(env, (size_name,), 1)
    if not 0 <= rank < size:
        raise LaunchError(f"{rank_name}={rank} and {size_name}={size}: expected 0 <= rank < size")
    # not said: as if all were on this node, so that threads are rather too few than too many
    local_size = _slurm_local_size(env, size) if source == "slurm" else size
    return World(
        rank=rank,
        size=size,
        local_rank=_number(env, local_names, rank),
        local_size=max(1, _number(env, local_size_names, local_size)),
        source=source,
        starter=env.get(knobs.STARTER, "") if source == "torchrun" else "",
    )


def _number(env: Mapping[str, str], names: Names, default: int) -> int:
    """The first of these variables that is set."""
    name = next((name for name in names if env.get(name)), None)
    if name is None:
        return default
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(
            f"environment variable {name}: expected a number, found {env[name]!r}"
        ) from None


def _slurm_local_size(env: Mapping[str, str], unknown: int) -> int:
    """Tasks of this step on this node, from a list by node such as ``4(x2),3``."""
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    groups = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", group) for group in tasks.split(",")]
    counts = [int(g[1]) for g in groups if g is not None for _ in range(int(g[2] or 1))]
    node = env.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else unknown
