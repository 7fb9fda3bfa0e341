"""What a node finds out about itself for `dmi launch check`. Each function measures; none judges.

They return plain JSON values. Any of them may hang, on a driver or a file system: the caller bounds
them.
"""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from dmi_hpc.deadline import end_of
from dmi_hpc.files import write_text
from launch.network import PORTS, addresses, interface_of

BLOCK_BYTES = 64_000_000  # written to measure the file system's speed: a large checkpoint's shard
SMALL_FILES = 5  # of which the median counts
MATMUL_S = 0.3
_TRIED_PORTS = 50
_SOURCES = ("dmi_hpc", "search", "launch")
_CGROUP = Path("/sys/fs/cgroup")


def software() -> dict[str, str]:
    """Versions, and a fingerprint of the source that runs here: an edited copy has no other version."""
    import xxhash

    from dmi_hpc.run import versions

    digest = xxhash.xxh3_64()
    home = Path(__file__).resolve().parents[1]
    for folder in _SOURCES:
        for path in sorted((home / folder).rglob("*.py")):
            digest.update(path.relative_to(home).as_posix().encode())
            digest.update(path.read_bytes())
    source = {"source of dmi_hpc": digest.hexdigest()}
    return {"python": platform.python_version(), **versions(), **source}


def cores() -> dict[str, Any]:
    """usable: cores of this process; quota: cores' worth of time by cgroup; GFLOP_s: of one core."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "")
    return {
        "usable": len(os.sched_getaffinity(0)),
        "quota": _cpu_quota(),
        "omp": int(threads) if threads.isdecimal() else None,
        "torch": torch.get_num_threads(),
        "GFLOP_s": _matmul_speed(),
    }


def _cpu_quota() -> float | None:
    """Of cgroup v2, from the process's own group up; None: no limit, or not known."""
    quotas = []
    for folder in _cgroup_folders():
        text = folder / "cpu.max"
        given, _, period = (
            text.read_text().strip().partition(" ") if text.is_file() else ("max", "", "")
        )
        if given != "max":
            quotas.append(int(given) / int(period))
    return min(quotas, default=None)


def _cgroup_folders() -> list[Path]:
    own = Path("/proc/self/cgroup")
    lines = own.read_text().splitlines() if own.exists() else []
    names = [line[3:] for line in lines if line.startswith("0::")]
    folders = [_CGROUP / name.lstrip("/") for name in names]
    return [
        up for folder in folders for up in (folder, *folder.parents) if up.is_relative_to(_CGROUP)
    ]


def _matmul_speed(size: int = 384) -> float:
    """GFLOP/s of the best of many float32 products on one core: a throttled one has no best."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    factor, best, end = torch.ones(size, size), float("inf"), time.perf_counter() + MATMUL_S
    while (began := time.perf_counter()) < end:
        factor @ factor
        best = min(best, time.perf_counter() - began)
    torch.set_num_threads(before)
    return 2 * size**3 / best / 1e9


def memory() -> dict[str, int]:
    """Bytes: usable within the cgroups' limits, and of the node."""
    from dmi_hpc.data.storage import free_memory

    return {"usable": free_memory(), "node": int(psutil.virtual_memory().total)}


def gpus() -> list[dict[str, str]]:
    """name of each GPU that torch sees here, and why it cannot be used ("": a product came out)."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        name = why = ""
        try:
            name = torch.cuda.get_device_name(index)
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            total = float((ones @ ones).sum())
            why = "" if total == 64**3 else f"a product of ones is {total:g} instead of {64**3}"
        except RuntimeError as error:
            why = str(error).splitlines()[0]
        found.append({"name": name, "why": why})
    return found


def limits() -> dict[str, Any]:
    """[soft, hard] limits of open files and of processes, None: none; pids: of the cgroup."""

    def both(kind: int) -> list[int | None]:
        return [None if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(kind)]

    texts = [f.read_text().strip() for up in _cgroup_folders() if (f := up / "pids.max").is_file()]
    return {
        "files": both(resource.RLIMIT_NOFILE),
        "processes": both(resource.RLIMIT_NPROC),
        "pids": min((int(text) for text in texts if text.isdecimal()), default=None),
    }


def names() -> dict[str, Any]:
    """How long this node's own name takes to resolve, in seconds; address: None if it does not."""
    host, address = socket.gethostname(), None
    began = time.perf_counter()
    try:
        address = socket.getaddrinfo(host, None, socket.AF_INET)[0][4][0]
    except socket.gaierror:
        address = None
    return {"seconds": time.perf_counter() - began, "address": address}


