"""A function over a stream, in worker processes: in order, a bounded number at once."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, TypeVar

from dmi_hpc.data.workers import pool
from dmi_hpc.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # items waiting for each worker
_INLINE_S = 2.0  # of work before "auto" starts processes: they cost a second each


def ordered_map(
    function: Callable[[T], R], items: Iterator[T], processes: int | Literal["auto"]
) -> Iterator[R]:
    """function(item) of each item, in order; results do not depend on the number of processes.

    1: in this process. "auto": in this process for two seconds, then in one a core. The function
    is pickled once a worker. Close the generator (or exhaust it) to end the workers.
    """
    if processes != "auto":
        yield from map(function, items) if processes == 1 else _pooled(function, items, processes)
        return
    end = time.monotonic() + _INLINE_S
    for item in items:
        yield function(item)
        if time.monotonic() > end:
            break
    cores = len(os.sched_getaffinity(0))
    yield from map(function, items) if cores == 1 else _pooled(function, items, cores)


def _pooled(function: Callable[[T], R], items: Iterator[T], processes: int) -> Iterator[R]:
    waiting: deque[Future[R]] = deque()
    with pool(processes, start_worker, (function,)) as executor:
        try:
            for item in items:
                waiting.append(executor.submit(_call, item))
                if len(waiting) >= processes * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (killed, or out of memory). Repeat with fewer --processes."
            ) from error


_function: Callable[[Any], Any] | None = None  # set once in each worker process


def start_worker(function: Callable[[Any], Any]) -> None:
    """Initializer of a spawned worker."""
    global _function
    _function = function


def _call(item: Any) -> Any:
    assert _function is not None, "runs in workers only"
    return _function(item)
