"""Trainings that take turns: each runs a number of steps, then waits for its next turn.

Every contender is a whole training of its own making in a thread of its own, which calls `tick`
after each step. So what is measured is what its users run, not a copy of its inner loop.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

Tick = Callable[[], None]
Training = Callable[[Tick], None]  # endless: ends when `tick` raises Enough

TURN_S = 600.0


class Enough(BaseException):
    """Ends a training from within its `tick`; no library may take it for a failure of its own."""


class Turn:
    """One contender. The steps of a turn follow each other as if it had never paused.

    discarded: steps at the start of a turn that are not timed; a loader that fills its buffers
    during a pause would be ahead.
    """

    def __init__(self, training: Training, discarded: int) -> None:
        self._discarded, self._left, self._closing = discarded, 0, False
        self._mine, self._others = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = ThreadPoolExecutor(1)
        self._done = self._thread.submit(self._run, training)
        self._done.add_done_callback(lambda _: self._others.release())

    def rate(self, steps: int, between: Callable[[], None]) -> float:
        """Steps a second; between: called before the clock starts and after it stops."""
        self._advance(self._discarded)
        between()
        started = time.perf_counter()
        self._advance(steps)
        spent = time.perf_counter() - started
        between()
        return steps / spent

    def close(self) -> None:
        self._closing = True
        self._mine.release()
        self._thread.shutdown()

    def _advance(self, steps: int) -> None:
        if not steps:
            return
        self._left = steps
        self._mine.release()
        if not self._others.acquire(timeout=TURN_S):
            raise TimeoutError(f"no {steps} steps in {TURN_S:g} s")
        if self._done.done():
            self._done.result()
            raise RuntimeError("a training ended by itself")

    def _run(self, training: Training) -> None:
        torch.set_num_threads(1)  # of this thread
        self._wait()
        training(self._tick)

    def _tick(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._others.release()
            self._wait()

    def _wait(self) -> None:
        self._mine.acquire()
        if self._closing:
            raise Enough


@contextmanager
def turns_of(trainings: Mapping[str, Training], discarded: int) -> Iterator[dict[str, Turn]]:
    turns = {name: Turn(training, discarded) for name, training in trainings.items()}
    try:
        yield turns
    finally:
        for turn in turns.values():
            turn.close()
