"""Evaluations of a search on one clock, and the ancestry of a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


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
    the error, by names of metrics; population: breeding members; names: of networks as the commands
    say them, where a search has islands and the numbers here count over all of them.
    """

    trials: Mapping[int, Trial]
    elapsed: float
    workers: int | None
    resumed: tuple[float, ...] = ()
    objectives: tuple[str, ...] = ()
    population: int | None = None
    islands: int = 1
    names: Mapping[int, str] = field(default_factory=dict)

    def name(self, number: int) -> str:
        """Of a network, as ``dmi search top`` shows it."""
        return self.names.get(number, str(number))

    def number(self, name: str) -> int | None:
        """Inverse of `name`; None if there is no such network."""
        numbers = {self.name(number): number for number in self.trials}
        return numbers.get(name)

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
