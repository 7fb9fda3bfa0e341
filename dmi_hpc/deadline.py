"""When a training must stop: at a signal, or early enough before its time is over.

Pure: who asks says what time it is. What is kept for the end is measured, not guessed: the longest
checkpoint so far (twice), and the longest time between two questions, for nobody stops in between.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from dmi_hpc import knobs
from dmi_hpc.errors import Interrupted, LaunchError

SLURM_END = "SLURM_JOB_END_TIME"

# Kept besides what was measured: to close files and end the processes, and for the scheduler's clock.
FLOOR_S = 10.0
# A checkpoint can take twice the longest so far: others write to the same file system.
CHECKPOINTS = 2.0
BEFORE_THE_FIRST_STEP = "stopped by {} before the first step, no checkpoint was touched"


class Signal(Protocol):
    """What `watch.StopFlag` is: the first stop signal that came, or None."""

    signal: int | None


def heed(flag: Signal, share: Callable[[int | None], list[int | None]]) -> None:
    """Raises Interrupted, on all ranks, if a stop signal has come to one before the first step.

    share: from a rank's value to those of all ranks, in order, on every rank.
    """
    came = next((number for number in share(flag.signal) if number is not None), None)
    if came is not None:
        raise Interrupted(BEFORE_THE_FIRST_STEP.format(signal.Signals(came).name))


@dataclass(frozen=True)
class End:
    """When the time is over, in epoch seconds, and who says so."""

    at: float
    source: str


def end_of(env: Mapping[str, str], time_limit_s: float | None, now: float) -> End | None:
    """The earliest one of the job's end, as Slurm or `dmi launch` say it, and of `time_limit_s` from
    `now`; None without any.

    An end of a job that is past already is another job's (an old shell): it says nothing.
    Raises LaunchError if SLURM_JOB_END_TIME or DMI_END_TIME is not a number of seconds.
    """
    ends = [] if time_limit_s is None else [End(now + time_limit_s, "time_limit_s")]
    for name, who in ((SLURM_END, "Slurm"), (knobs.END, "dmi launch")):
        text = env.get(name, "")
        if text and not text.isdecimal():
            raise LaunchError(
                f"{name}: found {text!r}, expected seconds since 1970, as {who} sets it; unset it if "
                "this is no job of a batch system"
            )
        if text and int(text) > now:
            ends.append(End(float(text), name))
    return min(ends, key=lambda end: end.at, default=None)


class Deadline:
    """One rank's answer to: must the training stop now? Any rank's yes counts for all."""

    def __init__(self, flag: Signal, end: End | None) -> None:
        self._flag, self._end = flag, end
        self._checkpoint_s = self._between_s = 0.0
        self._asked: float | None = None

    def wrote(self, seconds: float) -> None:
        """A checkpoint took so long, until it was whole on disk."""
        self._checkpoint_s = max(self._checkpoint_s, seconds)

    @property
    def margin_s(self) -> float:
        """Kept for the end: a checkpoint, and whatever passes until the next question."""
        return FLOOR_S + CHECKPOINTS * self._checkpoint_s + self._between_s

    def must_stop(self, now: float) -> str | None:
        """Why to save and stop now, at epoch seconds `now`; None to go on.

        Asked at the same places on all ranks, every few steps and after each epoch.
        """
        if self._asked is not None:
            self._between_s = max(self._between_s, now - self._asked)
        self._asked = now
        if self._flag.signal is not None:
            return signal.Signals(self._flag.signal).name
        if self._end is None or now + self.margin_s < self._end.at:
            return None
        at = datetime.fromtimestamp(self._end.at).strftime("%H:%M:%S")
        return (
            f"the time is over at {at} ({self._end.source}), {self.margin_s:.0f} s are kept for a "
            "checkpoint"
        )
