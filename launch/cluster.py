"""READ FIRST: starts the ranks of a job on this machine and stands by them until all have ended.

The local twin of what MPI and Slurm will do: the same environment for every rank, the first failure
ends the others, signals are passed on. Only processes started here are ever ended.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import NoReturn

from dmi_hpc import knobs
from dmi_hpc.errors import EXIT_INTERRUPTED, LaunchError
from dmi_hpc.files import writing
from dmi_hpc.watch import StopFlag

GRACE_S = 30.0  # for a checkpoint after a signal, before a rank is killed
POLL_S = 0.1


@dataclass(frozen=True)
class Job:
    """A `dmi` command line to run as `ranks` processes; `logs` receives what ranks > 0 print."""

    arguments: tuple[str, ...]
    ranks: int
    logs: Path


def rank_environment(job: Job, rank: int, rendezvous: str) -> dict[str, str]:
    """What one rank finds in its environment, besides the launcher's own: its world, whole.

    Whatever world the launcher itself is in must not reach its ranks.
    """
    meant = {knobs.LAUNCHED: str(job.ranks)}
    if job.ranks == 1:
        return {**meant, knobs.WORLD: "single"}
    return {
        **meant,
        knobs.WORLD: "",
        "RANK": str(rank),
        "WORLD_SIZE": str(job.ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(job.ranks),
        knobs.RENDEZVOUS: rendezvous,
    }


def command_line(arguments: Sequence[str]) -> list[str]:
    """`dmi` by this very interpreter, its working folder kept off the import path."""
    return [sys.executable, "-P", "-m", "dmi_hpc", *arguments]


def run(job: Job, stop: StopFlag) -> None:
    """Run `job` to its end, or not at all if `stop` is set already.

    Raises LaunchError naming the rank that failed first and the end of its log, and
    SystemExit(75) if the job was stopped by a signal: the same call continues it.
    """
    if stop:
        _leave()
    with writing(job.logs.parent):
        job.logs.mkdir(parents=True, exist_ok=True)
    folder = Path(mkdtemp(prefix="dmi-job-"))
    try:
        processes = [_start(job, rank, f"file://{folder}/store") for rank in range(job.ranks)]
        try:
            failed = _wait(processes, stop)
        finally:
            _end(processes, signal.SIGKILL)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if failed is not None:
        raise LaunchError(_explain(job, failed, int(processes[failed].returncode)))
    if stop or EXIT_INTERRUPTED in (process.returncode for process in processes):
        _leave()


def _leave() -> NoReturn:
    sys.stderr.write("launch stopped: finished parts are kept; the same dmi launch continues\n")
    sys.exit(EXIT_INTERRUPTED)


def _start(job: Job, rank: int, rendezvous: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **rank_environment(job, rank, rendezvous)}
    command = command_line(job.arguments)
    # own session: a Ctrl-C of the terminal reaches the launcher alone, which passes it on once
    with (job.logs / f"rank-{rank}.log").open("ab") as log:
        output = None if rank == 0 else log
        return subprocess.Popen(
            command,
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_end_with_the_launcher,
        )


_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _end_with_the_launcher() -> None:
    """In the child: a launcher killed by kill -9 leaves SIGTERM to its ranks, so that they save."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _wait(processes: Sequence[subprocess.Popen[bytes]], stop: StopFlag) -> int | None:
    """Stand by until all have ended; returns the rank that failed first, None if none did.

    A failed rank, or a signal, ends the rest in good time.
    """
    deadline: float | None = None
    culprit: int | None = None
    while True:
        running = [process for process in processes if process.poll() is None]
        if culprit is None:
            culprit = _failed(processes, stop)
        if not running:
            return culprit
        if (stop or culprit is not None) and deadline is None:
            deadline = time.monotonic() + GRACE_S
            _end(processes, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            _end(processes, signal.SIGKILL)
        time.sleep(POLL_S)


def _failed(processes: Sequence[subprocess.Popen[bytes]], stop: StopFlag) -> int | None:
    """A rank that has failed; one that was killed first: the others fail because they miss it."""
    # a stage without anything to save ends by the signal itself
    fine = (None, 0, EXIT_INTERRUPTED, *((-signal.SIGTERM,) if stop else ()))
    failed = [rank for rank, p in enumerate(processes) if p.returncode not in fine]
    return min(failed, key=lambda rank: (processes[rank].returncode > 0, rank), default=None)


def _end(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)
            if number == signal.SIGKILL:
                process.wait()


def _explain(job: Job, rank: int, code: int) -> str:
    command = "dmi " + " ".join(job.arguments)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    log = job.logs / f"rank-{rank}.log"
    tail = ""
    if rank > 0 and log.exists():
        tail = f"; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-15:])
    return f"'{command}': rank {rank} of {job.ranks} {how}{tail}"
