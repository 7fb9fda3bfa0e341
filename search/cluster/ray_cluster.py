"""Ray as the search finds it: a cluster that is there, or one of its own."""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from dmi_hpc import knobs
from dmi_hpc.config import SearchConfig
from dmi_hpc.errors import LaunchError
from search.cluster.capacity import MEMORY_SHARE, Shape, capacity, local_workers
from search.cluster.nodes import Room, reachable, wait_for_nodes

# Enough for Ray's few small objects; networks and data never pass through it.
OBJECT_STORE_BYTES = 100_000_000
ALIVE_S = 1.0  # between looks whether a cluster that we have joined still stands
ALIVE = 0  # GcsNodeInfo.GcsNodeState
OWN_PROCESSES = {"gcs_server", "raylet"}  # without either there is no cluster


@dataclass(frozen=True)
class Cluster:
    """Ray as it was found.

    alive: whether it still stands; asks processes or sockets, not Ray. room: trials that it holds
    now, as nodes go and come. missing: a word on nodes that have not come.
    """

    workers: int
    trial_memory_GB: float
    gpus: bool
    alive: Callable[[], bool]
    room: Callable[[], int]
    missing: str = ""


def _join(address: str, common: dict[str, Any]) -> str:
    """Connect to a cluster that is there, or coming up (DMI_RAY_NODES); a word on missing nodes.

    LaunchError if it does not answer.
    """
    missing = LaunchError(
        f"RAY_ADDRESS={address}: no Ray cluster there takes us in. Start it (ray start --head), "
        "correct the address (or RAY_AUTH_MODE, if it wants a token), or unset RAY_ADDRESS for a "
        "cluster of the search's own"
    )
    nodes, absent = knobs.ray_nodes(), ""
    if nodes:
        absent = wait_for_nodes(address, nodes, knobs.ray_wait_s(), _living)
    # Ray itself would try for minutes and then end this process
    elif address.rpartition(":")[2].isdigit() and not reachable(address.removeprefix("ray://")):
        raise missing
    try:
        ray.init(address=address, **common)
    except ConnectionError as error:
        raise missing from error
    return absent


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
            missing = _join(address, common)
            gcs = ray.get_runtime_context().gcs_address
            yield _surveyed(search, shape, _seldom(lambda: reachable(gcs)), missing)
        else:
            ray.init(
                address="local",
                num_cpus=local_workers(search, shape) * shape.ranks * shape.threads,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                # Ray lets everybody write into its own folder, but nobody gets past ours
                _temp_dir=str(folder / "r"),
                **common,
            )
            own = [p for p in psutil.Process().children() if p.name() in OWN_PROCESSES]
            yield _surveyed(search, shape, lambda: all(map(_runs, own)))
    finally:
        ray.shutdown()


def _seldom(ask: Callable[[], bool]) -> Callable[[], bool]:
    """`ask`, at most once in `ALIVE_S`: a connection for every result would use up the ports."""
    answer, look_at = True, 0.0

    def cached() -> bool:
        nonlocal answer, look_at
        now = time.monotonic()
        if now >= look_at:
            answer, look_at = ask(), now + ALIVE_S
        return answer

    return cached


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _surveyed(
    search: SearchConfig, shape: Shape, alive: Callable[[], bool], missing: str = ""
) -> Cluster:
    """The cluster that Ray is connected to: where the recipe says auto, by what its nodes have."""
    found = capacity(_resources(), shape.threads, shape.ranks, shape.gpu_share)
    limit = None if search.workers == "auto" else search.workers
    memory = search.trial_memory_GB
    if memory == "auto":
        free = _free_gpu_GB(shape) * shape.gpu_share if found.gpus else found.memory_GB
        memory = MEMORY_SHARE * free
    room = Room(shape, limit, _resources, gpus=found.gpus)
    return Cluster(limit or found.workers, memory, found.gpus, alive, room, missing)


def _living(address: str) -> list[str]:
    """Addresses of the nodes alive, asked of the head itself: Ray would first want one that is ready
    on this machine."""
    raylet: Any = importlib.import_module("ray._raylet")  # compiled: without types
    nodes: Mapping[Any, Any] = raylet.GcsClient(address).get_all_node_info()
    return [str(node.node_manager_address) for node in nodes.values() if node.state == ALIVE]


def _resources() -> list[Mapping[str, float]]:
    """Ray's, of every node that is alive."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _free_gpu_GB(shape: Shape) -> float:
    """Free memory of a GPU as a worker sees it: the driver's own use of CUDA would take a part."""

    def free() -> float:
        return torch.cuda.mem_get_info()[0] / 1e9

    return float(ray.get(ray.remote(num_gpus=1, num_cpus=shape.threads)(free).remote()))