def interface() -> dict[str, Any]:
    """The network that the ranks were told to use: name, IPv4 address, Mbit/s (0: not said), MTU."""
    told = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    name, address = interface_of(told, os.environ.get("MASTER_ADDR"))
    stats = psutil.net_if_stats()[name]
    return {"name": name, "address": address, "Mbit_s": stats.speed, "mtu": stats.mtu, "told": told}


def ports() -> dict[str, Any]:
    """Of some ports from launch.network.PORTS, how many are free on the job's own interface."""
    address, free = interface()["address"], 0
    for port in PORTS[:: len(PORTS) // _TRIED_PORTS]:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            free += probe.connect_ex((address, port)) != 0 and _binds(probe.family, address, port)
    outgoing = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return {"free": free, "tried": _TRIED_PORTS, "outgoing_from": int(outgoing[0])}


def _binds(family: int, address: str, port: int) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True


def time_left() -> float | None:
    """Seconds to the end of the job; None: nobody says."""
    now = time.time()
    end = end_of(os.environ, None, now)
    return None if end is None else end.at - now


def node_storage(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Folders of this node's own: file system, free bytes, and why they cannot be used ("": can)."""
    return [_storage(Path(os.path.expandvars(path))) for path in dict.fromkeys(paths)]


def _storage(folder: Path) -> dict[str, Any]:
    own, why = folder / f".dmi-check-{uuid4().hex}", ""
    try:
        own.write_bytes(b"0" * 4096)
        own.unlink()
    except OSError as error:
        why = error.strerror or str(error)
    free = psutil.disk_usage(str(folder)).free if folder.is_dir() else 0
    return {"path": str(folder), "kind": kind_of(folder), "free": free, "why": why}


def kind_of(folder: Path) -> str:
    """Type of the file system that holds `folder`, as "lustre"; "" if it is not mounted here."""
    mounts = {part.mountpoint: str(part.fstype) for part in psutil.disk_partitions(all=True)}
    resolved = folder.resolve()
    found = next((up for up in (resolved, *resolved.parents) if str(up) in mounts), None)
    return "" if found is None else mounts[str(found)]


def file_system(folder: Path) -> dict[str, Any]:
    """The run folder's file system as this node alone sees it; it is left as it was found.

    small_s: of a small file written, synced and renamed; clock_s: its clock less this node's.
    """
    room = os.statvfs(folder)
    own = folder / f".dmi-check-{socket.gethostname()}-{uuid4().hex}"
    own.mkdir(mode=0o700)
    try:
        small = sorted(_timed(lambda: write_text(own / "small", "{}")) for _ in range(SMALL_FILES))
        clock_s = (own / "small").stat().st_mtime - time.time()
        block_s = _timed(lambda: _write_block(own / "block"))
        why = _lock(own / "lock")
    finally:
        for path in own.iterdir():
            path.unlink()
        own.rmdir()
    return {
        "kind": kind_of(folder),
        "free": room.f_bavail * room.f_frsize,
        "inodes": room.f_favail if room.f_files else None,  # some count none
        "small_s": small[len(small) // 2],
        "bytes_s": BLOCK_BYTES / block_s,
        "clock_s": clock_s,
        "lock": why,
    }


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _write_block(path: Path) -> None:
    piece = os.urandom(1_000_000)  # some file systems compress
    with path.open("wb") as stream:
        for _ in range(BLOCK_BYTES // len(piece)):
            stream.write(piece)
        stream.flush()
        os.fsync(stream.fileno())


def _lock(path: Path) -> str:
    """Why a file cannot be locked here; "" if it can."""
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.strerror or str(error)
    return ""


def addresses_in_use() -> dict[str, Any]:
    """used: own addresses of this process's TCP connections to other nodes; meant: of `interface`."""
    own = set(addresses().values())
    used = {
        connection.laddr.ip.removeprefix("::ffff:")
        for connection in psutil.Process().net_connections(kind="tcp")
        if connection.raddr and connection.raddr.ip.removeprefix("::ffff:") not in own
    }
    one = interface()
    return {"used": sorted(used), "meant": one["address"], "name": one["name"]}
