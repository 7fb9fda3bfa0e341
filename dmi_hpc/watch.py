"""What a person sees of a long job: progress in the terminal, JSON lines and TensorBoard on disk,
and signals turned into an orderly end.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dmi_hpc import knobs
from dmi_hpc.deadline import BEFORE_THE_FIRST_STEP, Deadline
from dmi_hpc.errors import EXIT_INTERRUPTED, STOP_SIGNALS, DMIError
from dmi_hpc.files import read_json_lines
from dmi_hpc.meters import Gauge, Reading, Step, matmul_peak
from dmi_hpc.models.cost import training_flops
from dmi_hpc.records import Records
from dmi_hpc.screen import Screen, pieces, rate_pieces

if TYPE_CHECKING:
    from dmi_hpc.job import Epoch, Job

LEAVE_AFTER_S = 10.0  # schedulers kill about 30 s after their signal


def console() -> Console:
    """Messages go to stderr, so that stdout stays for results."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def progress_bar(out: Console, *, remaining: bool = True) -> Progress:
    """A bar that is drawn only on a terminal. remaining: with rich's estimate of the time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *([TimeRemainingColumn()] if remaining else []),
        TextColumn("{task.fields[note]}"),
        console=out,
        disable=not out.is_terminal,
    )


class StopFlag:
    """Set by SIGTERM, SIGINT, SIGUSR1 or SIGHUP; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._then: Callable[[], None] | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def arm(self, then: Callable[[], None] | None = None) -> None:
        """Install the handlers; again after a library (Ray) has put its own over them.

        then: called once, at the first signal.
        """
        self._then = then
        for number in STOP_SIGNALS:
            # under nohup a closed terminal is no reason to stop
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._catch)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None and self._then is not None:
            self._then()
        self.signal = number


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that the stop signals set while the block runs; the old handlers come back after."""
    flag = StopFlag()
    old = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    flag.arm()
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def leaving_in_time(patience_s: float = LEAVE_AFTER_S) -> Iterator[None]:
    """For a block with nothing to save yet, with the stop signals caught: if it still runs so long
    after the first one, or at a second SIGINT, the process ends, with exit code 75.

    A handler waits for the main thread, which may be within a library: at a rendezvous, in a long
    read. Of the main thread only.
    """
    hears, tells = socket.socketpair()
    tells.setblocking(False)
    before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_leave_in_time, args=(hears, patience_s), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        tells.close()  # the thread ends


def _leave_in_time(hears: socket.socket, patience_s: float) -> None:
    """Thread: read the numbers of the signals as they come, until the other side is closed."""
    first, end = 0, math.inf
    with hears, suppress(TimeoutError):
        while numbers := hears.recv(1):
            number = numbers[0]
            if number not in STOP_SIGNALS:
                continue
            if first == number == signal.SIGINT:
                break
            if not first:
                first, end = number, time.monotonic() + patience_s
            hears.settimeout(max(0.001, end - time.monotonic()))
        else:
            return
    why = BEFORE_THE_FIRST_STEP.format(signal.Signals(first).name)
    with suppress(OSError):
        sys.stderr.write(f"interrupted: {why}{knobs.resume_hint()}\n")
        sys.stderr.flush()
    os._exit(EXIT_INTERRUPTED)


_REFRESH_PER_S = 2  # of the display, by a thread of rich's
_LINE_S = 30.0  # between plain lines, at least; up to _LINE_SLOWEST_S in a training of hours
_LINE_SLOWEST_S = 600.0
_LINES = 10  # of epochs, however short the training
_RECORD_S = (1.0, 10.0)  # between records of steps: at the beginning, and after 1,000 s
_RECORDED = (
    "learning_rate",
    "gradient_norm",
    "samples_per_s",
    "data_wait",
    "flops",
    "mfu",
    "noise_scale",
)
_PLOTTED = (
    "train_loss",
    "validation_error",
    "validation_rmse",
    *("validation_mae", "validation_auc", "validation_accuracy", "validation_force_mae"),
    "learning_rate",
    "samples_per_s",
    "data_wait",
)


class TrainingWatch:
    """Observer of one training: rank 0 shows and records, every rank heeds the stop flag.

    A step costs some microseconds: the device is asked for its numbers twice a second at most.
    """

    def __init__(self, job: Job, folder: Path, deadline: Deadline) -> None:
        """folder: ``RUN/train``."""
        self._job, self._deadline, self._first = job, deadline, job.world.is_first
        self._error, unit = job.problem.task.measure
        self._unit = f" {unit}" if unit else ""
        self._out = console()
        self._live = self._out.is_interactive
        self._records = Records(folder, self._say)
        self._screen = Screen(job.config.epochs)
        self._best = math.inf
        # when there is to be another reading, record, plain line, and plain line of an epoch
        self._due = self._due_record = self._due_line = self._due_epoch_line = 0.0
        self._skipped = 0

    @contextmanager
    def shown(self) -> Iterator[TrainingWatch]:
        """Show and record while the block runs. Raises RunError if the folder cannot be written,
        DMIError if MLflow is wanted and cannot be had."""
        if not self._first:
            yield self
            return
        job = self._job
        peak = matmul_peak(job.device, job.config.precision) * job.world.size
        self._gauge = Gauge(job.config.epochs, training_flops(job.network), peak)
        told = read_json_lines(self._records.path)  # of the part before it was interrupted
        self._best = min(
            (line["validation_error"] for line in told if "validation_error" in line),
            default=math.inf,
        )
        live = Live(self._screen, console=self._out, refresh_per_second=_REFRESH_PER_S)
        with self._records.open(job.config.model_dump(mode="json")):
            self.on_event("peak", {"flops": peak})
            self._started = time.perf_counter()
            self._due_line = self._due_epoch_line = self._started + _LINE_S
            with _drawn(live) if self._live else nullcontext():
                yield self

    def on_step(self, step: Step) -> None:
        if not self._first:
            return
        now = time.perf_counter()
        self._gauge.add(step, now)
        if now >= self._due:
            self._read(now)

    def _read(self, now: float) -> None:
        reading = self._gauge.read()
        if self._screen.reading is None:
            since = time.time() - psutil.Process().create_time()
            self._records.event("first_step", {"since_start_s": round(since, 2)})
        self._screen.reading = reading
        if reading.skipped > self._skipped:
            steps, self._skipped = reading.skipped - self._skipped, reading.skipped
            self._records.event("skipped", {"step": reading.total_step, "steps": steps})
        if now >= self._due_record:
            slowly = (now - self._started) / 100
            self._due_record = now + min(max(slowly, _RECORD_S[0]), _RECORD_S[1])
            self._record(reading)
        if now >= self._due_line and not self._live:
            self._due_line = now + self._pause(now)
            where = f"step {reading.step:,}/{reading.steps_per_epoch:,}"
            self._say("  ".join([self._epoch(reading.epoch), where, *pieces(reading)]))
        soon = now + 1 / _REFRESH_PER_S
        self._due = soon if self._live else min(self._due_record, self._due_line)

    def _record(self, reading: Reading) -> None:
        values = {name: getattr(reading, name) for name in _RECORDED}
        self._records.step(
            reading.epoch, reading.total_step, {"loss": self._gauge.take_loss(), **values}
        )

    def on_epoch(self, epoch: Epoch) -> None:
        if not self._first:
            return
        now, epochs = time.perf_counter(), self._job.config.epochs
        self._best = min(self._best, epoch.validation_error)
        record = {name: value for name, value in asdict(epoch).items() if value is not None}
        self._records.epoch(record, {name: record[name] for name in _PLOTTED if name in record})
        scores = (
            f"validation {self._error} {epoch.validation_error:.4g}{self._unit} (best {self._best:.4g})",
            f"training loss {epoch.train_loss:.4g}",
        )
        self._screen.scores = scores
        often = (epoch.epoch + 1) % math.ceil(epochs / _LINES) == 0 or epoch.epoch + 1 == epochs
        if not self._live and (often or now >= self._due_epoch_line):
            self._due_epoch_line = now + self._pause(now)
            self._due_line = max(self._due_line, now + _LINE_S)
            rates = rate_pieces(epoch.samples_per_s, epoch.data_wait)
            self._say("  ".join([self._epoch(epoch.epoch), *scores, *rates]))
        if self._screen.reading is not None:
            self._read(now)  # the epoch's last steps

    def on_event(self, event: str, values: Mapping[str, Any]) -> None:
        """Record what happened, by rank 0. values: JSON; a "message" among them is said, too."""
        if not self._first:
            return
        if event == "checkpoint":
            self._deadline.wrote(values["seconds"])
        self._records.event(event, values)
        if "message" in values:
            self._say(values["message"])

    def must_stop(self) -> str | None:
        return self._deadline.must_stop(time.time())

    def _epoch(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self._job.config.epochs}"

    def _pause(self, now: float) -> float:
        """Seconds to the next plain line: a log of a day should still be read by a person."""
        return min(max(_LINE_S, (now - self._started) / 20), _LINE_SLOWEST_S)

    def _say(self, text: str) -> None:
        with suppress(OSError):  # nobody listens any more: no reason to end a training
            self._out.print(text, markup=False)


@contextmanager
def _drawn(live: Live) -> Iterator[None]:
    """Show `live` while the block runs. A terminal that is closed meanwhile takes nothing with it."""
    live.start()
    try:
        yield
    finally:
        with suppress(OSError):
            live.stop()


def say(text: str) -> None:
    """A result line on stdout; what its encoding has not is escaped. DMIError: it cannot be written."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: no error of anybody's
        raise
    except OSError as error:
        with Path(os.devnull).open("w") as nothing:  # the rest would fail again when Python ends
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        raise DMIError(f"standard output: cannot write: {error}") from error
