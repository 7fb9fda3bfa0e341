"""A real Slurm of several virtual nodes on this machine, for tests; several may run side by side.

As root each node has its own network (10.78.I.K), host name, processes and /dev/shm ("netns"); where
that is not allowed, and for other users, nodes are daemons on ports of their own ("ports"). All end with
the process that started them, however that ends.

    python tests/support/mini_slurm.py --root DIR --nodes 4     # until Ctrl-C
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import slurm_host
from slurm_host import (
    Daemon,
    children,
    claimed,
    complete_pmix,
    kill_steps,
    missing,
    mode,
    must,
    path_with_daemons,
    short_name,
    tidy,
    until,
)

FOREIGN = ("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_", "RAY_", "OMPI_", "PMIX_")
CONF = """\
ClusterName=mini{index}
SlurmctldHost={host}({controller})
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
TmpFS={root}/tmp/%n
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=3
SlurmctldTimeout=30
SlurmdTimeout={slurmd_timeout_s}
MessageTimeout=5
TCPTimeout=2
KillWait={kill_wait_s}
UnkillableStepTimeout=30
InactiveLimit=0
MinJobAge=3600
CompleteWait=0
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=lowgrace Nodes=ALL MaxTime=INFINITE DefaultTime=30 State=UP PriorityTier=0 GraceTime=20
"""


@dataclass(frozen=True)
class Settings:
    """cpus: of a node, claimed, not looked up; kill_wait_s: from SIGTERM to SIGKILL; slurmd_timeout_s:
    until a silent node counts as lost; users: throw-away ones to make (as root)."""

    nodes: int = 4
    cpus: int = 2
    kill_wait_s: int = 10
    slurmd_timeout_s: int = 15
    users: int = 0


class Node:
    """One virtual node."""

    def __init__(self, slurm: MiniSlurm, number: int) -> None:
        self.name, self._slurm, self._number = f"node{number}", slurm, number
        self._veth = f"dmi{slurm.index}n{number}"
        slurmd = ["slurmd", "-D", "-N", self.name]
        if slurm.mode == "netns":
            apart = ("--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child")
            here = [sys.executable, "-P", "-s", str(Path(slurm_host.__file__).resolve()), self.name]
            here += [str(slurm.root), slurm.address(number)]
            slurmd = ["unshare", *apart, "--mount-proc", *here]
        self._daemon = Daemon(slurmd, slurm.env, slurm.root / f"{self.name}.out")

    def start(self) -> None:
        """Power on; nothing if it is."""
        if self._daemon.lives:
            return
        self._daemon.start()
        process = self._daemon.process
        if self._slurm.mode != "netns" or process is None:
            return
        own = Path("/proc/self/ns/net").readlink()
        theirs = Path(f"/proc/{process.pid}/ns/net")
        until(lambda: theirs.readlink() != own, f"{self.name} has no network of its own")
        pair = ("type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        must("ip", "link", "add", self._veth, *pair)
        must("ip", "link", "set", self._veth, "master", self._slurm.bridge, "up")

    def crash(self) -> None:
        """Power failure: everything on it is killed at once."""
        if self._slurm.mode == "netns" and self._daemon.process is not None:
            inner = children(self._daemon.process.pid)
            for pid in inner:
                os.kill(pid, signal.SIGKILL)
            self._daemon.process.wait(10)
        self._daemon.end(signal.SIGKILL)
        if self._slurm.mode != "netns":
            kill_steps(self._slurm.root, self.name)

    def netdown(self) -> None:
        """Pull its network cable ("netns" only)."""
        must("ip", "link", "set", self._veth, "down")

    def netup(self) -> None:
        must("ip", "link", "set", self._veth, "up")


class MiniSlurm:
    """A running cluster; a context manager. RuntimeError if it does not come up within 30 s.

    env: for the processes of users; bin: folder of fake commands may be put before its PATH.
    """

    def __init__(self, root: Path | None = None, settings: Settings = Settings()) -> None:
        if (why := missing()) is not None:
            raise RuntimeError(why)
        self.settings, self.mode = settings, mode()
        self._own = root is None
        self.root = Path(tempfile.mkdtemp(prefix="mini-slurm-")) if root is None else root.resolve()
        self.users: tuple[str, ...] = ()
        self.index, self._lock = claimed(self.root)
        self.bridge = f"dmi{self.index}br"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        self.env = {
            **clean,
            "PATH": path_with_daemons(),
            "SLURM_CONF": str(self.root / "slurm.conf"),
        }
        self._munged = Daemon(self._munge(), self.env, self.root / "munged.out")
        self.controller = Daemon(["slurmctld", "-D"], self.env, self.root / "slurmctld.out")
        self._nodes = [Node(self, k + 1) for k in range(settings.nodes)]

    def __enter__(self) -> MiniSlurm:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def node(self, number: int) -> Node:
        """The first is 1."""
        return self._nodes[number - 1]

    def address(self, number: int) -> str:
        """Of a node; 254: of the controller."""
        return f"10.78.{self.index}.{number}" if self.mode == "netns" else "127.0.0.1"

    def run(
        self,
        *argv: object,
        user: str | None = None,
        check: bool = True,
        timeout: float = 60,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command on the login side, e.g. run("squeue"); env: on top of the cluster's."""
        own = {} if user is None else {"HOME": str(self.root / "home" / user), "USER": user}
        done = subprocess.run(
            [str(word) for word in argv],
            env={**self.env, **own, **(env or {})},
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
            timeout=timeout,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        if check and done.returncode:
            raise RuntimeError(f"{argv}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def state(self, job: object) -> str:
        """Slurm's word for the state of a job, e.g. RUNNING; '' of one that it has forgotten."""
        done = self.run("squeue", "-h", "-t", "all", "-o", "%T", "-j", job, check=False)
        return done.stdout.strip().partition("\n")[0]

    def idle(self) -> int:
        """How many nodes wait for work."""
        found = self.run("sinfo", "-h", "-N", "-p", "debug", "-t", "idle", "-o", "%N", check=False)
        return len(found.stdout.split())

    def skip_hold(self, job: object) -> None:
        """Start a requeued job soon, which Slurm would hold for 120 s; within the second of its requeue
        nodes refuse it ("Job credential revoked")."""
        self.run("scontrol", "update", f"jobid={job}", "StartTime=now+2", check=False)

    def restart_controller(self, pause_s: float = 2.0) -> None:
        self.controller.end(signal.SIGTERM)
        time.sleep(pause_s)
        self.controller.start()
        until(lambda: self.run("scontrol", "ping", check=False).returncode == 0, "no slurmctld")

    def heal(self) -> None:
        """No job is left, and all nodes are idle."""
        for state in ("PENDING", "RUNNING", "SUSPENDED"):
            self.run("scancel", f"--state={state}", "--quiet", check=False)
        for node in self._nodes:
            node.start()
        until(lambda: self.idle() == self.settings.nodes, f"not all nodes are idle: {self.root}")

    def close(self) -> None:
        """End everything and remove what was made."""
        for node in self._nodes:
            node.crash()
        self.controller.end(signal.SIGKILL)
        self._munged.end(signal.SIGKILL)
        tidy(self.index, self.root)
        os.close(self._lock)
        if self._own:
            shutil.rmtree(self.root, ignore_errors=True)

    def _munge(self) -> list[str]:
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        words = [f"--{option}={self.root / name}" for option, name in files.items()]
        return ["munged", "--foreground", "--force", *words]

    def _start(self) -> None:
        complete_pmix()
        self._write()
        for number in range(self.settings.users):
            self._add_user(f"dmi{self.index}u{number + 1}")
        if self.mode == "netns":
            must("ip", "link", "add", self.bridge, "type", "bridge")
            must("ip", "addr", "add", f"{self.address(254)}/24", "dev", self.bridge)
            must("ip", "link", "set", self.bridge, "up")
        self._munged.start()
        until((self.root / "munge.sock").exists, "munged does not start")
        self.controller.start()
        until(lambda: self.run("scontrol", "ping", check=False).returncode == 0, "no slurmctld")
        for node in self._nodes:
            node.start()
        until(lambda: self.idle() == self.settings.nodes, f"not all nodes came up: {self.root}")

    def _write(self) -> None:
        for name in ("state", "tmp", "home"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self.root.chmod(0o755)
        lines, hosts = [], ["127.0.0.1 localhost", f"{self.address(254)} {socket.gethostname()}"]
        for number in range(1, self.settings.nodes + 1):
            (self.root / "spool" / f"node{number}").mkdir(parents=True, exist_ok=True)
            (self.root / "tmp" / f"node{number}").mkdir(exist_ok=True)
            (self.root / "tmp" / f"node{number}").chmod(0o1777)
            apart = self.mode == "netns"
            host = f"node{number}" if apart else short_name()
            port = 17000 if apart else 17000 + 64 * self.index + number
            lines.append(
                f"NodeName=node{number} NodeAddr={self.address(number)} NodeHostname={host} "
                f"Port={port} CPUs={self.settings.cpus} RealMemory=4000 State=UNKNOWN"
            )
            hosts.append(f"{self.address(number)} node{number}")
        conf = CONF.format(
            index=self.index,
            host=short_name(),
            controller=self.address(254),
            port=16900 + self.index,
            root=self.root,
            user=pwd.getpwuid(os.geteuid()).pw_name,
            nodes="\n".join(lines),
            kill_wait_s=self.settings.kill_wait_s,
            slurmd_timeout_s=self.settings.slurmd_timeout_s,
        )
        (self.root / "slurm.conf").write_text(conf)
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")
        (self.root / "resolv.conf").touch()
        key = self.root / "munge.key"
        key.unlink(missing_ok=True)
        with open(key, "wb", opener=lambda path, flags: os.open(path, flags, 0o400)) as stream:
            stream.write(os.urandom(1024))

    def _add_user(self, name: str) -> None:
        home = self.root / "home" / name
        must("useradd", "--create-home", "--home-dir", str(home), "--shell", "/bin/bash", name)
        self.users += (name,)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--users", type=int, default=0)
    given = parser.parse_args()
    settings = Settings(nodes=given.nodes, cpus=given.cpus, users=given.users)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with MiniSlurm(given.root, settings) as slurm, suppress(KeyboardInterrupt):
        sys.stdout.write(f"export SLURM_CONF={slurm.root / 'slurm.conf'}  # {slurm.mode}\n")
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    main()
