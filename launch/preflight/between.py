"""What the nodes find out about each other for `dmi launch check`: network, clocks, shared files.

The nodes meet in a store that rank 0 holds; who came in time takes part, so that a node that did not
is named by the others instead of stopping them. All of it takes the same time on any number of nodes.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from dmi_hpc.errors import LaunchError
from dmi_hpc.files import append_json_line, read_json_lines, write_text

COLLECTIVE_S = 30.0  # a collective takes milliseconds; who is away that long will not come
TINY = 20  # all-reduces of 8 bytes
SIZES = (64_000_000, 16_000_000, 4_000_000, 1_000_000)  # bytes; the largest that takes no more than
MEASURE_S = 2.0  # this for one of three repeats
ROUNDS = 4  # pairs in each of which every node has another partner
PAIR_BYTES = (16_000_000, 1_000_000)
LINES = 20  # that each node appends to one file
POLL_S = 0.02
SEEN_S = 60.0  # NFS may hide a new file from other nodes for so long (acdirmax)


@dataclass(frozen=True)
class Members:
    """Ranks that met, in order; `index` is this one's place among them."""

    ranks: tuple[int, ...]
    index: int
    store: Any

    @property
    def size(self) -> int:
        return len(self.ranks)


def open_store(rank: int, size: int, address: str, port: int, wait_s: float) -> TCPStore:
    """The store that rank 0 holds, at its own address alone. LaunchError if it cannot be reached."""
    timeout = timedelta(seconds=wait_s)
    if rank:
        # torch's own client asks again after seconds only, and complains at length
        if not _until(lambda: _listens(address, port), wait_s):
            raise LaunchError(f"rank 0 does not answer at {address}:{port} within {wait_s:.0f} s")
        return TCPStore(address, port, size, False, timeout, wait_for_workers=False)
    listening = socket.create_server((address, port), backlog=size)
    return TCPStore(
        address,
        port,
        size,
        True,
        timeout,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )


