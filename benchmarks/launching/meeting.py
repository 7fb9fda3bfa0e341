"""Where training ranks meet: torch's TCPStore with thousands of real clients; what gloo asks of it."""

from __future__ import annotations

import json
import multiprocessing
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from statistics import mean, median
from typing import Any

import psutil
import torch.distributed as dist

from dmi_hpc.heartbeat import Beat

TIMEOUT = timedelta(seconds=300)
PER_PROCESS = 4096  # sockets of one process of clients


@dataclass(frozen=True)
class Meeting:
    """`clients` connections to one store. server: of the process that holds it, per connection."""

    clients: int
    join_s: float
    server_s: float
    server_bytes: float
    server_files: float


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _join(port: int, count: int, said: Any, leave: Any) -> None:
    """In a process of its own: `count` clients that stay until `leave`."""
    began = time.perf_counter()
    stores = [
        dist.TCPStore("127.0.0.1", port, None, False, TIMEOUT, wait_for_workers=False)
        for _ in range(count)
    ]
    said.put(time.perf_counter() - began)
    leave.wait()
    del stores


@contextmanager
def _clients(port: int, count: int) -> Iterator[float]:
    """`count` clients in processes of at most PER_PROCESS; yields seconds until all are there."""
    context = multiprocessing.get_context("spawn")
    said, leave = context.Queue(), context.Event()
    shares = [min(PER_PROCESS, count - i) for i in range(0, count, PER_PROCESS)]
    processes = [context.Process(target=_join, args=(port, share, said, leave)) for share in shares]
    try:
        seconds = []
        for process in processes:  # one after the other: the server is what is measured
            process.start()
            seconds.append(said.get(timeout=600))
        yield sum(seconds)
    finally:
        leave.set()
        for process in processes:
            if process.pid is not None:
                process.join(60)


def meeting(clients: int) -> Meeting:
    """Connect `clients` real clients over loopback to a store in this process."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, TIMEOUT, wait_for_workers=False)
    process = psutil.Process()
    memory, files, cpu = process.memory_info().rss, process.num_fds(), _cpu(process)
    with _clients(store.port, clients) as seconds:
        return Meeting(
            clients,
            seconds,
            (_cpu(process) - cpu) / clients,
            (process.memory_info().rss - memory) / clients,
            (process.num_fds() - files) / clients,
        )


@dataclass(frozen=True)
class Beats:
    """Heartbeats of `ranks` ranks. set_s, read_s: processor seconds of the store's process for one
    beat written, and for one rank that reads all; read_bytes: that it is sent."""

    ranks: int
    set_s: float
    read_s: float
    read_bytes: int


BEAT = json.dumps(astuple(Beat("frontier01234", 1234, 56789, "epoch 12, step 3400")))


def _beat(port: int, ranks: int, repeats: int, said: Any, go_on: Any) -> None:
    """In a process of its own: the calls of dmi_hpc.heartbeat."""
    base = dist.TCPStore("127.0.0.1", port, None, False, TIMEOUT, wait_for_workers=False)
    client, names = dist.PrefixStore("heartbeat", base), [f"beat/{rank}" for rank in range(ranks)]
    said.put("ready")
    go_on.get()
    for name in names * repeats:
        client.set(name, BEAT)
    client.get(names[-1])  # a set does not wait, this does
    said.put("written")
    go_on.get()
    for _ in range(repeats):
        assert client.check(names)
        client.multi_get(names)
    said.put("read")


def heartbeats(ranks: int, repeats: int = 10) -> Beats:
    """What one client's beats and readings cost the store, which serves all from one thread."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, TIMEOUT, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    said, go_on = context.Queue(), context.Queue()
    client = context.Process(target=_beat, args=(store.port, ranks, repeats, said, go_on))
    client.start()
    seconds = []
    for _ in range(2):
        said.get(timeout=120)
        process = psutil.Process()
        began = _cpu(process)
        go_on.put(None)
        wanted = said.get(timeout=300)
        seconds.append(_cpu(process) - began)
        assert wanted in ("written", "read")
        said.put(wanted)
    client.join(60)
    set_s, read_s = (each / repeats for each in seconds)
    return Beats(ranks, set_s / ranks, read_s, ranks * (len(BEAT) + 8))


class CountingStore(dist.Store):
    """A store in memory, shared by threads, that counts what gloo asks of it."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self.sets = self.gets = self.bytes = 0

    def set(self, key: str, value: Any) -> None:
        with self._changed:
            self._kept[key] = value.encode() if isinstance(value, str) else bytes(value)
            self.sets, self.bytes = self.sets + 1, self.bytes + len(self._kept[key])
            self._changed.notify_all()

    def get(self, key: str) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: key in self._kept, TIMEOUT.total_seconds())
            self.gets, self.bytes = self.gets + 1, self.bytes + len(self._kept[key])
            return self._kept[key]

    def wait(self, keys: list[str], timeout: timedelta = TIMEOUT) -> None:
        with self._changed:
            self._changed.wait_for(lambda: all(key in self._kept for key in keys), 300)

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(key in self._kept for key in keys)

    def add(self, key: str, amount: int) -> int:
        with self._changed:
            value = int(self._kept.get(key, b"0")) + amount
            self._kept[key] = str(value).encode()
            self._changed.notify_all()
            return value

    def set_timeout(self, timeout: timedelta) -> None:
        return None

    def has_extended_api(self) -> bool:
        return False


@dataclass(frozen=True)
class Mesh:
    """What it takes `ranks` ranks to connect each with each: keys and bytes through the store, files
    of one rank."""

    ranks: int
    seconds: float
    keys: int
    bytes: int
    files: float


def mesh(ranks: int) -> Mesh:
    """Gloo's process group over `ranks` threads of this process, by a store that counts."""
    store, groups = CountingStore(), [None] * ranks
    before, began = psutil.Process().num_fds(), time.perf_counter()

    def join(rank: int) -> None:
        groups[rank] = dist.ProcessGroupGloo(store, rank, ranks, TIMEOUT)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, files = time.perf_counter() - began, psutil.Process().num_fds() - before
    return Mesh(ranks, seconds, store.sets + store.gets, store.bytes, files / ranks)


@dataclass(frozen=True)
class Lookups:
    """Seconds to name the address of a connection, as torch does for its log at either end."""

    lookups: int
    mean_s: float
    median_s: float
    most_s: float


def lookups(count: int = 100) -> Lookups:
    """By this machine's name server; a name that is not found takes as long."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        with suppress(socket.gaierror):
            socket.getnameinfo(("::ffff:127.0.0.1", 1, 0, 0), socket.NI_NUMERICSERV)
        seconds.append(time.perf_counter() - began)
    return Lookups(count, mean(seconds), median(seconds), max(seconds))
