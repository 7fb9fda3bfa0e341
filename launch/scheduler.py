"""What a batch system is asked and told, whichever it is: the only commands of it that are called.

Nothing here needs an accounting database.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from dmi_hpc.errors import LaunchError

Phase = Literal["queued", "running", "ending", "ended", "unknown"]

PATIENCE_S = 180.0  # a controller is restarted, or a backup takes over, within that time
CALL_S = 90.0  # of one command; Slurm's own retries take up to a minute
PAUSE_MAX_S = 15.0


class Unreachable(LaunchError):
    """The batch system has not answered in all the time it was given. It may have obeyed."""


@dataclass(frozen=True)
class JobState:
    """A job as the queue shows it. words: the scheduler's own state; reason: why it waits, "" if it
    does not; start: epoch seconds, expected while it waits, None if nobody knows."""

    job: str
    phase: Phase
    words: str
    reason: str = ""
    start: float | None = None
    nodes: int = 0


@dataclass(frozen=True)
class Details:
    """All about one job. end: epoch seconds when its time is over; nodes: their names, () while it
    waits. While the job still runs, as far as the scheduler says so: preempted: others get its nodes;
    requeued: it is on its way back into the queue; cancelled: by its user or an operator."""

    job: str
    phase: Phase
    words: str
    reason: str = ""
    end: float | None = None
    time_limit_s: float | None = None
    nodes: tuple[str, ...] = ()
    restarts: int = 0
    preempted: bool = False
    requeued: bool = False
    cancelled: bool = False


class Scheduler(Protocol):
    """All methods raise LaunchError with the scheduler's own words, and Unreachable if it is silent."""

    name: str

    def submit(
        self, script: Path, *, cwd: Path, after: str | None = None, array: str | None = None
    ) -> str:
        """The new job's id. after: begins when that job has ended, however; array: task numbers
        other than the script's. A job that can never start is taken back and raises LaunchError."""

    def states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        """Of those that the scheduler still knows; tasks of an array each under its own id."""

    def details(self, job: str) -> Details:
        """phase "unknown" if the scheduler has forgotten the job."""

    def cancel(self, job: str) -> None:
        """End it, or take it out of the queue; a job that has ended already is left alone."""

    def requeue(self, job: str) -> None:
        """Kill it and put it back into the queue under its id."""

    def release(self, job: str) -> None:
        """Let a job that is held after a requeue start when there is room. Not within the second of
        the requeue: Slurm's nodes would take it for the old one."""

    def lost(self, nodes: Sequence[str]) -> tuple[str, ...]:
        """Those of the nodes that are down or do not answer."""

    def hostnames(self, nodes: str) -> tuple[str, ...]:
        """From the scheduler's short form of a list of nodes, in its order."""


def scheduler_of(name: str, patience_s: float = PATIENCE_S) -> Scheduler:
    """ "slurm" or "pbs". patience_s: how long a batch system that does not answer is asked again."""
    if name == "slurm":
        from launch.slurm import Slurm

        return Slurm(patience_s)
    if name == "pbs":
        from launch.pbs import PBS

        return PBS(patience_s)
    raise LaunchError(f"no batch system is called '{name}'; known: slurm, pbs")


def job_argument(job: str) -> str:
    """A job id fit for a command line, also if it comes from a file. LaunchError if it is none."""
    if not re.fullmatch(r"\d[\w.\[\]-]*", job, re.ASCII):
        raise LaunchError(f"found {job!r}, expected the id of a job, such as 1234 or 1234_5")
    return job


@dataclass(frozen=True)
class Caller:
    """Calls one batch system's commands. silent: what it says when it could not be reached, as a
    regular expression; hints: what to do about a refusal, by a regular expression of its words."""

    patience_s: float
    silent: str
    hints: Mapping[str, str]
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __call__(
        self, *arguments: str, env: Mapping[str, str], cwd: Path | None = None, again: bool = True
    ) -> str:
        """What the command prints. again: ask once more if there was no answer, until the patience
        is over. LaunchError: refused, with its words; Unreachable: no answer."""
        until, pause = self.clock() + self.patience_s, 0.5
        while True:
            try:
                done = _run(arguments, env, cwd)
                if done.returncode == 0:
                    return done.stdout
                words = _words(done)
                if not re.search(self.silent, words):
                    raise LaunchError(self._refused(arguments[0], words))
            except subprocess.TimeoutExpired:
                words = f"no answer within {CALL_S:.0f} s"
            if not again or self.clock() + pause > until:
                raise Unreachable(
                    f"{arguments[0]}: {words}. The batch system does not answer: try again later"
                )
            if pause >= 4:
                sys.stderr.write(f"{arguments[0]}: {words}; asking again\n")
            self.sleep(pause)
            pause = min(2 * pause, PAUSE_MAX_S)

    def _refused(self, command: str, words: str) -> str:
        hints = [hint for pattern, hint in self.hints.items() if re.search(pattern, words, re.I)]
        return ". ".join([f"{command}: {words}".rstrip("."), *hints[:1]])


def _run(
    arguments: Sequence[str], env: Mapping[str, str], cwd: Path | None
) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            arguments,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=CALL_S,
            check=False,
        )
    except FileNotFoundError:
        if cwd is not None and not cwd.is_dir():
            raise LaunchError(f"{cwd}: no such folder, so no job can start there") from None
        raise LaunchError(
            f"{arguments[0]}: no such command here. Is this a login node of the machine? Load the batch "
            "system's module, or run on this machine without -N and -t"
        ) from None


def _words(done: subprocess.CompletedProcess[str]) -> str:
    """What a command that failed says, in one line, each thing once."""
    text = done.stderr.strip() or done.stdout.strip()
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line).strip() for line in text.splitlines()]
    said = "; ".join(dict.fromkeys(line for line in lines if line))
    return said or f"exit code {done.returncode}"
