"""How far a trial is trained, and what ends it before: its time limit, a rung, the end of the job."""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from dmi_hpc import deadline
from dmi_hpc.deadline import End
from dmi_hpc.errors import TrialFailure
from dmi_hpc.job import Epoch
from dmi_hpc.meters import Step

# of a worker that hangs, after the time limit of its trial
GRACE_S, GRACE_SHARE = 5.0, 0.2


@dataclass(frozen=True)
class Goal:
    """How far a trial is trained before it pauses: epochs, samples or seconds since it began."""

    amount: float
    unit: Literal["epochs", "samples", "seconds"] = "epochs"

    def is_reached(self, epochs: int, samples: int, seconds: float) -> bool:
        return {"epochs": epochs, "samples": samples, "seconds": seconds}[self.unit] >= self.amount


@dataclass(frozen=True)
class Assignment:
    """A trial that can go on where it was ended, in another process.

    number: of its proposal; goal: None means the whole training; parents: ids of trials whose weights
    it may begin with. lasting: its best weights are kept, for children or for the next rung. end: by
    then it must have stopped.
    """

    number: int
    goal: Goal | None = None
    parents: tuple[int, ...] = ()
    lasting: bool = True
    end: End | None = None


class Deadline:
    """Observer that ends a training at its time limit with a typed failure."""

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s, self._started = limit_s, time.monotonic()

    def on_step(self, step: Step) -> None:
        return None

    def on_epoch(self, epoch: Epoch) -> None:
        return None

    def on_event(self, event: str, values: Mapping[str, Any]) -> None:
        return None

    def must_stop(self) -> str | None:
        if late := self.late():
            raise TrialFailure("timeout", late)
        return None

    def late(self) -> str | None:
        """Why it is to end, if it is."""
        if self._limit_s is not None and time.monotonic() - self._started > self._limit_s:
            return f"not finished after {self._limit_s:g} s"
        return None


class Pause(Deadline):
    """... and lets it stop in order, with a checkpoint: after the epoch that reaches the goal, or
    before the time is over."""

    def __init__(
        self,
        limit_s: float | None,
        goal: Goal | None = None,
        seconds: float = 0.0,
        end: End | None = None,
    ) -> None:
        """seconds: that the trial was trained before."""
        super().__init__(limit_s)
        self._goal, self.seconds, self.reached = goal, seconds, False
        self._end = deadline.Deadline(_NoSignal(), end)

    def on_epoch(self, epoch: Epoch) -> None:
        self.seconds += epoch.seconds
        if self._goal is not None:
            self.reached = self._goal.is_reached(epoch.epoch + 1, epoch.samples, self.seconds)

    def on_event(self, event: str, values: Mapping[str, Any]) -> None:
        if event == "checkpoint":
            self._end.wrote(values["seconds"])

    def must_stop(self) -> str | None:
        super().must_stop()
        return self.ends()

    def ends(self) -> str | None:
        """Why it is to stop in order, if it is."""
        return "it pauses at its rung" if self.reached else self._end.must_stop(time.time())


class _NoSignal:
    """Workers are not signalled: the driver is, and leaves them."""

    signal: int | None = None


class TimeIsOver(Exception):
    """The trial has stopped with a checkpoint, short of its goal."""


@contextmanager
def watchdog(limit_s: float | None) -> Iterator[None]:
    """End this process if the block hangs: `Deadline` is asked between steps only.

    By faulthandler's own thread: it needs no interpreter lock, which a hanging extension may hold.
    """
    if limit_s is None:
        yield
        return
    grace = max(GRACE_S, GRACE_SHARE * limit_s)
    faulthandler.dump_traceback_later(limit_s + grace, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
