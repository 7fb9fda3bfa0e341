"""Discrete-event simulation of a search: the same ask and tell, workers that cost nothing.

Shows how a search behaves with any number of workers and any distribution of durations, within
minutes and without a cluster.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from search.base import G
from search.evolve import Evolution, Outcome, SpaceExhausted, Success


@dataclass(frozen=True)
class Trace:
    """Finished evaluations in the order of their end.

    ids: (n,) int64; times: (n,) simulated seconds; best: (n,) best fitness so far, inf before the
    first success; utilisation: busy share of all workers until the last end.
    """

    ids: npt.NDArray[np.int64]
    times: npt.NDArray[np.float64]
    best: npt.NDArray[np.float64]
    utilisation: float


def simulate(
    evolution: Evolution[G],
    evaluate: Callable[[G], tuple[Outcome, float]],
    workers: int,
    evaluations: int,
) -> Trace:
    """Run `evaluations` in all on `workers`; a worker asks as soon as it is free.

    evaluate: outcome and duration in seconds.
    Ends early if the space is exhausted. Equal end times are told in the order of the asks.
    """
    running: list[tuple[float, int, Outcome]] = []  # (end, id, outcome), a heap on the end
    ids: list[int] = []
    times: list[float] = []
    best: list[float] = []
    now = busy = 0.0
    left = evaluations
    while left or running:
        while left and len(running) < workers:
            try:
                proposal = evolution.ask()
            except SpaceExhausted:
                left = 0
                break
            outcome, seconds = evaluate(proposal.genome)
            heapq.heappush(running, (now + seconds, proposal.id, outcome))
            busy += seconds
            left -= 1
        if not running:
            break
        now, identifier, outcome = heapq.heappop(running)
        outcome = evolution.tell(identifier, outcome)
        fitness = outcome.fitness if isinstance(outcome, Success) else np.inf
        ids.append(identifier)
        times.append(now)
        best.append(min(fitness, best[-1] if best else np.inf))
    total = workers * now
    return Trace(np.array(ids), np.array(times), np.array(best), busy / total if total else 0.0)
