"""The rivals as this process sees them: asked over a pipe, ended with all they started."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from loading.rivals import installed
from loading.timing import Window

WORKERS = (0, 2, 4)
TIMEOUT_S = 180  # for one answer; the slowest write a minute
CLOSING_S = 8  # for workers to end by themselves


class RivalError(Exception):
    """A rival failed or did not answer."""


@dataclass
class Trial:
    """What is known of one rival on one case."""

    version: str
    rates: dict[int, float] = field(default_factory=dict)  # workers -> samples a second, one window
    bytes: float = 0.0
    problem: str = ""

    @property
    def workers(self) -> int:
        """Of the best configuration."""
        return max(self.rates, key=lambda workers: self.rates[workers])


class RivalProcess:
    """rivals.py with one rival."""

    def __init__(self, name: str, folder: Path) -> None:
        self.log = folder / f"{name.replace(' ', '-')}.log"
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("rivals.py"))]
        # one thread for torch: its default stacks large samples 5 to 30 times slower on busy cores
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, name, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,
            )

    def ask(self, do: str, **arguments: Any) -> Any:
        process = self._process
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise RivalError(self._last_words()) from None
        if not select.select([process.stdout], [], [], TIMEOUT_S)[0]:
            raise RivalError(f"no answer to {do} in {TIMEOUT_S} s")
        line = process.stdout.readline()
        if not line:
            raise RivalError(self._last_words())
        return json.loads(line)["answer"]

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "ended without a word"

    def close(self) -> None:
        process = self._process
        assert process.stdin and process.stdout
        process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(CLOSING_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its session: workers, too
        process.wait()
        process.stdout.close()


@contextmanager
def rivals(
    names: list[str], folder: Path, *, batch: int, rows: int, seconds: float
) -> Iterator[tuple[dict[str, Trial], dict[str, Window]]]:
    """(what was found, a window of the best configuration) of each rival that is installed and runs.

    folder: holds source.npy or source.npz; the rivals write beside it.
    """
    trials = {name: Trial(found) for name in names if (found := installed(name)) is not None}
    processes = {name: RivalProcess(name, folder) for name in trials}
    try:
        with ThreadPoolExecutor(max(1, len(processes))) as pool:
            list(pool.map(_prepare, processes.values(), trials.values()))
        for name, process in processes.items():
            if not trials[name].problem:
                _try_workers(process, trials[name], batch=batch, rows=rows, seconds=seconds)
        running = {name: trial for name, trial in trials.items() if not trial.problem}
        yield (
            trials,
            {
                name: partial(_window, processes[name], trial, seconds)
                for name, trial in running.items()
            },
        )
    finally:
        with ThreadPoolExecutor(max(1, len(processes))) as pool:
            list(pool.map(RivalProcess.close, processes.values()))


def _prepare(process: RivalProcess, trial: Trial) -> None:
    try:
        trial.bytes = process.ask("prepare")["bytes"]
    except RivalError as error:
        trial.problem = f"writing: {error}"


def _try_workers(
    process: RivalProcess, trial: Trial, *, batch: int, rows: int, seconds: float
) -> None:
    """One window of each number of workers."""
    try:
        for workers in WORKERS:
            process.ask("start", workers=workers, batch=batch)
            trial.rates[workers] = process.ask("window", workers=workers, seconds=seconds)
        counted = process.ask("count", workers=trial.workers)
        if counted != rows:
            trial.problem = f"an epoch has {counted} of {rows} samples"
    except RivalError as error:
        trial.problem = f"reading: {error}"


def _window(process: RivalProcess, trial: Trial, seconds: float) -> float:
    if trial.problem:
        return 0.0
    try:
        return float(process.ask("window", workers=trial.workers, seconds=seconds))
    except RivalError as error:
        trial.problem = f"reading: {error}"
        return 0.0
