"""How many trials a machine or a cluster holds at once, and how much memory each may use."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dmi_hpc.config import SearchConfig
from dmi_hpc.errors import LaunchError

MEMORY_SHARE = 0.8  # of what is free: the estimate of a network's need is one


@dataclass(frozen=True)
class Capacity:
    """workers: trials at once; memory_GB: smallest share of a worker in its node's main memory;
    gpus: every trial has one."""

    workers: int
    memory_GB: float
    gpus: bool


def capacity(nodes: Sequence[Mapping[str, float]], threads: int) -> Capacity:
    """Of nodes with Ray's resources CPU, GPU and memory (free bytes), at `threads` CPUs a trial.

    Raises LaunchError if no node can run a trial.
    """
    gpus = any(node.get("GPU", 0) >= 1 for node in nodes)
    slots = [_slots(node, threads, gpus) for node in nodes]
    shares = [node.get("memory", 0.0) / n for node, n in zip(nodes, slots, strict=True) if n]
    if not shares:
        cpus = ", ".join(f"{node.get('CPU', 0):g}" for node in nodes) or "none"
        raise LaunchError(
            f"no node of the Ray cluster can run a trial: CPUs of its nodes: {cpus}; "
            f"[search] trial_threads = {threads}"
        )
    return Capacity(sum(slots), min(shares) / 1e9, gpus)


def _slots(node: Mapping[str, float], threads: int, gpus: bool) -> int:
    slots = int(node.get("CPU", 0)) // threads
    return min(slots, int(node.get("GPU", 0))) if gpus else slots


def local_workers(search: SearchConfig) -> int:
    """Trials at once on this machine: as the recipe says, or one per GPU, or as the cores hold."""
    if search.workers != "auto":
        return search.workers
    import torch

    gpus = torch.cuda.device_count()
    return gpus or max(1, len(os.sched_getaffinity(0)) // search.trial_threads)
