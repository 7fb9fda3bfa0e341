"""How many trials a machine or a cluster holds at once, and how much memory each may use."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmi_hpc.config import SearchConfig
from dmi_hpc.errors import LaunchError

MEMORY_SHARE = 0.8  # of what is free: the estimate of a network's need is one
ROUNDING = 1e-9


@dataclass(frozen=True)
class Shape:
    """What one trial takes: `ranks` processes of `threads` CPUs and `gpu_share` of a GPU each.

    gpu_share: 1, or less where several small networks share a device. Raises LaunchError for ranks
    that would have to share one: NCCL refuses that.
    """

    threads: int = 1
    ranks: int = 1
    gpu_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.gpu_share <= 1 or (self.ranks > 1 and self.gpu_share < 1):
            raise LaunchError(
                f"found gpu_share = {self.gpu_share:g} with {self.ranks} ranks a trial; expected a "
                "share in (0, 1], and 1 for a trial of several ranks"
            )

    @property
    def on_a_gpu(self) -> int:
        """Ranks that share a GPU."""
        return int(1 / self.gpu_share + ROUNDING)


@dataclass(frozen=True)
class Capacity:
    """workers: trials at once; memory_GB: smallest share of a rank in its node's main memory;
    gpus: every rank has one, or its share of one."""

    workers: int
    memory_GB: float
    gpus: bool


def capacity(
    nodes: Sequence[Mapping[str, float]], threads: int, ranks: int = 1, gpu_share: float = 1.0
) -> Capacity:
    """Of nodes with Ray's resources CPU, GPU and memory (free bytes), for trials of that `Shape`.

    Raises LaunchError if they cannot run one.
    """
    shape = Shape(threads, ranks, gpu_share)
    gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
    slots = [_slots(node, shape, gpus) for node in nodes]
    shares = [node.get("memory", 0.0) / n for node, n in zip(nodes, slots, strict=True) if n]
    workers = sum(slots) // shape.ranks
    if not workers:
        cpus = ", ".join(f"{node.get('CPU', 0):g}" for node in nodes) or "none"
        raise LaunchError(
            f"no node of the Ray cluster can run a trial: CPUs of its nodes: {cpus}; "
            f"[search] trial_threads = {shape.threads}"
            + (f", {shape.ranks} ranks a trial" if shape.ranks > 1 else "")
        )
    return Capacity(workers, min(shares) / 1e9, gpus)


def held(nodes: Sequence[Mapping[str, float]], shape: Shape, *, gpus: bool) -> int:
    """Trials that `nodes` hold at once, 0 too. gpus: a rank has one, or its share of one."""
    return sum(_slots(node, shape, gpus) for node in nodes) // shape.ranks


def _slots(node: Mapping[str, float], shape: Shape, gpus: bool) -> int:
    """Ranks that fit onto a node; the shares of one GPU are never of two."""
    slots = int(node.get("CPU", 0)) // shape.threads
    return min(slots, int(node.get("GPU", 0)) * shape.on_a_gpu) if gpus else slots


def local_workers(search: SearchConfig, shape: Shape | None = None) -> int:
    """Trials at once on this machine: as the recipe says, or as its GPUs or else cores hold."""
    if search.workers != "auto":
        return search.workers
    import torch

    shape = shape or Shape(search.trial_threads)
    gpus = torch.cuda.device_count()
    slots = gpus * shape.on_a_gpu or len(os.sched_getaffinity(0)) // shape.threads
    return max(1, slots // shape.ranks)
