"""What rank 0 keeps of a training while it runs: JSON lines, TensorBoard and, if asked for, MLflow;
and what every other rank says on stderr.
"""

from __future__ import annotations

import faulthandler
import importlib
import io
import json
import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from dmi_hpc.errors import DMIError, Interrupted
from dmi_hpc.files import append_json_line, write_json, writing
from dmi_hpc.world import World

TRACKING_URI = "MLFLOW_TRACKING_URI"  # MLflow's own variable: set, it switches it on
_STDERR = 2


class Records:
    """``metrics.jsonl``, TensorBoard and MLflow in the folder ``RUN/train``.

    Only an epoch that cannot be written ends a training, as all ranks are told of that; what is
    lost within an epoch is said once.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self.path = folder / "metrics.jsonl"
        self._folder, self._warn = folder, warn
        self._warned = False
        self._mlflow: _MLflow | None = None

    @contextmanager
    def open(self, parameters: Mapping[str, Any]) -> Iterator[None]:
        """parameters: of the training, for MLflow. Raises RunError, or DMIError without MLflow."""
        from torch.utils.tensorboard import SummaryWriter

        with ExitStack() as held:
            if os.environ.get(TRACKING_URI):
                self._mlflow = held.enter_context(_tracked(self._folder, parameters, self._warn))
            with writing(self._folder):
                self._writer = SummaryWriter(str(self._folder / "tensorboard"))
            held.callback(self._close)
            yield

    def epoch(self, record: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        """Append a record of kind "epoch". Raises RunError if it cannot be written."""
        with writing(self._folder):
            append_json_line(self.path, {"kind": "epoch", **record})
            self._plot(scalars, record["step"])

    def step(self, epoch: int, step: int, values: Mapping[str, float | None]) -> None:
        """Append a record of kind "step"; `step` counts from the start of the training."""
        self._try({"kind": "step", "epoch": epoch, "step": step, **values})
        scalars = {f"step/{name}": value for name, value in values.items() if value is not None}
        try:
            self._plot(scalars, step)
        except OSError as error:  # of TensorBoard's own thread, too
            self._lost(error)

    def event(self, event: str, values: Mapping[str, Any]) -> None:
        """Append a record of kind "event"."""
        self._try({"kind": "event", "event": event, **values})

    def _try(self, record: Mapping[str, Any]) -> None:
        try:
            append_json_line(self.path, {k: _plain(v) for k, v in record.items()} | _now())
        except OSError as error:
            self._lost(error)

    def _lost(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            self._warn(f"{self._folder}: records of single steps are not written: {error}")

    def _plot(self, scalars: Mapping[str, float], step: int) -> None:
        finite = {name: value for name, value in scalars.items() if math.isfinite(value)}
        for name, value in finite.items():
            self._writer.add_scalar(name, value, step)
        if self._mlflow is not None:
            self._mlflow.log(finite, step)

    def _close(self) -> None:
        try:
            self._writer.close()
        except OSError as error:
            self._lost(error)


def _now() -> dict[str, float]:
    return {"time": round(time.time(), 3)}  # of the clock, to be laid beside other logs


def _plain(value: Any) -> Any:
    """JSON has no inf and nan."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _MLflow:
    """The run of MLflow under way; a server that fails on the way costs its curves alone."""

    def __init__(self, module: Any, warn: Callable[[str], None]) -> None:
        self._module, self._warn = module, warn
        self._error: type[Exception] = module.exceptions.MlflowException

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Without waiting for the server (MLflow 2.13 or newer)."""
        self._try(lambda: self._module.log_metrics(dict(scalars), step=step, synchronous=False))

    def end(self, status: str) -> None:
        self._try(self._module.flush_async_logging)
        self._try(lambda: self._module.end_run(status=status))

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except self._error as error:
            self._warn(f"MLflow: {error}")


@contextmanager
def _tracked(
    folder: Path, parameters: Mapping[str, Any], warn: Callable[[str], None]
) -> Iterator[_MLflow]:
    """A run of MLflow; a resumed training continues its own. DMIError: it cannot be opened."""
    where = f"{TRACKING_URI} is set"  # what it is set to may hold a password
    try:
        mlflow: Any = importlib.import_module("mlflow")
    except ImportError as error:
        raise DMIError(
            f"{where}, but mlflow cannot be imported ({error}). Install it (pip install "
            "'dmi-hpc[mlflow]'), or unset the variable"
        ) from error
    known = folder / "mlflow.json"
    run_id = json.loads(known.read_text())["run_id"] if known.exists() else None
    try:
        run = mlflow.start_run(run_id=run_id, run_name=folder.parent.name)
        if run_id is None:
            mlflow.log_params(parameters)
    except mlflow.exceptions.MlflowException as error:
        raise DMIError(
            f"{where}, but no run could be opened there: {error}. Check the server, or unset the "
            f"variable{f'; for a new run remove {known}' if run_id else ''}"
        ) from error
    with writing(folder):
        write_json(known, {"run_id": run.info.run_id})
    tracked, status = _MLflow(mlflow, warn), "FAILED"
    try:
        yield tracked
        status = "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    finally:
        tracked.end(status)


class _Both(io.TextIOWrapper):
    """Text that goes to the log, unbuffered, and to where stderr went before."""

    def __init__(self, log: io.FileIO, before: TextIO) -> None:
        super().__init__(log, errors="backslashreplace", write_through=True)
        self._before = before

    def write(self, text: str) -> int:
        written = super().write(text)
        self._before.write(text)
        return written

    def flush(self) -> None:
        super().flush()
        self._before.flush()


@contextmanager
def rank_log(folder: Path, world: World) -> Iterator[None]:
    """Keep in ``FOLDER/logs/rank-N.log`` what a rank N > 0 writes to stderr.

    File descriptor 2 is the log itself, with neither pipe nor thread between: the last words of a
    crash (faulthandler, NCCL, the C library) are there. What Python writes goes to the old stderr
    as well. Nothing is done where it is that file already, as under `dmi launch`. Raises RunError.
    """
    if world.is_first:
        yield
        return
    path = folder / "logs" / f"rank-{world.rank}.log"
    with writing(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        if os.path.samestat(os.fstat(handle), os.fstat(_STDERR)):
            yield
            return
        with _stderr_in(handle):
            began = time.strftime("%Y-%m-%d %H:%M:%S")
            os.write(
                handle,
                f"{began} rank {world.rank} of {world.size}: process {os.getpid()} on "
                f"{socket.gethostname()}\n".encode(),
            )
            with _last_words(handle):
                yield
    finally:
        os.close(handle)


@contextmanager
def _stderr_in(handle: int) -> Iterator[None]:
    """File descriptor 2 is that of `handle`, Python's stderr goes to both, while the block runs."""
    python, crashes = sys.stderr, not faulthandler.is_enabled()
    python.flush()
    old = os.dup(_STDERR)
    with (
        io.TextIOWrapper(
            io.FileIO(old, "w"), errors="backslashreplace", line_buffering=True
        ) as before,
        _Both(io.FileIO(handle, "a", closefd=False), before) as both,
    ):
        os.dup2(handle, _STDERR)
        sys.stderr = both
        if crashes:
            faulthandler.enable(_STDERR)
        try:
            yield
        finally:
            if crashes:
                faulthandler.disable()
            sys.stderr = python
            os.dup2(old, _STDERR)


@contextmanager
def _last_words(handle: int) -> Iterator[None]:
    """Log the exception that leaves the block: it is told to the user when the log is closed."""
    try:
        yield
    except Interrupted as stop:
        os.write(handle, f"interrupted: {stop}\n".encode())
        raise
    except BaseException as error:
        os.write(handle, "".join(traceback.format_exception(error)).encode(errors="replace"))
        raise
