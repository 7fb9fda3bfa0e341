"""The search journal as a table of evaluations on one clock, and the ancestry of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dmi_hpc.files import read_json_lines
from dmi_hpc.report.checked import validate


@dataclass(frozen=True)
class Trial:
    """One evaluation. Times in seconds of search (pauses between resumes do not count).

    Still running if neither `fitness` nor `failure` is set. metrics: the numbers it reported;
    predicted: what the surrogate thought of it before, lower is better, if it was asked.
    """

    id: int
    origin: str
    parents: tuple[int, ...]
    genome: Mapping[str, Any]
    asked: float
    told: float | None = None
    seconds: float = 0.0
    fitness: float | None = None
    failure: str | None = None
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    predicted: float | None = None


@dataclass(frozen=True)
class Search:
    """All evaluations by id.

    resumed: when the search was continued, on the same clock; objectives: what was minimised beside
    the error, by names of metrics; population: breeding members.
    """

    trials: Mapping[int, Trial]
    elapsed: float
    workers: int | None
    resumed: tuple[float, ...] = ()
    objectives: tuple[str, ...] = ()
    population: int | None = None

    @cached_property
    def finished(self) -> tuple[Trial, ...]:
        """Evaluations with a fitness, in the order in which they ended."""
        done = [trial for trial in self.own if trial.fitness is not None]
        return tuple(sorted(done, key=lambda trial: trial.told or 0.0))

    @cached_property
    def failed(self) -> tuple[Trial, ...]:
        return tuple(trial for trial in self.own if trial.failure is not None)

    @cached_property
    def own(self) -> tuple[Trial, ...]:
        """Without the migrants: what other islands evaluated, with ids below zero."""
        return tuple(trial for trial in self.trials.values() if trial.id >= 0)

    @property
    def unfinished(self) -> int:
        return len(self.own) - len(self.finished) - len(self.failed)

    @property
    def best(self) -> Trial | None:
        return min(self.finished, key=lambda trial: trial.fitness or 0.0, default=None)

    @property
    def utilisation(self) -> float | None:
        """Share of the workers' time spent in evaluations that ended; None if not known."""
        if not self.workers or self.elapsed <= 0:
            return None
        busy = sum(trial.seconds for trial in self.own)
        return busy / (self.workers * self.elapsed)

    def failures(self) -> list[tuple[str, int, str]]:
        """(kind, how many, message of the last one), the most frequent kind first."""
        last = {trial.failure or "": trial.message for trial in self.failed}
        kinds = [trial.failure for trial in self.failed]
        return sorted(
            ((kind, kinds.count(kind), message) for kind, message in last.items()),
            key=lambda entry: (-entry[1], entry[0]),
        )


@dataclass(frozen=True)
class _Event:
    event: str
    time: float
    config: dict[str, Any] = field(default_factory=dict)


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


def read_search(path: Path) -> Search:
    """Replay the journal. An answer without its question (torn by a crash) is ignored."""
    trials: dict[int, Trial] = {}
    resumed: list[float] = []
    config = _Config()
    last: float | None = None
    clock = 0.0
    for line in read_json_lines(path):
        event = validate(line, _Event, path)
        if event.event == "resume":
            resumed.append(clock)
        elif last is not None:
            clock += max(0.0, event.time - last)
        last = event.time
        if event.event == "header":
            config = validate(event.config, _Config, path)
        if event.event in ("ask", "migrant"):
            ask = validate(line, _Ask, path)
            origin = ask.origin if event.event == "ask" else "migrant"
            trials[ask.id] = Trial(
                ask.id, origin, ask.parents, ask.genome, clock, predicted=ask.predicted
            )
        if event.event in ("tell", "migrant"):
            tell = validate(line, _Tell, path)
            if tell.id in trials:
                trials[tell.id] = _told(trials[tell.id], tell, clock)
    objectives = tuple(name for name in config.objectives if name != "error")
    return Search(trials, clock, config.workers, tuple(resumed), objectives, config.population)


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


def ancestors(search: Search, trial_id: int, depth: int) -> dict[int, list[Trial]]:
    """Generations back from a trial: 0 is the trial itself; within one, by fitness.

    An ancestor stands one generation before the earliest of its descendants shown, so that lines
    run forward. Generations beyond `depth` are left out, so the last may hold parents of its own.
    """
    level = {trial_id: 0} if trial_id in search.trials else {}
    # Parents are asked before their children: falling ids visit every child before its parents.
    for current in sorted(search.trials, reverse=True):
        if level.get(current, depth) >= depth:
            continue
        for parent in known_parents(search, search.trials[current]):
            level[parent.id] = max(level.get(parent.id, 0), level[current] + 1)
    generations: dict[int, list[Trial]] = {}
    for trial in sorted((search.trials[key] for key in level), key=_rank):
        generations.setdefault(level[trial.id], []).append(trial)
    return dict(sorted(generations.items()))


def lineage(search: Search, trial_id: int) -> list[Trial]:
    """From the oldest ancestor to the trial, each time through the fitter parent."""
    line = [search.trials[trial_id]] if trial_id in search.trials else []
    while line and (parents := known_parents(search, line[0])):
        line.insert(0, min(parents, key=_rank))
    return line


def known_parents(search: Search, trial: Trial) -> list[Trial]:
    return [search.trials[key] for key in trial.parents if key < trial.id and key in search.trials]


def _rank(trial: Trial) -> tuple[float, int]:
    return (float("inf") if trial.fitness is None else trial.fitness, trial.id)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two genomes, one phrase per gene, e.g. ``conv 2 filters: 32 → 64``."""
    return _changes("", before, after)


def _changes(name: str, before: Any, after: Any) -> list[str]:
    if before == after:
        return []
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = [*before, *(key for key in after if key not in before)]
        return [
            line
            for key in keys
            for line in _changes(f"{name} {key}".strip(), before.get(key), after.get(key))
        ]
    if isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            return [f"{name}: {len(before)} → {len(after)} blocks"]
        pairs = enumerate(zip(before, after, strict=True), start=1)
        return [line for i, (a, b) in pairs for line in _changes(f"{name} {i}", a, b)]
    return [f"{name}: {_value(before)} → {_value(after)}"]


def _value(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
