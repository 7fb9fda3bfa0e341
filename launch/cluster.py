"""READ FIRST: starts the processes of a job and stands by them until all have ended.

On this machine these are the ranks themselves; in an allocation each is a launcher of ranks (srun,
mpirun). Everywhere alike: the first failure ends the others, signals are passed on. Only processes
started here are ever ended.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import NoReturn

from dmi_hpc import knobs
from dmi_hpc.errors import EXIT_INTERRUPTED, EXIT_RANK_LOST, LaunchError
from dmi_hpc.files import writing
from dmi_hpc.watch import StopFlag

GRACE_S = 30.0  # for a checkpoint after a signal, before a process is killed
POLL_S = 0.1
TAIL_LINES = 15  # of a log, in an error


class PartFailed(LaunchError):
    """code: of its process. lost: a rank or a node went, rather than that something is wrong."""

    def __init__(self, part: Part, code: int, others: Sequence[Part] = ()) -> None:
        """others: parts whose logs may say why."""
        super().__init__(_explain(part, code) + "".join(map(_tail, others)))
        self.code = code
        # by a signal, as srun and mpirun pass it on too
        self.lost = code == EXIT_RANK_LOST or code < 0 or code > 128


@dataclass(frozen=True)
class Command:
    """A `dmi` command line to run as `ranks` processes; `logs` receives what ranks > 0 print."""

    arguments: tuple[str, ...]
    ranks: int
    logs: Path


@dataclass(frozen=True)
class Part:
    """One process of a job.

    log: what it prints is appended there; None: it shares our output. helper: it serves the others
    and is ended once they have; if it ends before them, so must they. stop: how it is asked to end.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(repr=False)
    log: Path | None = None
    helper: bool = False
    stop: signal.Signals = signal.SIGTERM


