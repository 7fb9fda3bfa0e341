"""What Ray is started with on one node of an allocation: options and environment. Pure."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmi_hpc import knobs
from dmi_hpc.errors import LaunchError
from launch.gpus import hip_devices
from launch.network import LOOPBACK

# by preference: mpirun inside Slurm starts its own helpers by srun, whose numbers are not its ranks'
NODE_NUMBERS = ("OMPI_COMM_WORLD_RANK", "PALS_NODEID", "PALS_RANKID", "PMI_RANK", "SLURM_NODEID")
# `ray start` of an installation without grpcio: a server for ray:// clients less, on the head, and
# less of an agent on every node, which would show its figures on all interfaces without a token
BARE = "import sys; sys.modules['grpc'] = None; from ray.scripts.scripts import main; main()"
WHOLE = "from ray.scripts.scripts import main; main()"
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
    return {**kept, **own, **hip_devices(env)}
