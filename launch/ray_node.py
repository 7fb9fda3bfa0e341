"""``python -m launch.ray_node SPEC``: Ray on one node of an allocation, as one task of srun or mpirun.

Node 0 is the head, the others join it; all may start at once. Nothing of a job meets another one's
on the same node: its own ports, its own token, a private temporary folder. When this process is
asked to end, or its parent dies, nothing of Ray is left.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType
from typing import Any

import psutil

from dmi_hpc import knobs
from dmi_hpc.errors import EXIT_OK, EXIT_USER_ERROR, STOP_SIGNALS, DMIError, LaunchError
from launch.network import LOOPBACK, addresses, free_port, interface_of

# by preference: mpirun inside Slurm starts its own helpers by srun, whose numbers are not its ranks'
NODE_NUMBERS = ("OMPI_COMM_WORLD_RANK", "PALS_NODEID", "PALS_RANKID", "PMI_RANK", "SLURM_NODEID")
PREFIX, LOCK = "dmi-ray-", "lock"  # of temporary folders, as in search.cluster.environment
# Ray's sockets below it (/session_2026-01-31_23-59-59_123456_PID/sockets/plasma_store) have at most
# 107 bytes, those of AF_UNIX
ROOT_BYTES = 107 - 65 - len(PREFIX) - 9 - 2
DASHBOARD_NEEDS = ("aiohttp_cors", "opencensus", "prometheus_client")  # of ray[default]
JOINS = 3  # attempts of a node
REJOIN_S = 120.0  # for the head to be reachable again
POLL_S = 0.1
TAIL_LINES = 12
# `ray start` of an installation without grpcio: a server for ray:// clients less, on the head, and
# less of an agent on every node, which would show its figures on all interfaces without a token
BARE = "import sys; sys.modules['grpc'] = None; from ray.scripts.scripts import main; main()"
WHOLE = "from ray.scripts.scripts import main; main()"
# Slurm on AMD shows a task its own GPUs by ROCR; Ray wants HIP's list, which counts within them
ROCR, HIP = "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
VARIABLES = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "GRPC_DNS_RESOLVER": "native",
    # served to everybody on all interfaces where prometheus_client is installed
    "RAY_enable_metrics_collection": "0",
    # the dashboard's own figures: a port of the kernel's choice, not one for all users
    "DASHBOARD_METRIC_PORT": "0",
    # a node that crashed is noticed after about 10 s, one that was cut off after 40 s, instead of 15 s
    # and 65 s. Not less: a living node taken for dead is lost for good
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "3000",
    "RAY_health_check_timeout_ms": "10000",
    "RAY_health_check_failure_threshold": "3",
    # else every node starts as many workers as it has CPUs when the search connects
    "RAY_prestart_worker_first_driver": "0",
    # a worker is no rank, whatever the step that Ray is in says
    knobs.WORLD: "single",
}


@dataclass(frozen=True)
class Spec:
    """Ray on all nodes of a job.

    head: IPv4 address of node 0, where Ray's head listens at `port`; cpus, gpus: of each node that
    trials may use; interfaces: of the network between the nodes, in order of preference, empty: the
    one towards the head; token: a file (0600) that all nodes see; memory_bytes: of each node for
    Ray's own count, None: what is free; temp_root: folder of each node's own, never a shared one.
    """

    head: str
    port: int
    nodes: int
    cpus: int
    gpus: int
    token: str
    object_store_bytes: int = 100_000_000
    memory_bytes: int | None = None
    interfaces: tuple[str, ...] = ()
    dashboard: bool = False
    temp_root: str = "/tmp"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Spec:
        return cls(**{**value, "interfaces": tuple(value["interfaces"])})

    @property
    def address(self) -> str:
        """What RAY_ADDRESS is for the search."""
        return f"{self.head}:{self.port}"


def node_number(env: Mapping[str, str]) -> int:
    """Which of the nodes this is, as the launcher of its one task says. LaunchError if none does."""
    for name in NODE_NUMBERS:
        if env.get(name, "").isdecimal():
            return int(env[name])
    raise LaunchError(
        f"no launcher says which node this is: expected one of {', '.join(NODE_NUMBERS)}; start one "
        "task a node by srun, mpirun or mpiexec"
    )


@dataclass(frozen=True)
class Place:
    """One node. number 0 is the head; address: its own; folder: for Ray's sockets and logs there;
    client_port, dashboard_port: free ones, of the head."""

    number: int
    address: str
    folder: Path
    client_port: int = 0
    dashboard_port: int = 0

    @property
    def rays(self) -> Path:
        """Ray lets everybody write into its own folder: nobody else gets past the one above."""
        return self.folder / "r"


def command(spec: Spec, place: Place) -> list[str]:
    """``ray start`` by this interpreter; every port that is not given is the kernel's choice."""
    head = [
        *("--head", f"--port={spec.port}", "--no-monitor"),
        f"--include-dashboard={str(spec.dashboard).lower()}",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={place.dashboard_port}",
        *([f"--ray-client-server-port={place.client_port}"] if spec.dashboard else []),
    ]
    memory = [] if spec.memory_bytes is None else [f"--memory={spec.memory_bytes}"]
    return [
        *(sys.executable, "-P", "-c", WHOLE if spec.dashboard else BARE, "start", "--block"),
        *(head if place.number == 0 else [f"--address={spec.address}"]),
        f"--node-ip-address={place.address}",
        f"--num-cpus={spec.cpus}",
        f"--num-gpus={spec.gpus}",
        f"--object-store-memory={spec.object_store_bytes}",
        *memory,
        f"--temp-dir={place.rays}",
        *("--min-worker-port=0", "--max-worker-port=0", "--object-manager-port=0"),
        *("--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0"),
        *("--runtime-env-agent-port=0", "--metrics-export-port=0"),
        *("--include-log-monitor=false", "--log-style=record", "--log-color=false"),
    ]


