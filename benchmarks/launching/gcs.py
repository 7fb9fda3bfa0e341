"""Ray's head with thousands of nodes: a real GCS, at which nodes are registered that do not exist.

Each has the address of one small server here, which answers whatever the GCS asks a node, so its own
load is real: registrations, health checks, polls. What a process pays that joins such a cluster is
measured by a real one.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from ray.core.generated import gcs_pb2, gcs_service_pb2, gcs_service_pb2_grpc

ADDRESS = "127.0.0.1"
WAIT_S = 60.0
SETTLE_S = 4.0
ALIVE = gcs_pb2.GcsNodeInfo.ALIVE
NODE_ID_BYTES = 28
# of `ss -tin`: what came through a connection since it was made
_SENT, _RECEIVED = re.compile(r"bytes_sent:(\d+)"), re.compile(r"bytes_received:(\d+)")


@dataclass(frozen=True)
class Load:
    """The GCS with `nodes` nodes. register_s, register_cpu_s: of all; table_bytes: of its answer who
    the nodes are; calls: to all nodes a second, by name; cores: that this keeps busy; memory: of all
    nodes; joined_bytes, joined_s: what a new driver is sent, and how long it takes to connect."""

    nodes: int
    register_s: float
    register_cpu_s: float
    table_bytes: int
    calls: dict[str, float]
    cores: float
    memory_bytes: int
    joined_bytes: int
    joined_s: float


class _Everything(grpc.GenericRpcHandler):
    """Answers every call: with "serving" if it is about health, else with nothing."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def service(self, details: Any) -> Any:
        name = details.method.rpartition("/")[2]

        def answer(request: bytes, context: Any) -> bytes:
            self.calls[name] += 1
            return b"\x08\x01" if name == "Check" else b""

        return grpc.unary_unary_rpc_method_handler(answer)


# so seldom that this server of ours, which is slower than the GCS, can stand for 9,000 nodes
QUIET = {
    "RAY_gcs_pull_resource_loads_period_milliseconds": "20000",
    "RAY_health_check_period_ms": "60000",
}


def _environment(folder: Path) -> dict[str, str]:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "GRPC_DNS_RESOLVER": "native",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
    }


