"""Who this process is among the ranks of a job, found from the environment that started it.

Vocabulary: a *rank* is one process of a job, numbered 0 .. size-1; *local* numbers count within a
node. Each launcher says this in other variables; ``detect`` is the one place that knows them.
DeepSpeed's own discovery is not used: under srun without PMI it makes every rank 0 of 1.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

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
    node_rank: int = 0
    source: Source = "single"

    @property
    def is_first(self) -> bool:
        return self.rank == 0


# launcher -> (rank, size, local rank, local size, node rank); the first two are required
_VARIABLES: dict[Source, tuple[str, str, str, str, str]] = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    "openmpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_NODE_RANK",
    ),
    "pmi": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ""),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "", "SLURM_NODEID"),
}


def detect(env: Mapping[str, str] | None = None) -> World:
    """World of this process from torchrun, Open MPI, PMI (MPICH, PALS) or Slurm variables.

    Raises LaunchError if the variables contradict each other, or if Slurm started several tasks and
    this process would silently be a world of its own.
    """
    env = os.environ if env is None else env
    if env.get(knobs.WORLD) == "single":
        return World()
    world = next((w for s in _VARIABLES if (w := _read(env, s)) is not None), World())
    tasks = int(env.get("SLURM_NTASKS", "1")) if _in_slurm_step(env) else 1
    if world.size == 1 and tasks > 1:
        raise LaunchError(
            f"Slurm runs {tasks} tasks here but this process finds itself alone "
            f"(source: {world.source}): {tasks} independent jobs would overwrite each other. "
            f"Start with 'srun --mpi=none dmi ...', or set {knobs.WORLD}=single if one is meant."
        )
    return world


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    """True in a task of srun; false in the batch shell (its step id is a special large number)."""
    step = env.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < 0xFFFF0000


def _read(env: Mapping[str, str], source: Source) -> World | None:
    rank_name, size_name, local_name, local_size_name, node_name = _VARIABLES[source]
    if rank_name not in env or size_name not in env:
        return None
    if source == "slurm" and not _in_slurm_step(env):
        return None

    def number(name: str, default: int) -> int:
        text = env.get(name, "") if name else ""
        if text == "":
            return default
        try:
            return int(text)
        except ValueError:
            raise LaunchError(
                f"environment variable {name}: expected a number, found {text!r}"
            ) from None

    rank, size = number(rank_name, 0), number(size_name, 1)
    if not 0 <= rank < size:
        raise LaunchError(f"{rank_name}={rank} and {size_name}={size}: expected 0 <= rank < size")
    return World(
        rank=rank,
        size=size,
        local_rank=number(local_name, rank),
        local_size=number(local_size_name, size),
        node_rank=number(node_name, 0),
        source=source,
    )