def environment(spec: Spec, env: Mapping[str, str]) -> dict[str, str]:
    """Of Ray's processes, and so of the trials."""
    kept = {
        name: value for name, value in env.items() if name not in ("RAY_ADDRESS", knobs.LAUNCHED)
    }
    own = {**VARIABLES, "RAY_AUTH_TOKEN_PATH": spec.token}
    if env.get("PYTHONPATH"):  # workers run in other folders
        entries = (
            str(Path(entry).absolute()) for entry in env["PYTHONPATH"].split(os.pathsep) if entry
        )
        own["PYTHONPATH"] = os.pathsep.join(entries)
    if env.get(ROCR) and not env.get(HIP):
        own[HIP] = ",".join(map(str, range(len(env[ROCR].split(",")))))
    return {**kept, **own}


def place_of(spec: Spec, number: int, folder: Path) -> Place:
    """Of node `number`, which is this one. LaunchError if it cannot be what it is to be."""
    if number != 0:
        return Place(number, interface_of(spec.interfaces, spec.head)[1], folder)
    if spec.head not in addresses().values():
        raise LaunchError(
            f"Ray's head is to listen at {spec.head}, but this first node ({socket.gethostname()}) has "
            f"{', '.join(addresses().values())}: is it the node that the job's script runs on?"
        )
    missing = [name for name in DASHBOARD_NEEDS if importlib.util.find_spec(name) is None]
    if spec.dashboard and missing:
        raise LaunchError(
            f"Ray's dashboard needs {', '.join(missing)}: pip install 'ray[default]', or leave the "
            "dashboard out"
        )
    ports = free_port(spec.head, spec.port + 1), free_port(LOOPBACK, spec.port + 2)
    return Place(0, spec.head, folder, *ports)


