"""What a person sees of a long job: progress in the terminal, JSON lines and TensorBoard on disk,
and signals turned into an orderly end.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dmi_hpc.errors import DMIError
from dmi_hpc.files import append_json_line, writing

if TYPE_CHECKING:
    from dmi_hpc.train import Epoch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


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


_WAITING = 0.05  # share of the time above which a user should hear of it


class TrainingWatch:
    """Observer of one training: rank 0 shows and writes, every rank heeds the stop flag."""

    def __init__(self, folder: Path, epochs: int, unit: str, stop: StopFlag, first: bool) -> None:
        self._metrics = folder / "metrics.jsonl"
        self._unit, self._stop, self._first, self._epochs = unit, stop, first, epochs
        self._best = float("inf")
        self._out = console()
        self._bar = progress_bar(self._out)

    @contextmanager
    def shown(self, tensorboard: Path) -> Iterator[TrainingWatch]:
        if not self._first:
            yield self
            return
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(tensorboard))
        with self._bar:
            self._line = self._bar.add_task("training", total=self._epochs, note="")
            try:
                yield self
            finally:
                self._writer.close()

    def on_step(self, epoch: int, step: int, steps_per_epoch: int) -> None:
        if self._first and self._out.is_terminal:
            self._bar.update(self._line, completed=epoch + step / steps_per_epoch)

    def on_epoch(self, epoch: Epoch) -> None:
        if not self._first:
            return
        self._best = min(self._best, epoch.validation_mae)
        record = asdict(epoch)
        with writing(self._metrics.parent):
            append_json_line(self._metrics, {"kind": "epoch", **record})
        for name in ("train_loss", "validation_mae", "validation_rmse", "learning_rate"):
            self._writer.add_scalar(name, record[name], epoch.step)
        note = (
            f"validation MAE {epoch.validation_mae:.4g} {self._unit} (best {self._best:.4g})"
            f"  {epoch.samples_per_s:,.0f} samples/s"
        )
        if epoch.data_wait > _WAITING:
            note += f"  waiting for data {epoch.data_wait:.0%} of the time"
        self._bar.update(self._line, completed=epoch.epoch + 1, note=note)
        if not self._out.is_terminal and (epoch.epoch + 1) % max(1, self._epochs // 10) == 0:
            self._out.print(f"epoch {epoch.epoch + 1}/{self._epochs}  {note}")

    def should_stop(self) -> bool:
        return bool(self._stop)


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