def _end(started: subprocess.Popen[bytes]) -> None:
    """Kill what was started and all that it has started."""
    family: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.wait()
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _until(there: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not there():
        if time.monotonic() > end:
            raise TimeoutError(f"after {WAIT_S:g} s: {what}")
        time.sleep(0.1)


@contextmanager
def head(folder: Path, port: int, settings: Mapping[str, str]) -> Iterator[psutil.Process]:
    """Ray's head without a resource, by a token; yields the GCS's process. Within the block this
    process has the environment of its clients."""
    before = dict(os.environ)
    os.environ.update({**_environment(folder), **settings})
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--node-ip-address={ADDRESS}", f"--port={port}", "--include-dashboard=false"]
    command += ["--num-cpus=0", "--object-store-memory=80000000", f"--temp-dir={folder}"]
    with (folder / "start.log").open("wb") as log:
        started = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        found: dict[str, psutil.Process] = {}

        def runs() -> bool:
            family = psutil.Process(started.pid).children(recursive=True)
            found.update({process.name(): process for process in family})
            return {"gcs_server", "raylet"} <= set(found)

        _until(runs, f"Ray's head does not run, see {folder}")
        yield found["gcs_server"]
    finally:
        _end(started)
        os.environ.clear()
        os.environ.update(before)


class Client:
    """Asks the GCS as Ray's own processes do."""

    def __init__(self, port: int) -> None:
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
        channel = grpc.insecure_channel(
            f"{ADDRESS}:{port}", [("grpc.max_receive_message_length", -1)]
        )
        grpc.channel_ready_future(channel).result(WAIT_S)
        self._nodes = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        self._metadata = [("authorization", f"Bearer {token}")]
        asked = gcs_service_pb2.GetClusterIdRequest()
        cluster = self._nodes.GetClusterId(asked, metadata=self._metadata).cluster_id
        self._metadata.append(("ray_cluster_id", cluster.hex()))

    def table(self) -> Any:
        request = gcs_service_pb2.GetAllNodeInfoRequest()
        return self._nodes.GetAllNodeInfo(request, metadata=self._metadata, timeout=WAIT_S)

    def head_node(self) -> Any:
        _until(lambda: bool(self.table().node_info_list), "Ray's head did not register itself")
        return self.table().node_info_list[0]

    def register(self, count: int, like: Any, port: int) -> None:
        """`count` nodes at once; their node managers are said to listen at `port`."""
        asked = []
        for number in range(count):
            node = gcs_pb2.GcsNodeInfo()
            node.CopyFrom(like)
            node.node_id = secrets.token_bytes(NODE_ID_BYTES)
            node.is_head_node = False
            node.node_manager_address, node.node_manager_port = ADDRESS, port
            node.node_name = f"10.0.{number >> 8}.{number & 255}"
            request = gcs_service_pb2.RegisterNodeRequest(node_info=node)
            asked.append(self._nodes.RegisterNode.future(request, metadata=self._metadata))
        for each in asked:
            each.result(WAIT_S)


DRIVER = """
import json, os, subprocess, sys, time
import ray
port = sys.argv[1]
began = time.perf_counter()
ray.init(address=f"127.0.0.1:{port}", log_to_driver=False)
seconds = time.perf_counter() - began
time.sleep(3)
ss = ["ss", "-tinpH", "dport", "=", f":{port}"]
text = subprocess.run(ss, capture_output=True, text=True).stdout
print("joined", json.dumps([seconds, os.getpid(), text]))
"""


def _joined(port: int) -> tuple[float, int]:
    """(seconds, bytes from the GCS) of a driver that connects."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", DRIVER, str(port)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("joined "))
    seconds, pid, text = json.loads(line.removeprefix("joined "))
    return seconds, moved(text, pid)


def moved(text: str, pid: int, what: re.Pattern[str] = _RECEIVED) -> int:
    """Bytes through the connections of process `pid`, by the output of `ss -tinpH`: two lines each."""
    lines = text.splitlines()
    pairs = zip(lines[::2], lines[1::2], strict=False)
    return sum(
        int(found[1])
        for who, counted in pairs
        if f"pid={pid}," in who and (found := what.search(counted))
    )


def loads(
    counts: list[int], folder: Path, port: int, settings: Mapping[str, str], watch_s: float = 12.0
) -> Iterator[Load]:
    """The GCS at growing numbers of nodes, in one cluster. settings: Ray's own, by environment."""
    calls = _Everything()
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((calls,))
    own_port = server.add_insecure_port(f"{ADDRESS}:0")
    server.start()
    try:
        with head(folder, port, settings) as gcs:
            client = Client(port)
            like, there, empty = client.head_node(), 1, gcs.memory_info().rss
            for count in counts:
                began, cpu = time.perf_counter(), _cpu(gcs)
                client.register(count - there, like, own_port)
                register_s, there = time.perf_counter() - began, count
                register_cpu_s = _cpu(gcs) - cpu
                table = client.table()
                alive = [node.state for node in table.node_info_list].count(ALIVE)
                assert alive == count, f"{alive} of {count} nodes are alive"
                time.sleep(SETTLE_S)
                before, cpu, began = Counter(calls.calls), _cpu(gcs), time.perf_counter()
                time.sleep(watch_s)
                passed = time.perf_counter() - began
                rates = {name: n / passed for name, n in (calls.calls - before).items()}
                cores, memory = (_cpu(gcs) - cpu) / passed, gcs.memory_info().rss - empty
                joined_s, joined = _joined(port)
                size = table.ByteSize()
                times = (register_s, register_cpu_s)
                yield Load(count, *times, size, rates, cores, memory, joined, joined_s)
    finally:
        server.stop(0)


def _cpu(process: psutil.Process) -> float:
    return float(sum(process.cpu_times()[:2]))


@dataclass(frozen=True)
class Real:
    """Idle nodes that do exist. cores, sent, received: of the GCS, a second; node_bytes: resident
    memory of a node's own processes."""

    nodes: int
    register_s: float
    cores: float
    sent: float
    received: float
    files: float
    node_bytes: float


def real(nodes: int, folder: Path, port: int, watch_s: float = 20.0) -> Real:
    """The head and `nodes` real nodes of Ray on this machine, without a resource."""
    started: list[subprocess.Popen[bytes]] = []
    with head(folder, port, {}) as gcs:
        client = Client(port)
        client.head_node()
        files = gcs.num_fds()
        command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block"]
        command += [f"--address={ADDRESS}:{port}", "--num-cpus=0", "--object-store-memory=80000000"]
        command += ["--include-log-monitor=false"]
        began = time.perf_counter()
        try:
            for number in range(nodes):
                own = [f"--temp-dir={folder}/{number}"]
                (folder / str(number)).mkdir()
                with (folder / f"{number}.log").open("wb") as log:
                    started.append(subprocess.Popen([*command, *own], stdout=log, stderr=log))
            whole = nodes + 1
            _until(lambda: len(client.table().node_info_list) == whole, "nodes are missing")
            register_s = time.perf_counter() - began
            time.sleep(2 * SETTLE_S)
            before, cpu, began = _through(gcs.pid), _cpu(gcs), time.perf_counter()
            time.sleep(watch_s)
            passed, after = time.perf_counter() - began, _through(gcs.pid)
            cores = (_cpu(gcs) - cpu) / passed
            memory = sum(
                process.memory_info().rss
                for each in started
                for process in psutil.Process(each.pid).children(recursive=True)
            )
            sent, got = ((new - old) / passed for new, old in zip(after, before, strict=True))
            used = (gcs.num_fds() - files) / nodes
            return Real(nodes, register_s, cores, sent, got, used, memory / nodes)
        finally:
            for each in started:
                _end(each)


def _through(pid: int) -> tuple[int, int]:
    """Bytes that the connections of process `pid` have (sent, received) so far."""
    text = subprocess.run(["ss", "-tinpH"], capture_output=True, text=True, check=True).stdout
    return moved(text, pid, _SENT), moved(text, pid, _RECEIVED)
