"""The journals of a search as one table of evaluations: of one search, or of all its islands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dmi_hpc.files import read_json_lines
from dmi_hpc.report.checked import validate
from dmi_hpc.report.evaluations import Search, Trial

FILE = "journal.jsonl"
MAIN = "main"  # the search that is no island
_Home = tuple[str, int]  # an island, and the number of a network there


@dataclass(frozen=True)
class _Event:
    event: str
    time: float
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Source:
    island: str
    id: int


@dataclass(frozen=True)
class _Ask:
    id: int
    time: float
    genome: dict[str, Any] = field(default_factory=dict)
    origin: str = "unknown"
    parents: tuple[int, ...] = ()
    predicted: float | None = None


@dataclass(frozen=True)
class _Config:
    """What the header's ``config`` says of the search, as far as it is shown."""

    workers: int | None = None
    objectives: tuple[str, ...] = ()
    population: int | None = None


@dataclass(frozen=True)
class _Tell:
    id: int
    time: float
    status: str
    fitness: float | None = None
    failure: str | None = None
    message: str = ""
    seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Journal:
    """One of them. began: seconds since 1970; homes: where its migrants are from, and those networks
    of its own that another island had evaluated already."""

    search: Search
    began: float
    homes: Mapping[int, _Home]


def read_searches(folder: Path) -> Search | None:
    """All there is in ``RUN/search``, islands included; None if nothing is."""
    paths = {path.parent.name: path for path in sorted(folder.glob(f"islands/*/{FILE}"))}
    if (folder / FILE).exists():
        paths = {MAIN: folder / FILE, **paths}
    journals = {island: _read(path) for island, path in paths.items()}
    if set(journals) <= {MAIN}:
        return next((journal.search for journal in journals.values()), None)
    return _together(journals)


def read_search(path: Path) -> Search:
    """Replay one journal. An answer without its question (torn by a crash) is ignored."""
    return _read(path).search


def _read(path: Path) -> _Journal:
    trials: dict[int, Trial] = {}
    homes: dict[int, _Home] = {}
    resumed: list[float] = []
    config = _Config()
    began, last = 0.0, None
    clock = 0.0
    for line in read_json_lines(path):
        event = validate(line, _Event, path)
        if event.event == "resume":
            resumed.append(clock)
        elif last is not None:
            clock += max(0.0, event.time - last)
        last = event.time
        if event.event == "header":
            config, began = validate(event.config, _Config, path), event.time
        if event.event in ("ask", "migrant"):
            ask = validate(line, _Ask, path)
            origin = ask.origin if event.event == "ask" else "migrant"
            trials[ask.id] = Trial(
                ask.id, origin, ask.parents, ask.genome, clock, predicted=ask.predicted
            )
        if event.event == "migrant" and "from" in line:
            source = validate(line["from"], _Source, path)
            homes[ask.id] = (source.island, source.id)
        if event.event in ("tell", "migrant"):
            tell = validate(line, _Tell, path)
            if tell.id in trials:
                trials[tell.id] = _told(trials[tell.id], tell, clock)
            if isinstance(name := tell.metrics.get("evaluated_as"), str):
                homes[tell.id] = _home(name)
    objectives = tuple(name for name in config.objectives if name != "error")
    search = Search(trials, clock, config.workers, tuple(resumed), objectives, config.population)
    return _Journal(search, began, homes)


def _home(name: str) -> _Home:
    """Of a network's name: its number, on an island with the island's name before it."""
    island, _, number = name.rpartition(":")
    return island or MAIN, int(number)


def _told(trial: Trial, tell: _Tell, clock: float) -> Trial:
    succeeded = tell.status == "ok"
    return replace(
        trial,
        told=clock,
        seconds=tell.seconds,
        fitness=tell.fitness if succeeded else None,
        failure=None if succeeded else (tell.failure or tell.status),
        message=tell.message,
        metrics={
            name: float(value)
            for name, value in tell.metrics.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        },
    )


def _together(journals: Mapping[str, _Journal]) -> Search:
    """Islands as one search: networks numbered in the order in which they began, each once.

    Every island has its own clock, without its pauses; they are set by when it first began.
    """
    began = min(journal.began for journal in journals.values())
    late = {island: journal.began - began for island, journal in journals.items()}
    found = sorted(
        (trial.asked + late[island], island, trial.id)
        for island, journal in journals.items()
        for trial in journal.search.own
        if trial.id not in journal.homes
    )
    numbers = {(island, old): number for number, (_, island, old) in enumerate(found)}
    trials = {}
    for (island, old), number in numbers.items():
        journal, after = journals[island], late[island]
        trial = journal.search.trials[old]
        parents = (numbers.get(journal.homes.get(p, (island, p))) for p in trial.parents)
        trials[number] = replace(
            trial,
            id=number,
            parents=tuple(parent for parent in parents if parent is not None),
            asked=trial.asked + after,
            told=None if trial.told is None else trial.told + after,
        )
    searches = {island: journal.search for island, journal in journals.items()}
    known = [search.workers for search in searches.values() if search.workers]
    resumed = (late[island] + at for island, search in searches.items() for at in search.resumed)
    first = next(iter(searches.values()))
    return Search(
        trials,
        max(late[island] + search.elapsed for island, search in searches.items()),
        sum(known) or None,
        tuple(sorted(resumed)),
        first.objectives,
        first.population,
        islands=len(searches),
        names={n: str(old) if i == MAIN else f"{i}:{old}" for (i, old), n in numbers.items()},
    )
