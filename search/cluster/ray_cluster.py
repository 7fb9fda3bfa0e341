"""Ray as the search finds it: a cluster that is there, or one of its own."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from dmi_hpc.config import SearchConfig
from dmi_hpc.errors import LaunchError
from search.cluster.capacity import MEMORY_SHARE, Shape, capacity, local_workers

# Enough for Ray's few small objects; networks and data never pass through it.
OBJECT_STORE_BYTES = 100_000_000
CONNECT_S = 5.0
OWN_PROCESSES = {"gcs_server", "raylet"}  # without either there is no cluster


@dataclass(frozen=True)
class Cluster:
    """Ray as it was found. alive: whether it still stands; asks processes or sockets, not Ray."""

    workers: int
    trial_memory_GB: float
    gpus: bool
    alive: Callable[[], bool]


def _reachable(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError:
        return False
    return True


def _join(address: str, common: dict[str, Any]) -> None:
    """Connect to a cluster that is there. LaunchError if it does not answer."""
    missing = LaunchError(
        f"RAY_ADDRESS={address}: no Ray cluster there takes us in. Start it (ray start --head), "
        "correct the address (or RAY_AUTH_MODE, if it wants a token), or unset RAY_ADDRESS for a "
        "cluster of the search's own"
    )
    # Ray itself would try for minutes and then end this process
    if address.rpartition(":")[2].isdigit() and not _reachable(address.removeprefix("ray://")):
        raise missing
    try:
        ray.init(address=address, **common)
    except ConnectionError as error:
        raise missing from error


@contextmanager
def cluster(search: SearchConfig, folder: Path, shape: Shape | None = None) -> Iterator[Cluster]:
    """Ray for the block: the cluster at RAY_ADDRESS, or one of our own on the loopback interface.

    folder: for Ray's sockets and logs; short, its path is part of socket names. shape: of a trial,
    if it is not one rank with a device of its own.
    """
    shape = shape or Shape(search.trial_threads)
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials: see the journal
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _join(address, common)
            gcs = ray.get_runtime_context().gcs_address
            yield _surveyed(search, shape, lambda: _reachable(gcs))
        else:
            ray.init(
                address="local",
                num_cpus=local_workers(search, shape) * shape.ranks * shape.threads,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
                **common,
            )
            own = [p for p in psutil.Process().children() if p.name() in OWN_PROCESSES]
            yield _surveyed(search, shape, lambda: all(map(_runs, own)))
    finally:
        ray.shutdown()


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _surveyed(search: SearchConfig, shape: Shape, alive: Callable[[], bool]) -> Cluster:
    """The cluster that Ray is connected to: where the recipe says auto, by what its nodes have."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = capacity(nodes, shape.threads, shape.ranks, shape.gpu_share)
    workers = found.workers if search.workers == "auto" else search.workers
    memory = search.trial_memory_GB
    if memory == "auto":
        free = _free_gpu_GB(shape) * shape.gpu_share if found.gpus else found.memory_GB
        memory = MEMORY_SHARE * free
    return Cluster(workers, memory, found.gpus, alive)


def _free_gpu_GB(shape: Shape) -> float:
    """Free memory of a GPU as a worker sees it: the driver's own use of CUDA would take a part."""

    def free() -> float:
        return torch.cuda.mem_get_info()[0] / 1e9

    return float(ray.get(ray.remote(num_gpus=1, num_cpus=shape.threads)(free).remote()))
