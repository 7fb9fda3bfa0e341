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
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from types import FrameType

import psutil

from dmi_hpc.errors import EXIT_OK, EXIT_USER_ERROR, STOP_SIGNALS, DMIError, LaunchError
from launch.network import LOOPBACK, addresses, free_port, interface_of
from launch.ray_start import Place, Spec, command, environment, node_number

__all__ = ["Spec", "main"]

PREFIX, LOCK = "dmi-ray-", "lock"  # of temporary folders, as in search.cluster.environment
# Ray's sockets below it (/session_2026-01-31_23-59-59_123456_PID/sockets/plasma_store) have at most
# 107 bytes, those of AF_UNIX
ROOT_BYTES = 107 - 65 - len(PREFIX) - 9 - 2
DASHBOARD_NEEDS = ("aiohttp_cors", "opencensus", "prometheus_client")  # of ray[default]
JOINS = 3  # attempts of a node
REJOIN_S = 120.0  # for the head to be reachable again
KILLED_S = 5.0  # until a killed process is gone; one that hangs in the kernel is left to it
POLL_S = 0.1
TAIL_LINES = 12
# an error in a log of Ray's servers: "[2026-01-31 23:59:59,123 E 12 34] ..."
SEVERE = re.compile(r"\[\S+ \S+ [ECF] ")


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
        said, why = _last_words(place), f"Ray on node {place.number} ({place.address})"
        raise LaunchError(
            f"{why} ended with exit code {started.returncode}: {said[0]}\nIts last words:\n"
            + "\n".join(said[1:])
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
    end = time.monotonic() + KILLED_S
    while (left := psutil.Process().children(recursive=True)) and time.monotonic() < end:
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)


def _last_words(place: Place) -> list[str]:
    """The last line of Ray's starter; then the end of what it said, and errors of Ray's servers."""
    logs = place.rays / "session_latest" / "logs"
    lines = _lines(place.folder / "start.log") or ["nothing"]
    errors = [
        line
        for file in sorted(
            (*logs.glob("*.err"), *logs.glob("gcs_server.out"), *logs.glob("raylet.out"))
        )
        for line in _lines(file)
        if file.suffix == ".err" or SEVERE.match(line)
    ]
    return [lines[-1], *lines[-TAIL_LINES:-1], *errors[-TAIL_LINES:]]


def _lines(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_spec(file: Path) -> Spec:
    """LaunchError if this node cannot read it, or the token."""
    try:
        spec = Spec.from_json(json.loads(file.read_text(encoding="utf-8")))
        Path(spec.token).read_bytes()
    except OSError as error:
        raise LaunchError(
            f"{error.filename}: cannot be read on {socket.gethostname()} ({error.strerror}): the run "
            "folder must lie where all nodes of the job see it"
        ) from None
    return spec


def main(arguments: list[str]) -> int:
    """Exit code: 0 asked to end; 2 Ray does not run, with the reason on stderr."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    stop = Stopped()
    try:
        spec = read_spec(Path(arguments[0]))
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