def _listens(address: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(5.0)
        return probe.connect_ex((address, port)) == 0


def meet(rank: int, size: int, store: TCPStore, wait_s: float) -> Members:
    """Those of `size` ranks that come within `wait_s` of rank 0's coming.

    Raises LaunchError if this one came later.
    """
    store.set(f"came/{rank}", "")
    store.add("came", 1)
    if rank == 0:
        _until(lambda: store.add("came", 0) >= size, wait_s)
        came = [str(other) for other in range(size) if store.check([f"came/{other}"])]
        store.set("members", ",".join(came))
    store.wait(["members"], timedelta(seconds=wait_s + COLLECTIVE_S))
    ranks = tuple(int(text) for text in store.get("members").decode().split(","))
    if rank not in ranks:
        raise LaunchError(f"came later than {wait_s:.0f} s after rank 0")
    return Members(ranks, ranks.index(rank), store)


def join(members: Members) -> dict[str, Any]:
    """The process group of the members, by gloo. Returns what it took, in seconds."""
    began = time.perf_counter()
    dist.init_process_group(
        "gloo",
        store=PrefixStore("group", members.store),
        rank=members.index,
        world_size=members.size,
        timeout=timedelta(seconds=COLLECTIVE_S),
    )
    dist.barrier()
    return {"seconds": time.perf_counter() - began, "ranks": list(members.ranks)}


def _until(met: Callable[[], bool], limit_s: float) -> bool:
    """Wait until `met`; False if that takes longer than `limit_s`."""
    end = time.monotonic() + limit_s
    while not met():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


def clocks() -> dict[str, float]:
    """latency_s: the median of small all-reduces; this clock less rank 0's, and its uncertainty."""
    token, times = torch.zeros(1, dtype=torch.float64), []
    for _ in range(TINY):
        entered = time.time()
        dist.all_reduce(token)
        times.append((entered, time.time()))
    mine = torch.tensor(times, dtype=torch.float64)
    first = mine.clone()
    dist.broadcast(first, 0)
    theirs: list[tuple[float, float]] = [(float(a), float(b)) for a, b in first]
    offset_s, uncertain_s = clock_offset(times, theirs)
    took = sorted(left - entered for entered, left in times)
    return {"latency_s": took[TINY // 2], "offset_s": offset_s, "uncertain_s": uncertain_s}


def clock_offset(
    mine: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """(my clock less theirs, its uncertainty) in seconds, from the times at which both entered and
    left the same collectives.

    Nobody leaves before all have entered: I leave after they entered, they leave after I entered. So
    each collective bounds the offset from both sides, and all of them together bound it best.
    """
    least = max(entered - left for (entered, _), (_, left) in zip(mine, theirs, strict=True))
    most = min(left - entered for (_, left), (entered, _) in zip(mine, theirs, strict=True))
    return (least + most) / 2, abs(most - least) / 2


def all_reduce(device: str) -> dict[str, Any]:
    """Size in bytes and seconds of the largest all-reduce that fits the time; through gloo, or over
    the first GPU of each node through NCCL (device "cuda")."""
    group = None
    if device == "cuda":
        group = dist.new_group(backend="nccl", timeout=timedelta(seconds=COLLECTIVE_S))
    smallest = _reduce_s(SIZES[-1], device, group)
    size = _largest(SIZES, smallest, SIZES[-1])
    took = sorted(_reduce_s(size, device, group) for _ in range(3))
    return {
        "backend": "NCCL" if group else "gloo",
        "ranks": dist.get_world_size(),
        "bytes": size,
        "seconds": took[1],
    }


def _reduce_s(size: int, device: str, group: Any) -> float:
    """Of the slowest rank, so that all decide alike."""
    data = torch.zeros(size // 4, device=device)
    for part in (data[:1], data):  # a first one opens connections
        began = time.perf_counter()
        dist.all_reduce(part, group=group)
        if device == "cuda":
            torch.cuda.synchronize()
    took = torch.tensor([time.perf_counter() - began])
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def _largest(sizes: Sequence[int], seconds: float, measured: int) -> int:
    """The largest size that will take no more than MEASURE_S, if `measured` bytes take `seconds`."""
    return next((size for size in sizes if size * seconds / measured <= MEASURE_S), sizes[-1])


def partner(index: int, round_: int, size: int) -> int | None:
    """Whom `index` of `size` meets in a round-robin tournament; None: it sits this round out."""
    others = size - 1 + size % 2  # rounds until all have met
    if index == others:
        found = round_ * ((others + 1) // 2) % others
    else:
        opposite = (round_ - index) % others
        found = others if opposite == index else opposite
    return found if found < size else None


def pairs(members: Members) -> list[dict[str, Any]]:
    """With each partner: its rank, the latency of a message one way, and bytes a second each way."""
    results = []
    for round_ in range(min(ROUNDS, members.size - 1 + members.size % 2)):
        other = partner(members.index, round_, members.size)
        if other is not None:
            figures = _pair(members.index, other)
            results.append({"rank": members.ranks[other], **figures})
    return results


def _pair(index: int, other: int) -> dict[str, float]:
    """The lower of the two measures and tells the other."""
    leads = index < other
    told = torch.zeros(2, dtype=torch.float64)
    _there_and_back(torch.zeros(1), other, leads, 3)
    latency_s = _there_and_back(torch.zeros(1), other, leads, 15) / 2
    told[0] = size = PAIR_BYTES[-1]
    if leads:
        first = _there_and_back(torch.zeros(size // 4), other, leads, 1)
        told[0] = _largest(PAIR_BYTES, first, size)
        dist.send(told, other)
    else:
        _there_and_back(torch.zeros(size // 4), other, leads, 1)
        dist.recv(told, other)
    size = int(told[0])
    bytes_s = 2 * size / _there_and_back(torch.zeros(size // 4), other, leads, 2)
    told = torch.tensor([latency_s, bytes_s], dtype=torch.float64)
    dist.send(told, other) if leads else dist.recv(told, other)
    return {"latency_s": float(told[0]), "bytes_s": float(told[1])}


def _there_and_back(data: torch.Tensor, other: int, leads: bool, times: int) -> float:
    """Seconds of the fastest of several round trips, as this side sees it."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        for sends in (leads, not leads):
            dist.send(data, other) if sends else dist.recv(data, other)
        took.append(time.perf_counter() - began)
    return min(took)


def shared_files(members: Members, folder: Path) -> dict[str, Any]:
    """Whether the nodes see one and the same file system: files, appended lines and locks.

    Coordinated by the store, not by collectives: a node whose file system hangs holds up no other.
    """
    store = members.store.clone()
    return _holder(store, members, folder) if members.index == 0 else _guest(store, folder)


def _holder(store: Any, members: Members, folder: Path) -> dict[str, Any]:
    """Rank 0: writes a file, holds a lock, counts the lines of all."""
    others, lines = members.size - 1, folder / "appended.jsonl"
    with (folder / "held.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _until(lambda: store.add("files/ready", 0) >= others, COLLECTIVE_S)
        others = store.add("files/ready", 0)  # one that hangs is waited for once
        write_text(folder / "seen", "written by rank 0")
        store.set("files/written", "")
        _append(lines, 0)
        _until(lambda: store.add("files/done", 0) >= others, SEEN_S + 5)
    whole = LINES * (1 + store.add("files/done", 0))
    _until(lambda: len(read_json_lines(lines)) >= whole, 5.0)
    return {"lines": len(read_json_lines(lines)), "appended": whole}


def _guest(store: Any, folder: Path) -> dict[str, Any]:
    """Another rank: how long until rank 0's file is seen here, and whether its lock holds here."""
    seen = folder / "seen"
    seen.exists()  # a client that has looked in vain may remember that for a while
    store.add("files/ready", 1)
    store.wait(["files/written"], timedelta(seconds=2 * COLLECTIVE_S))
    began = time.perf_counter()
    if not _until(seen.exists, SEEN_S):
        return {"visible_s": None, "refused": None}
    visible_s = time.perf_counter() - began
    with (folder / "held.lock").open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            refused = False
        except OSError:
            refused = True
    _append(folder / "appended.jsonl", os.getpid())
    store.add("files/done", 1)
    return {"visible_s": visible_s, "refused": refused}


def _append(path: Path, writer: int) -> None:
    for number in range(LINES):
        append_json_line(path, {"writer": writer, "number": number})
