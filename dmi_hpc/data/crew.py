"""Threads that take tasks from one line, and a caller that works along while it waits.

concurrent.futures lets the caller sleep. To wake it takes longer here (0.1 ms and more on a virtual
machine) than to gather a small batch, and its processor is free meanwhile.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")

_QUICK_S = 0.005  # of a task: what the caller waits for may be ready long before a slower one is


class Task(Generic[T]):
    """A function without arguments, to be run once."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function: Callable[[], T] | None = function
        self._value: T | None = None
        self.error: BaseException | None = None
        self._running = threading.Lock()  # the cheapest thing to wait for
        self._running.acquire()

    @property
    def over(self) -> bool:
        return not self._running.locked()

    def run(self) -> None:
        assert self._function is not None, "a task is run once"
        try:
            self._value = self._function()
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            self.error = error
        finally:
            self._function = None
            self._running.release()

    def result(self) -> T:
        """Wait for it; raises what the function has raised. Call it once."""
        self._running.acquire()
        if self.error is not None:
            raise self.error
        return cast(T, self._value)


class Crew:
    """Threads for tasks, first come, first served; started as tasks come, ended by `with`."""

    def __init__(self, threads: int, name: str) -> None:
        self._size, self._name = threads, name
        self._line: SimpleQueue[Task[Any] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._quick = [True]  # shared with the threads, which must not hold the crew
        # daemons, ended at exit by the finaliser: others would keep the interpreter from its exit
        # where a loop was left in the middle
        self._end = weakref.finalize(self, _end, self._line, self._threads)

    def submit(self, function: Callable[[], T]) -> Task[T]:
        task = Task(function)
        self._line.put(task)
        if len(self._threads) < self._size:  # one by one: the first works while others start
            name = f"{self._name}-{len(self._threads)}"
            arguments = (self._line, self._quick)
            self._threads.append(
                threading.Thread(target=_work, args=arguments, name=name, daemon=True)
            )
            self._threads[-1].start()
        return task

    def result(self, task: Task[T]) -> T:
        """The task's result; quick tasks that nobody has begun are run here until it is there."""
        while self._quick[0] and not task.over:
            try:
                other = self._line.get_nowait()
            except Empty:
                break
            assert other is not None, "the crew is closed"
            _run(other, self._quick)
            if isinstance(other.error, KeyboardInterrupt):  # this thread's: nobody may ask for it
                raise other.error
        return task.result()

    def close(self) -> None:
        """Wait for tasks that were begun; the others are dropped."""
        self._end()

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _run(task: Task[Any], quick: list[bool]) -> None:
    started = time.monotonic()
    task.run()
    quick[0] = time.monotonic() - started < _QUICK_S


def _work(line: SimpleQueue[Task[Any] | None], quick: list[bool]) -> None:
    while (task := line.get()) is not None:
        _run(task, quick)
        del task  # its result, maybe a buffer, is the caller's


def _end(line: SimpleQueue[Task[Any] | None], threads: list[threading.Thread]) -> None:
    try:
        while True:
            line.get_nowait()
    except Empty:
        pass
    for _ in threads:
        line.put(None)
    for thread in threads:
        thread.join()
