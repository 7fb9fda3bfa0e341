"""Processes that train one run after the other, each of them started once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path

from dmi_hpc.config import cores_per_rank
from dmi_hpc.data.workers import CONTEXT, die_with_parent
from dmi_hpc.errors import STOP_SIGNALS, DMIError, Interrupted, TrialFailure
from dmi_hpc.study.plan import Member
from dmi_hpc.watch import StopFlag

POLL_S = 0.2  # between looks at the stop flag


@dataclass(frozen=True)
class Work:
    """One training and its evaluation; baselines: beside the network, on the same rows."""

    member: Member
    baselines: bool


@dataclass(frozen=True)
class Outcome:
    """How it ended: "done", "failed" (with the reason) or "interrupted"."""

    state: str
    reason: str = ""


@dataclass
class _Slot:
    process: SpawnProcess
    connection: Connection
    work: Work | None = None


def run_all(
    works: Sequence[Work],
    processes: int,
    log: Path,
    stop: StopFlag,
    told: Callable[[Work, Outcome], None],
) -> None:
    """Do all works, `processes` at a time; `told` of each as it ends. What they say goes to `log`.

    A stop is handed on to the processes, which save what they have; nothing new begins then, nor
    after a training that saw its time end (Slurm's, or its recipe's).
    """
    waiting, slots = list(works), list[_Slot]()
    asked = over = False
    with _threads_shared(processes):
        try:
            while waiting or any(slot.work for slot in slots):
                if (stop or over) and not asked:
                    asked, waiting = True, []
                    for slot in slots:
                        slot.process.terminate()
                while waiting and len(slots) < processes:
                    slots.append(_started(log))
                for slot in slots:
                    if slot.work is None and waiting:
                        slot.work = waiting.pop(0)
                        slot.connection.send(slot.work)
                ready = wait([slot.connection for slot in slots if slot.work], POLL_S)
                for slot in [slot for slot in slots if slot.connection in ready]:
                    outcome = _received(slot, asked)
                    assert slot.work is not None, "only slots at work are waited for"
                    told(slot.work, outcome)
                    slot.work = None
                    over = over or outcome.state == "interrupted"
                    if not slot.process.is_alive():
                        slots.remove(slot)
        finally:
            for slot in slots:
                slot.connection.close()  # it ends when it hears of it
            for slot in slots:
                slot.process.join()


def _received(slot: _Slot, asked: bool) -> Outcome:
    try:
        outcome: Outcome = slot.connection.recv()
    except (EOFError, ConnectionResetError):
        slot.process.join()
        code = slot.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return Outcome("interrupted" if asked else "failed", f"its process ended: {how}")
    if outcome.state == "interrupted":
        slot.process.join()  # it takes no more work
    return outcome


def _started(log: Path) -> _Slot:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_serve, args=(theirs, log), daemon=True)
    process.start()
    theirs.close()
    return _Slot(process, ours)


@contextmanager
def _threads_shared(processes: int) -> Iterator[None]:
    """Spawned children read the variable when they load torch; a user's own value stays."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(cores_per_rank(processes))
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _serve(connection: Connection, log: Path) -> None:
    """In a process of its own: work after work, until the other side is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hand on
    threading.Thread(target=die_with_parent, daemon=True).start()
    with log.open("ab", buffering=0) as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    while True:
        try:
            work = connection.recv()
        except EOFError:
            return
        outcome = _done(work)
        with _unhurried():
            connection.send(outcome)
        if outcome.state == "interrupted":
            return


@contextmanager
def _unhurried() -> Iterator[None]:
    """A stop signal that comes now finds nothing to save."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _done(work: Work) -> Outcome:
    from dmi_hpc.assess import assess
    from dmi_hpc.cli.train import train_alone
    from dmi_hpc.run import open_run

    member = work.member
    try:
        run = open_run(member.folder, member.recipe)
        train_alone(run)
        assess(run, "test", network_only=not work.baselines)
    except Interrupted as error:
        return Outcome("interrupted", str(error))
    except TrialFailure as error:
        return Outcome("failed", f"{error.kind}: {error.message}")
    except DMIError as error:
        return Outcome("failed", str(error))
    return Outcome("done")
