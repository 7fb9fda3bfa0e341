"""What a search did, in numbers: its operators, its workers, its surrogate, its diversity."""

from __future__ import annotations

import heapq
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from dmi_hpc.report.evaluations import Search, Trial, known_parents
from dmi_hpc.report.genes import distances, genes

WINDOW = 16  # evaluations compared with each other, unless the population has another size
MOST_POINTS = 120  # of a curve
LEAST_PREDICTED = 8


@dataclass(frozen=True)
class Operator:
    """What one origin of networks brought.

    better: children with a lower fitness than their best parent, of `bred` with a known one; records:
    new best of the search; rank: median place among all fitnesses, 0 the best, 1 the worst.
    """

    origin: str
    asked: int
    failed: int
    bred: int
    better: int
    records: int
    rank: float | None


def operators(search: Search) -> list[Operator]:
    """Each origin of networks, in the order of its first use."""
    fitness = [trial.fitness or 0.0 for trial in search.finished]
    places = (rankdata(fitness) - 1) / max(1, len(fitness) - 1)
    place = {t.id: float(p) for t, p in zip(search.finished, places, strict=True)}
    best_before = np.minimum.accumulate([np.inf, *fitness])[:-1]
    records = {t.id for t, best in zip(search.finished, best_before, strict=True) if _is(t, best)}
    by_origin: dict[str, list[Trial]] = {}
    for trial in search.own:
        by_origin.setdefault(trial.origin, []).append(trial)
    return [_operator(search, origin, of, place, records) for origin, of in by_origin.items()]


def _is(trial: Trial, best: float) -> bool:
    return trial.fitness is not None and trial.fitness < best


def _operator(
    search: Search, origin: str, trials: Sequence[Trial], place: dict[int, float], records: set[int]
) -> Operator:
    pairs = []
    for trial in trials:
        known = [p.fitness for p in known_parents(search, trial) if p.fitness is not None]
        if known and trial.fitness is not None:
            pairs.append((trial.fitness, min(known)))
    places = [place[trial.id] for trial in trials if trial.id in place]
    return Operator(
        origin,
        asked=len(trials),
        failed=sum(trial.failure is not None for trial in trials),
        bred=len(pairs),
        better=sum(child < parent for child, parent in pairs),
        records=sum(trial.id in records for trial in trials),
        rank=float(np.median(places)) if places else None,
    )


@dataclass(frozen=True)
class Bar:
    """One evaluation on the lane of a worker; times in seconds of search."""

    lane: int
    begin: float
    end: float
    trial: Trial


def lanes(search: Search) -> list[Bar]:
    """Evaluations laid on as few lanes as hold them without overlap, by their beginning.

    The journal does not name workers: a lane is one as far as one can tell from the times.
    """
    spans = []
    for trial in search.own:
        begin = trial.asked if trial.told is None else max(0.0, trial.told - trial.seconds)
        spans.append((begin, trial.id, search.elapsed if trial.told is None else trial.told))
    busy: list[tuple[float, int]] = []  # (end, lane), a heap
    free: list[int] = []
    bars = []
    for begin, number, end in sorted(spans):
        while busy and busy[0][0] <= begin:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (end, lane))
        bars.append(Bar(lane, begin, end, search.trials[number]))
    return bars


Curve = list[tuple[int, float]]  # (finished evaluations, value)


@dataclass(frozen=True)
class Diversity:
    """distance: mean between two of the latest networks, 0 to 1; structures: how many different ones
    (without the hyper-parameters) are among them, as a share."""

    distance: Curve
    structures: Curve


def diversity(search: Search) -> Diversity:
    """Of the latest evaluations with a fitness, as many as breed (else `WINDOW`), over time."""
    window = search.population or WINDOW
    done = search.finished
    columns = genes([trial.genome for trial in done])
    if len(done) < window or not columns:
        return Diversity([], [])
    structure = [
        json.dumps({k: v for k, v in trial.genome.items() if k != "hyper"}, sort_keys=True)
        for trial in done
    ]
    distance, structures = [], []
    for end in _some(window, len(done)):
        latest = slice(end - window, end)
        apart = distances(columns, latest).sum() / (window * (window - 1))
        distance.append((end, float(apart)))
        structures.append((end, len(set(structure[latest])) / window))
    return Diversity(distance, structures)


def surrogate_quality(search: Search) -> Curve:
    """Rank correlation of prediction and fitness in a sliding window of the screened evaluations.

    1: it orders them perfectly; 0: it knows nothing. Only what it had chosen was evaluated, so that
    this is less than its correlation over all candidates.
    """
    done = [t for t in search.finished if t.predicted is not None]
    window = max(LEAST_PREDICTED, len(done) // 5)
    place = {trial.id: i for i, trial in enumerate(search.finished, 1)}
    curve = []
    for end in _some(window, len(done)):
        latest = done[end - window : end]
        predicted = rankdata([t.predicted or 0.0 for t in latest])
        fitness = rankdata([t.fitness or 0.0 for t in latest])
        if np.ptp(predicted) and np.ptp(fitness):
            correlation = float(np.corrcoef(predicted, fitness)[0, 1])
            curve.append((place[latest[-1].id], correlation))
    return curve


def _some(first: int, last: int) -> list[int]:
    """At most about `MOST_POINTS` numbers from `first` to `last`, both included."""
    numbers = list(range(first, last + 1, max(1, (last - first) // MOST_POINTS + 1)))
    return [*numbers, last] if numbers and numbers[-1] != last else numbers


def staircase(trials: Sequence[Trial], cost: str) -> list[tuple[float, float]]:
    """(cost, fitness) of those that none of `trials` beats in both, by rising cost."""
    found: list[tuple[float, float]] = []
    for x, y in sorted((trial.metrics[cost], trial.fitness or 0.0) for trial in trials):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found
