"""A function over a stream, in worker processes: in order, a bounded number at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import Any, Literal, TypeVar

from dmi_hpc.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # items waiting for each worker
_INLINE_S = 2.0  # of work before "auto" starts processes: they cost a second each
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


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
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[R]] = deque()
    with (
        one_thread_each(),
        ProcessPoolExecutor(processes, context, start_worker, (function,)) as pool,
    ):
        try:
            for item in items:
                waiting.append(pool.submit(_call, item))
                if len(waiting) >= processes * _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (killed, or out of memory). Repeat with fewer --processes."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Spawned children read these when they load numpy."""
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


_function: Callable[[Any], Any] | None = None  # set once in each worker process


def start_worker(function: Callable[[Any], Any]) -> None:
    """Initializer of a spawned worker."""
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent cannot stop its pool: without this its workers would stay for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"
    wait_for([parent.sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    assert _function is not None, "runs in workers only"
    return _function(item)