def rank_environment(command: Command, rank: int, rendezvous: str) -> dict[str, str]:
    """What one rank finds in its environment, besides the launcher's own: its world, whole.

    Whatever world the launcher itself is in must not reach its ranks.
    """
    meant = {knobs.LAUNCHED: str(command.ranks), knobs.STARTER: ""}
    if command.ranks == 1:
        return {**meant, knobs.WORLD: "single"}
    return {
        **meant,
        knobs.WORLD: "",
        "RANK": str(rank),
        "WORLD_SIZE": str(command.ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(command.ranks),
        knobs.RENDEZVOUS: rendezvous,
    }


def command_line(arguments: Sequence[str]) -> list[str]:
    """`dmi` by this very interpreter, its working folder kept off the import path."""
    return [sys.executable, "-P", "-m", "dmi_hpc", *arguments]


def run(command: Command, stop: StopFlag) -> None:
    """Run `command` to its end on this machine, or not at all if `stop` is set already.

    Raises LaunchError naming the rank that failed first and the end of its log, and
    SystemExit(75) if the job was stopped by a signal: the same call continues it.
    """
    folder = Path(mkdtemp(prefix="dmi-job-"))
    try:
        parts = [_rank(command, rank, f"file://{folder}/store") for rank in range(command.ranks)]
        interrupted = stand_by(parts, stop)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if interrupted:
        leave()


def leave() -> NoReturn:
    sys.stderr.write("launch stopped: finished parts are kept; the same dmi launch continues\n")
    sys.exit(EXIT_INTERRUPTED)


def _rank(command: Command, rank: int, rendezvous: str) -> Part:
    return Part(
        f"'dmi {' '.join(command.arguments)}': rank {rank} of {command.ranks}",
        tuple(command_line(command.arguments)),
        {**os.environ, **rank_environment(command, rank, rendezvous)},
        command.logs / f"rank-{rank}.log" if rank else None,
    )


def stand_by(
    parts: Sequence[Part], stop: StopFlag, *, look: Callable[[], None] = lambda: None
) -> bool:
    """Start `parts` and wait until all have ended; True if they were stopped with all state saved.

    None is started if `stop` is set already. look: called all the while. Raises PartFailed naming
    the part that failed first, with the end of its log.
    """
    if stop:
        return True
    with _started(parts) as processes:
        failed = _wait(parts, processes, stop, look)
    if failed is not None:
        helpers = [part for part in parts if part.helper and part is not parts[failed]]
        raise PartFailed(parts[failed], int(processes[failed].returncode), helpers)
    needed = [p.returncode for part, p in zip(parts, processes, strict=True) if not part.helper]
    return bool(stop) or any(needed)


@contextmanager
def _started(parts: Sequence[Part]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The parts' processes; whatever happens in the block, none of them survives it."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.extend(_start(part) for part in parts)
        yield processes
    finally:
        _end(processes)


def _start(part: Part) -> subprocess.Popen[bytes]:
    log = part.log or Path(os.devnull)
    with writing(log.parent):
        log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        try:
            # own session: a Ctrl-C of the terminal reaches the launcher alone, which passes it on once
            return subprocess.Popen(
                part.command,
                env=part.environment,
                stdin=subprocess.DEVNULL,
                stdout=None if part.log is None else output,
                stderr=None if part.log is None else output,
                start_new_session=True,
                preexec_fn=partial(_end_with_the_launcher, part.stop),
            )
        except OSError as error:
            raise LaunchError(
                f"{part.name}: {part.command[0]} cannot be started: {error}"
            ) from error


_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _end_with_the_launcher(number: signal.Signals) -> None:
    """In the child: a launcher killed by kill -9 leaves a signal to its ranks, so that they save."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(number))


def _wait(
    parts: Sequence[Part],
    processes: Sequence[subprocess.Popen[bytes]],
    stop: StopFlag,
    look: Callable[[], None],
) -> int | None:
    """Stand by until all have ended; returns the part that failed first, None if none did.

    A failed part, or a signal, ends the rest in good time; helpers go when nobody needs them.
    """
    killed_at: dict[int, float] = {}  # of those that were asked to end
    culprit: int | None = None
    while True:
        look()
        running = [n for n, process in enumerate(processes) if process.poll() is None]
        needed = any(not parts[n].helper for n in running)
        if culprit is None:
            culprit = _failed(parts, processes, stop)
        if not running:
            return culprit
        left = any(parts[n].helper for n in range(len(parts)) if n not in running)
        now, ending = time.monotonic(), bool(stop) or culprit is not None or left
        for n in running:
            if n in killed_at:
                if now > killed_at[n]:
                    _end([processes[n]])
            elif not needed or (ending and not parts[n].helper):
                killed_at[n] = now + GRACE_S
                processes[n].send_signal(parts[n].stop)
        time.sleep(POLL_S)


def _failed(
    parts: Sequence[Part], processes: Sequence[subprocess.Popen[bytes]], stop: StopFlag
) -> int | None:
    """A part that has failed; one that was killed first: the others fail because they miss it."""
    codes = [process.returncode for process in processes]
    pairs = list(zip(parts, codes, strict=True))
    served = all(code is not None for part, code in pairs if not part.helper)
    # whoever is served goes down with it, in ways of its own: Ray ends its driver with code 1
    bereft = any(part.helper and (stop or code is not None) for part, code in pairs)
    # a stage without anything to save ends by the signal itself; srun says 128 + its number
    signals = (signal.SIGTERM, signal.SIGUSR1)
    ended = {*(-number for number in signals), *(128 + number for number in signals)}
    fine = {None, 0, EXIT_INTERRUPTED}
    failed = [
        n
        for n, (part, code) in enumerate(pairs)
        if not (served if part.helper else bereft)
        and code not in (fine | ended if stop or part.helper else fine)
    ]
    return min(failed, key=lambda n: ((codes[n] or 0) >= 0, n), default=None)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
            process.wait()


def _explain(part: Part, code: int) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"{part.name} {how}{_tail(part)}"


def _tail(part: Part) -> str:
    """The end of its log, if it has one and that says anything."""
    if part.log is None or not part.log.exists():
        return ""
    lines = part.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return f"; the end of {part.log}:\n" + "\n".join(lines) if lines else ""
