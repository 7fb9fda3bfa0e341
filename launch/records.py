"""What a session writes down of itself (read back by ``dmi_hpc.sessions``), and what a run has got
done so far.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dmi_hpc.files import append_json_line, writing
from dmi_hpc.sessions import (
    ALIVE,
    ALIVE_S,
    FOLDER,
    JOBS,
    SUBMISSIONS,
    Session,
    cancelled,
    node_hours,
    sessions,
)

Progress = tuple[str, ...]
KEPT = (
    "trials/*/checkpoints/step-*"  # of a search or island, as search/records/kept.py lays them out
)


class Recorder:
    """Of one session; the only writer of its job's files. Make it before `alive`."""

    def __init__(self, run: Path, job: str) -> None:
        self._folder = run / FOLDER / JOBS
        self._path = self._folder / f"{job}.jsonl"
        self._alive = self._folder / f"{job}{ALIVE}"
        # of the job's session before this one: it may have been killed, and this is its end then
        self._before = self._alive.stat().st_mtime if self._alive.exists() else None

    def event(self, event: str, **values: Any) -> None:
        """Append an event with its time; waits for the disk. Raises RunError if it cannot."""
        if event == "started":
            values = {**values, "before": self._before}
        with writing(self._folder):
            _make(self._folder)
            record = {"event": event, "time": time.time(), **values}
            append_json_line(self._path, record, durable=True)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Say on disk that the session lives, while the block runs."""
        with writing(self._folder):
            _make(self._folder)
            self._touch()
        over = threading.Event()
        thread = threading.Thread(target=self._keep_touching, args=(over,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _keep_touching(self, over: threading.Event) -> None:
        while not over.wait(ALIVE_S):
            with suppress(OSError):  # a file system that stumbles: the next touch will tell
                self._touch()

    def _touch(self) -> None:
        self._alive.touch(0o600)
        now = time.time()  # of this node's clock, as in the events; not the file server's
        os.utime(self._alive, (now, now))


def _make(folder: Path) -> None:
    """RUN/launch/jobs, for its owner alone."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)


def record_submission(run: Path, event: str, **values: Any) -> None:
    """Append to what login nodes say: "submitted" or "cancel". Raises RunError if it cannot."""
    folder = run / FOLDER
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        record = {"event": event, "time": time.time(), **values}
        append_json_line(folder / SUBMISSIONS, record, durable=True)


def progress_of(run: Path, island: str = "") -> Progress:
    """What is finished, to be compared with an earlier answer: equal if nothing was added since.

    Shards of the run's own data set, evaluations and kept checkpoints of the search (of one island,
    if named), checkpoints of the training, files of the evaluation and the report.
    """
    search, folder = run / "search", run / "search" / "islands" / island
    homes = [folder] if island else [search, *sorted(search.glob("islands/*"))]
    told = (f"{home.name}: {_answers(home / 'journal.jsonl')}" for home in homes)
    kept = (str(path.relative_to(run)) for home in homes for path in home.glob(KEPT))
    saved = (path.name for path in (run / "train" / "checkpoints").glob("step-*"))
    shards = (path.name for path in (run / "data").glob("shard-*"))
    results = (f"{name}: {_version(run / name)}" for name in ("evaluation.json", "report.html"))
    return (*told, *sorted((*kept, *saved, *shards)), *results)


def _answers(journal: Path) -> int:
    return journal.read_bytes().count(b'"event":"tell"') if journal.exists() else 0


def _version(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


__all__ = [
    "Progress",
    "Recorder",
    "Session",
    "cancelled",
    "node_hours",
    "progress_of",
    "record_submission",
    "sessions",
]
