"""The processes of each stage in an allocation: launchers of ranks, Ray's nodes beside the search."""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dmi_hpc import knobs
from dmi_hpc.config import Recipe
from dmi_hpc.files import write_text
from dmi_hpc.watch import StopFlag
from launch.allocation import Allocation
from launch.check import Report, mpi_command, rank_command, records, run_check, storage_of
from launch.cluster import Part, command_line
from launch.job import Job
from launch.network import free_port, interface_of
from launch.preflight.findings import Expected
from launch.ray_node import Spec
from launch.stages import arguments_of
from launch.steps import Meeting, Step, command_of, per_node, rank_step, step_environment

# srun and mpirun pass it on to their tasks; a SIGTERM makes srun kill them at once
ASK = signal.SIGUSR1
# a process that is a world of its own, and leaves it to us to say how the job goes on
ALONE = {knobs.WORLD: "single", knobs.LAUNCHED: "1"}
OBJECT_STORE_BYTES = 100_000_000  # networks and data never pass through Ray's object store


def island_of(allocation: Allocation, job: Job) -> str:
    """Which island of a search this job of an array is; "" without islands."""
    return f"island-{allocation.task}" if job.islands else ""


def session_folder(job: Job, allocation: Allocation) -> Path:
    """For files that the nodes of this session read, and nobody else."""
    return job.out / "launch" / "sessions" / f"{allocation.job}.{allocation.restart}"


@dataclass(frozen=True)
class Parts:
    """Of the stages of `job`. ends: epoch seconds by which they must have stopped; None: no end."""

    job: Job
    recipe: Recipe | None  # a check needs none
    allocation: Allocation
    ends: float | None

    def of(self, stage: str) -> list[Part]:
        """The processes of a stage, to be started together."""
        env, job, nodes = self._environment(), self.job, len(self.allocation.nodes)
        island = island_of(self.allocation, job)
        extra = job.extra if stage == job.stage else ()
        arguments = arguments_of(stage, job.recipe, job.out, island=island, extra=extra)
        command = tuple(command_line(arguments))
        match stage:
            case "search":
                return self._search(command, env)
            case "train":
                size = per_node(self._ranks_wanted(), nodes, self.allocation.gpus or 1)
                step = rank_step(command, size, self.allocation, self._meeting(stage))
            case "data":
                step = Step(command, nodes, 1, self.allocation.cpus, "mpi")
            case _:
                return [Part(f"dmi {stage}", command, {**env, **ALONE})]
        name = f"dmi {stage} ({step.size} tasks on {step.nodes} nodes)"
        return [Part(name, self._on_nodes(step, env), env, stop=ASK)]

    def on_each_node(self, name: str, command: tuple[str, ...]) -> Part:
        """One task a node, of which each may fail alone."""
        env = self._environment()
        step = Step(command, len(self.allocation.nodes), 1, self.allocation.cpus, "nodes")
        return Part(name, self._on_nodes(step, env), env, stop=ASK)

    def _ranks_wanted(self) -> int | None:
        said = "auto" if self.recipe is None else self.recipe.launch.ranks
        return self.job.ranks if self.job.ranks is not None or said == "auto" else said

    def _on_nodes(self, step: Step, env: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(command_of(step, self.allocation, self.job.machine, env))

    def _environment(self) -> dict[str, str]:
        """Of every process: the machine's variables, and when it must have stopped."""
        machine = {k: os.path.expandvars(v) for k, v in self.job.machine.environment.items()}
        env = step_environment({**machine, **os.environ}, root=os.geteuid() == 0)
        env.pop(knobs.LAUNCHED, None)
        # an environment that nobody activated may bring its own mpirun; a module's comes first
        env["PATH"] = os.pathsep.join(
            [env.get("PATH", os.defpath), str(Path(sys.executable).parent)]
        )
        if self.ends is not None:
            env[knobs.END] = str(int(self.ends))
        return env

    def _meeting(self, name: str) -> Meeting:
        """Where ranks meet: at this node, which is the first one."""
        wanted = self.job.machine.interfaces
        _, address = interface_of(wanted, None)
        seed = zlib.crc32(f"{self.allocation.job}.{self.allocation.restart}.{name}".encode())
        return Meeting(f"{address}:{free_port(address, seed)}", wanted)

    def _search(self, command: tuple[str, ...], env: dict[str, str]) -> list[Part]:
        """Ray on every node, and beside it the search, which waits for them: at the same moment."""
        folder, nodes = session_folder(self.job, self.allocation), len(self.allocation.nodes)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        token, file = folder / "ray.token", folder / "ray.json"
        _write_private(token, secrets.token_hex(32))
        address = self._meeting("ray").address
        head, _, port = address.rpartition(":")
        spec = Spec(
            head=head,
            port=int(port),
            nodes=nodes,
            cpus=self.allocation.cpus,
            gpus=self.allocation.gpus,
            object_store_bytes=OBJECT_STORE_BYTES,
            interfaces=self.job.machine.interfaces,
            token=str(token),
            dashboard=self.job.dashboard,
        )
        _write_private(file, json.dumps(spec.to_json()))
        node = (sys.executable, "-P", "-m", "launch.ray_node", str(file))
        step = Step(node, nodes, 1, self.allocation.cpus, "nodes")
        ray = {
            "RAY_ADDRESS": address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "GRPC_DNS_RESOLVER": "native",
            knobs.RAY_NODES: str(nodes),
            **ALONE,
        }
        log = self.job.out / "logs" / f"ray-{self.allocation.job}.log"
        return [
            Part("Ray on the nodes", self._on_nodes(step, env), env, log, True, ASK),
            Part("dmi search", command, {**env, **ray}),
        ]

    def check(self, stop: StopFlag) -> Report:
        """Run the preflight on every node and judge it."""
        machine, allocation, env = self.job.machine, self.allocation, self._environment()
        nodes = len(allocation.nodes)
        with records(self.job.out / "launch") as folder:
            cuda = allocation.gpus > 0 and machine.gpu in ("nvidia", "amd")
            command = rank_command(folder, storage_of(machine.node_storage, os.environ), cuda=cuda)
            ranks = rank_step(command, (nodes, 1), allocation, self._meeting("check"))
            # not as ranks: those may be shown one GPU each, and one that fails would end the others
            steps = [replace(ranks, kind="nodes")]
            if machine.mpi or machine.launcher == "mpirun":
                mpi = Step(mpi_command(folder), nodes, 1, allocation.cpus, "mpi")
                steps.insert(0, mpi)
            parts = [[Part("dmi launch check", self._on_nodes(s, env), env)] for s in steps]
            expected = Expected(allocation.nodes, allocation.gpus, allocation.cpus, len(steps) == 2)
            return run_check(parts, folder, expected, stop)


def _write_private(path: Path, text: str) -> None:
    """Nobody but this user can read it, at any moment."""
    mask = os.umask(0o077)
    try:
        write_text(path, text)
    finally:
        os.umask(mask)
