"""Worker processes: spawned, one thread each, gone when their parent is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from typing import Any

CONTEXT = multiprocessing.get_context("spawn")  # a fork would share HDF5 and thread state
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextmanager
def pool(
    processes: int, initializer: Callable[..., None], arguments: tuple[Any, ...]
) -> Iterator[ProcessPoolExecutor]:
    """A pool whose workers first call initializer(*arguments). Pending calls end with the block."""
    with (
        _one_thread_each(),
        ProcessPoolExecutor(processes, CONTEXT, _enter, (initializer, arguments)) as executor,
    ):
        try:
            yield executor
        finally:
            executor.shutdown(cancel_futures=True)  # waits: a worker may still be starting


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Spawned children read these when they load numpy and torch."""
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


def _enter(initializer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=die_with_parent, daemon=True).start()
    initializer(*arguments)


def die_with_parent() -> None:
    """A killed parent cannot stop its pool: without this its workers would stay for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in workers only"
    wait_for([parent.sentinel])
    os._exit(1)
