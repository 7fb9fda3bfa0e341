"""Journals as evaluations, for whoever is not the search itself: read-only, alive or ended.

A run's searches: the main one in RUN/search, islands in RUN/search/islands/NAME.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmi_hpc.errors import RunError
from search.evolution.evolve import Failure, Outcome, Success
from search.records.journal import UNSIGNED, header_of, outcome_of
from search.records.lines import PATIENCE_S, Tail

MAIN = "main"
JOURNAL = "journal.jsonl"
ISLANDS = "islands"


def home(search: Path, island: str) -> Path:
    """Folder of one of the searches in ``RUN/search``."""
    return search if island == MAIN else search / ISLANDS / island


def journals(search: Path) -> dict[str, Path]:
    """Journal of every search in ``RUN/search`` by its island, the main one first."""
    folders = {MAIN: search}
    if (search / ISLANDS).is_dir():
        folders |= {path.name: path for path in sorted((search / ISLANDS).iterdir())}
    found = {name: folder / JOURNAL for name, folder in folders.items()}
    return {name: path for name, path in found.items() if path.is_file()}


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation. genome: plain data; times: seconds since 1970."""

    island: str
    id: int
    genome: Mapping[str, Any]
    hash: str
    origin: str
    parents: tuple[int, ...]
    asked: float
    told: float
    outcome: Outcome
    seconds: float
    metrics: Mapping[str, Any]

    @property
    def fitness(self) -> float | None:
        return self.outcome.fitness if isinstance(self.outcome, Success) else None

    @property
    def failure(self) -> str | None:
        """Kind of its failure."""
        return self.outcome.kind if isinstance(self.outcome, Failure) else None

    @property
    def rung(self) -> int:
        """Where it paused, 0 first; 0 too where nothing pauses."""
        return int(self.metrics.get("rung", 0))

    @property
    def curve(self) -> tuple[float, ...]:
        """Errors after each epoch so far, where they are extrapolated."""
        return tuple(self.metrics.get("curve", ()))

    @property
    def known(self) -> bool:
        """From another island: it was not evaluated here."""
        return "evaluated_as" in self.metrics

    @property
    def name(self) -> str:
        """Unique in a run: the id, on an island with its name."""
        return str(self.id) if self.island == MAIN else f"{self.island}:{self.id}"


@dataclass
class Clock:
    """Time of a search without its pauses."""

    workers: int = 0  # of the session, as nodes go and come
    began: float = 0.0  # the session
    last: float = 0.0  # event
    searched_s: float = 0.0  # all sessions
    worker_s: float = 0.0
    busy_s: float = 0.0  # worker seconds within evaluations that finished, or were left to go on
    told: int = 0  # in the session
    ended: str = ""  # why the session did; empty: not in an orderly way, or not yet

    def advance(self, event: Mapping[str, Any]) -> None:
        kind, now = event["event"], float(event["time"])
        if kind in ("header", "resume"):
            self.workers = int(event.get("config", {}).get("workers", 0))
            self.began, self.told, self.ended = now, 0, ""
        else:
            passed = max(0.0, now - self.last)
            self.searched_s += passed
            self.worker_s += self.workers * passed
        if kind == "workers":
            self.workers = int(event["workers"])
        if kind == "end":
            self.ended = str(event["why"])
        if kind == "tell":
            self.told += 1
        if kind in ("tell", "left"):
            self.busy_s += float(event["seconds"])
        self.last = now


@dataclass
class Reader:
    """Follows one journal. `running`: asks without a tell, and paused trials that go on; `asks`:
    all; `hashes`: of all its proposals and migrants by id; `space`: fingerprint of its search space."""

    island: str
    path: Path
    patience_s: float = PATIENCE_S
    header: Mapping[str, Any] = field(default_factory=dict)
    space: str = ""
    running: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    asks: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    hashes: dict[int, str] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self._tail = Tail(self.path, patience_s=self.patience_s)

    @property
    def damaged(self) -> int:
        """Lines that were passed over."""
        return self._tail.damaged

    def poll(self) -> list[Evaluation]:
        """Evaluations that ended since the last call.

        Raises RunError or FormatVersionError if it is no journal that this program can read, OSError
        if its file cannot be read.
        """
        if not self.header:
            try:
                with self.path.open("rb") as stream:
                    self.header = header_of(stream.readline().rstrip(b"\n"), self.path)
            except FileNotFoundError:
                return []
            self._tail.unsigned = self.header["version"] <= UNSIGNED
            self.space = self.header["space"]
        found = []
        for event in self._tail.read():
            try:
                evaluation = self._take(event)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise RunError(
                    f"{self.path}: cannot be read ({type(error).__name__}: {error} in {event}); "
                    "was the file edited?"
                ) from error
            if evaluation is not None:
                found.append(evaluation)
        return found

    def _take(self, event: Mapping[str, Any]) -> Evaluation | None:
        self.clock.advance(event)
        if event["event"] == "ask":
            self.running[event["id"]] = self.asks[event["id"]] = event
            self.hashes[event["id"]] = event["hash"]
        elif event["event"] == "promote" and (ask := self.asks.get(event["id"])):
            self.running[event["id"]] = {**ask, "time": event["time"]}
        elif event["event"] == "extend":
            self.space = event.get("space", self.space)
        elif event["event"] == "migrant":
            self.hashes[event["id"]] = event["hash"]
        elif event["event"] == "tell" and (ask := self.running.pop(event["id"], None)):
            return Evaluation(
                self.island,
                event["id"],
                ask["genome"],
                ask["hash"],
                ask["origin"],
                tuple(ask["parents"]),
                float(ask["time"]),
                float(event["time"]),
                outcome_of(event),
                float(event["seconds"]),
                event["metrics"],
            )
        return None


def best_first(evaluations: list[Evaluation]) -> list[Evaluation]:
    """Successful ones, each genome once: those of the highest rung first, the lowest fitness first."""
    ok = [(-e.rung, e.fitness, e.told, e) for e in evaluations if e.fitness is not None]
    unique: dict[str, Evaluation] = {}
    for *_, evaluation in sorted(ok, key=lambda entry: entry[:3]):
        unique.setdefault(evaluation.hash, evaluation)
    return list(unique.values())


def readers(place: Path, patience_s: float = 0.0) -> list[Reader]:
    """Of every search of a run folder, or of a single journal. RunError if there is none."""
    files = {MAIN: place} if place.is_file() else journals(place / "search")
    if not files:
        raise RunError(
            f"{place}: no search here (no search/{JOURNAL}). Expected a run folder, e.g. runs/NAME, "
            "or a journal; start one with: dmi search RECIPE"
        )
    return [Reader(name, path, patience_s) for name, path in files.items()]


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turn a failed read below `place` into a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{error.filename or place}: cannot be read: {error.strerror}") from error


def evaluations(place: Path) -> list[Evaluation]:
    """All finished evaluations of a run folder, or of a single journal, as `readers`."""
    with reading(place):
        return [evaluation for reader in readers(place) for evaluation in reader.poll()]
