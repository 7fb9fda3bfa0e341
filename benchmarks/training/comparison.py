"""Comparisons as this process sees them: every contender has processes of its own, and they take turns.

Of its own, because a process has one allocator, one set of thread pools and one process group, and
what one contender does to them would speed up or slow down the others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import IO, Any

import psutil
from loading.timing import Rates, interleaved

PROGRAM = Path(__file__).with_name("rank_process.py")
TURN_S, GRACE_S = 600.0, 5.0


class ComparisonError(Exception):
    """A rank failed or did not end."""


@dataclass(frozen=True)
class Comparison:
    """Contenders on the same data, in turns of `steps` steps."""

    data: Path
    task: Mapping[str, Any]
    contenders: tuple[str, ...]
    batch: int
    steps: int
    repetitions: int
    ranks: int = 1
    small: bool = False
    discarded: int = 3  # steps before each turn's clock starts: more than a loader holds ready

    def run(self) -> tuple[Rates, dict[str, list[float]]]:
        """(steps a second, bytes on the wire a step) of each contender. Raises ComparisonError."""
        sent: dict[str, list[float]] = {name: [] for name in self.contenders}
        with ExitStack() as stack:
            running = {name: stack.enter_context(self._started(name)) for name in self.contenders}

            def turn(name: str) -> float:
                running[name].step(self.discarded)
                before, started = _sent_on_loopback(), time.perf_counter()
                running[name].step(self.steps)
                seconds = time.perf_counter() - started
                sent[name].append((_sent_on_loopback() - before) / self.steps)
                return self.steps / seconds

            turns = {name: partial(turn, name) for name in self.contenders}
            rates = interleaved(turns, self.repetitions)
        return rates, {name: found[1:] for name, found in sent.items()}

    @contextmanager
    def _started(self, name: str) -> Iterator[Contender]:
        with tempfile.TemporaryDirectory(prefix="dmi-bench-ranks-") as folder:
            asked = asdict(self) | {"data": str(self.data), "contender": name}
            contender = Contender(name, Path(folder), json.dumps(asked), self.ranks)
            try:
                yield contender
            finally:
                contender.close()


def _sent_on_loopback() -> int:
    return int(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)


class Contender:
    """The ranks of one training; between two calls of `step` they do nothing."""

    def __init__(self, name: str, folder: Path, asked: str, ranks: int) -> None:
        self._name, self._folder = name, folder
        self._ranks = [self._start(rank, ranks) for rank in range(ranks)]
        for rank in self._ranks:
            _tell(rank, asked)

    def _start(self, rank: int, ranks: int) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "DMI_RENDEZVOUS": f"file://{self._folder}/store",
        }
        with (self._folder / f"{rank}.err").open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-W", "ignore", str(PROGRAM)],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    def step(self, steps: int) -> None:
        """Returns when all ranks have done so many more steps. Raises ComparisonError."""
        if not steps:
            return
        for rank in self._ranks:
            _tell(rank, str(steps))
        end = time.monotonic() + TURN_S
        with DefaultSelector() as waiting:
            for number, rank in enumerate(self._ranks):
                waiting.register(_pipe(rank.stdout), EVENT_READ, number)
            while waiting.get_map():
                ready = waiting.select(timeout=max(0.0, end - time.monotonic()))
                if not ready:
                    raise ComparisonError(f"{self._name}: no {steps} steps in {TURN_S:g} s")
                for key, _ in ready:
                    if not _pipe(self._ranks[key.data].stdout).readline():
                        raise ComparisonError(f"{self._name}: {self._last_words(key.data)}")
                    waiting.unregister(key.fileobj)

    def _last_words(self, number: int) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._ranks[number].wait(GRACE_S)
        said = (self._folder / f"{number}.err").read_text(errors="replace")
        code = self._ranks[number].returncode
        return f"rank {number} ended with {code}: {' '.join(said.split())[-300:]}"

    def close(self) -> None:
        for rank in self._ranks:
            with suppress(ProcessLookupError):
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
            _pipe(rank.stdout).close()
            with suppress(BrokenPipeError):
                _pipe(rank.stdin).close()


def _tell(rank: subprocess.Popen[str], line: str) -> None:
    with suppress(BrokenPipeError):  # it has ended: the answer that does not come says so
        pipe = _pipe(rank.stdin)
        pipe.write(line + "\n")
        pipe.flush()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
