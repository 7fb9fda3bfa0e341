"""What `mini_slurm` does to this machine: processes, namespaces, numbers that no other cluster has.

As a program it is process 1 of a virtual node.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

COMMANDS = ("slurmctld", "slurmd", "munged", "sinfo", "sbatch", "unshare", "setpriv", "ip")
LIMIT_S = 30.0
INDICES = 32
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def missing() -> str | None:
    """Why there can be no Slurm here; None: there can."""
    lacking = [name for name in COMMANDS if shutil.which(name, path=path_with_daemons()) is None]
    return f"no Slurm on this machine: {', '.join(lacking)} not found" if lacking else None


@cache
def mode() -> str:
    """ "netns" where namespaces and bridges are allowed, else "ports"."""
    if os.geteuid() != 0:
        return "ports"
    bridge = f"dmi{os.getpid()}"
    new = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc")
    if tried(*new, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm") and tried(
        "ip", "link", "add", bridge, "type", "bridge"
    ):
        tried("ip", "link", "del", bridge)
        return "netns"
    return "ports"


class Daemon:
    """A process that ends with this one (more exactly: with the thread that started it)."""

    def __init__(self, command: list[str], env: Mapping[str, str], log: Path) -> None:
        self._command, self._env, self._log = command, env, log
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env,
                cwd="/",
                start_new_session=True,
            )

    @property
    def lives(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def end(self, number: signal.Signals) -> None:
        """Signal it and wait; killed after 10 s."""
        if self.process is None:
            return
        self.process.send_signal(number)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.process = None


def until(condition: Callable[[], bool], why: str, limit_s: float = LIMIT_S) -> None:
    """Poll; RuntimeError(why) after limit_s."""
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"waited {limit_s:g} s: {why}")
        time.sleep(0.1)


def init(node: str, root: Path, address: str) -> None:
    """Process 1 of a virtual node: its names, network and memory, then slurmd; reaps its orphans."""
    socket.sethostname(node)
    must("mount", "--make-rprivate", "/")
    for name in ("hosts", "resolv.conf"):  # without name servers, which do not answer from here
        must("mount", "--bind", str(root / name), f"/etc/{name}")
    must("mount", "-t", "tmpfs", "-o", "mode=1777,size=2g", "tmpfs", "/dev/shm")
    until(lambda: "eth0" in dict(map(reversed, socket.if_nameindex())), "no network")
    must("ip", "addr", "add", f"{address}/24", "dev", "eth0")
    must("ip", "link", "set", "lo", "up")
    must("ip", "link", "set", "eth0", "up")
    must("ip", "route", "add", "default", "via", f"{address.rpartition('.')[0]}.254")
    slurmd = subprocess.Popen(["slurmd", "-D", "-N", node])
    while os.wait()[0] != slurmd.pid:
        pass


def path_with_daemons() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:{SBIN}"


def short_name() -> str:
    return socket.gethostname().partition(".")[0]


def tried(*command: str) -> bool:
    done = subprocess.run(command, capture_output=True, env={"PATH": path_with_daemons()})
    return done.returncode == 0


def must(*command: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": path_with_daemons()}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def complete_pmix() -> None:
    """srun --mpi=pmix opens a name that Debian ships with the headers only."""
    for library in Path("/usr/lib").glob("*/pmix2/lib/libpmix.so.2"):
        name = library.with_suffix("")
        if os.geteuid() == 0 and not name.exists():
            with suppress(FileExistsError):  # another cluster was faster
                name.symlink_to(library.name)


def claimed(root: Path) -> tuple[int, int]:
    """(a number that no living cluster has, its lock); what a killed one left behind is removed."""
    folder = Path(tempfile.gettempdir()) / f"mini-slurm-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    for index in range(1, INDICES):
        lock = os.open(folder / str(index), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        before = os.pread(lock, 4096, 0).decode()
        tidy(index, Path(before) if before else root)
        os.ftruncate(lock, 0)
        os.pwrite(lock, os.fsencode(root), 0)
        # other users' clusters have other ports
        return index + (0 if os.geteuid() == 0 else INDICES + os.geteuid() % 64), lock
    raise RuntimeError(f"{INDICES} clusters are running already: {folder}")


def tidy(index: int, root: Path) -> None:
    """What outlives the processes of a cluster."""
    kill_steps(root)
    if os.geteuid() == 0:
        tried("ip", "link", "del", f"dmi{index}br")
        for user in pwd.getpwall():
            if user.pw_name.startswith(f"dmi{index}u"):
                tried("userdel", user.pw_name)


def kill_steps(root: Path, node: str | None = None) -> None:
    """In mode "ports" a job outlives its daemon: it is known by its environment."""
    conf = f"SLURM_CONF={root / 'slurm.conf'}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (folder / "environ").read_bytes().split(b"\0")
            named = [word for word in words if word.startswith(b"SLURMD_NODENAME=")]
            if conf in words and named and node in (None, named[0].partition(b"=")[2].decode()):
                os.kill(int(folder.name), signal.SIGKILL)


if __name__ == "__main__":
    init(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