def require_free(spec: Spec) -> None:
    """LaunchError if the head's port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((spec.head, spec.port))
        except OSError as error:
            raise LaunchError(f"Ray's head cannot listen at {spec.address}: {error}") from None


@contextmanager
def private_folder(root: str) -> Iterator[Path]:
    """A short folder of this node's own, locked while it is used: what a killed one left is removed
    by the next one, here or in a search of its own."""
    base = Path(root) if len(os.fsencode(root)) <= ROOT_BYTES else Path("/tmp")
    for old in base.glob(f"{PREFIX}*"):
        with suppress(OSError), (old / LOCK).open("r+") as handle:  # another's, or in use
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(mkdtemp(prefix=PREFIX, dir=base))  # 0700
    try:
        with (folder / "new").open("w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            (folder / "new").rename(folder / LOCK)  # it appears locked: nobody comes in between
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Stopped:
    """Set by the first of the signals that ask for an end."""

    def __init__(self) -> None:
        self._signal: int | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)

    def __bool__(self) -> bool:
        return self._signal is not None

    def _set(self, number: int, frame: FrameType | None) -> None:
        self._signal = number


_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def _die_with_the_parent() -> None:
    """In a child of ours: Ray's own daemons follow their starter in the same way."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def serve(spec: Spec, place: Place, stop: Stopped) -> None:
    """Run Ray on this node until `stop`. LaunchError, with the end of Ray's log, if it ends itself."""
    log = place.folder / "start.log"
    with log.open("wb") as output:
        started = subprocess.Popen(
            command(spec, place),
            env=environment(spec, os.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=_die_with_the_parent,
        )
        try:
            while started.poll() is None and not stop:
                time.sleep(POLL_S)
        finally:
            _end_all(started)
    if not stop:
        raise LaunchError(
            f"Ray on node {place.number} ({place.address}, {socket.gethostname()}) ended with exit code "
            f"{started.returncode}; its last words:\n{_last_words(place)}"
        )


def keep_joined(spec: Spec, place: Place, stop: Stopped) -> None:
    """`serve` on a node that joins; again if the head took it for dead, as after a network cut."""
    for attempt in range(JOINS):
        if stop:
            return
        try:
            serve(spec, place, stop)
            return
        except LaunchError as error:
            if attempt + 1 == JOINS or not (_head_listens(spec, stop) or stop):
                raise
            shutil.rmtree(place.rays, ignore_errors=True)
            sys.stderr.write(f"{error}\nRay's head is there: joining it again\n")


def _head_listens(spec: Spec, stop: Stopped) -> bool:
    """Whether the head can be reached within `REJOIN_S`."""
    end = time.monotonic() + REJOIN_S
    while not stop and time.monotonic() < end:
        try:
            socket.create_connection((spec.head, spec.port), 1.0).close()
        except OSError:
            time.sleep(POLL_S)
        else:
            return True
    return False


def _end_all(started: subprocess.Popen[bytes]) -> None:
    """Kill all that Ray has started here: what loses its parent becomes our child (subreaper)."""
    started.kill()
    started.wait()
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)


def _last_words(place: Place) -> str:
    """Of Ray's starter, then of what its servers wrote when they failed."""
    logs = place.rays / "session_latest" / "logs"
    files = [place.folder / "start.log", *sorted(logs.glob("*.err")), *logs.glob("gcs_server.out")]
    texts = (file.read_text(encoding="utf-8", errors="replace").splitlines() for file in files)
    return "\n".join(line for lines in texts for line in lines[-TAIL_LINES:] if line.strip())


def main(arguments: list[str]) -> int:
    """Exit code: 0 asked to end; 2 Ray does not run, with the reason on stderr."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    stop = Stopped()
    try:
        spec = Spec.from_json(json.loads(Path(arguments[0]).read_text(encoding="utf-8")))
        number = node_number(os.environ)
        with private_folder(spec.temp_root) as folder:
            place = place_of(spec, number, folder)
            if number == 0:
                require_free(spec)
                _tell_dashboard(spec, place)
                serve(spec, place, stop)
            else:
                keep_joined(spec, place, stop)
    except DMIError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_USER_ERROR
    return EXIT_OK


def _tell_dashboard(spec: Spec, place: Place) -> None:
    if spec.dashboard:
        port, host = place.dashboard_port, socket.gethostname()
        sys.stderr.write(
            f"Ray's dashboard: ssh -L {port}:{LOOPBACK}:{port} {host}, then http://{LOOPBACK}:{port} "
            f"(token: in {spec.token})\n"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
