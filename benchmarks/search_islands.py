"""Islands on exhaustively trained tables: one search, islands that exchange migrants, islands apart.

    python benchmarks/search_islands.py TABLES [--islands 4] [--seeds 10] [--evaluations 200] [--every 8]

16 simulated workers in all, shared evenly among the islands; the same evaluations in all, and the best
of all islands counts. Every so many evaluations (`--every`, of all islands together) each island takes
in what the others have told. Regret = (best of table - found) / (best - median); lower is better.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from searching.ours import Arm, Ours
from searching.tables import Problem, problems, race

from search.evolution.evolve import Proposal
from search.records.islands import island_seed
from search.records.journal import adopt
from search.spaces.parameters import Value

WORKERS = 16
BUDGETS = (50, 100, 200)


class Archipelago:
    """Several searches as one optimiser: who has the fewest trials under way asks next."""

    def __init__(self, problem: Problem, count: int, seed: int, every: int) -> None:
        """every: evaluations between two exchanges; 0: none."""
        self._every, self._told = every, 0
        self._islands = [
            Ours(problem, Arm(), island_seed(seed, str(number)) % 2**32) for number in range(count)
        ]
        self._running = [0] * count
        self._seen = [0] * count  # tells that the others have taken in

    def ask(self) -> tuple[tuple[int, int], Mapping[str, Value]] | None:
        number = int(np.argmin(self._running))
        asked = self._islands[number].ask()
        if asked is None:
            return None
        self._running[number] += 1
        return (number, asked[0]), asked[1]

    def tell(self, token: tuple[int, int], score: float | None) -> None:
        number, identifier = token
        self._islands[number].tell(identifier, score)
        self._running[number] -= 1
        self._told += 1
        if self._every and self._told % self._every == 0:
            self._exchange()

    def _exchange(self) -> None:
        for number, island in enumerate(self._islands):
            evolution = island.evolution
            new = [i for i in list(evolution.outcomes)[self._seen[number] :] if i >= 0]
            for identifier in new:
                for other in self._islands:
                    if other is not island:
                        _take_in(other.evolution, evolution, identifier)
        self._seen = [len(island.evolution.outcomes) for island in self._islands]


def _take_in(evolution: Any, source: Any, identifier: int) -> None:
    foreign = source.proposals[identifier]
    if all(known.hash != foreign.hash for known in evolution.proposals.values()):
        number = min(0, min(evolution.proposals, default=0)) - 1
        migrant = Proposal(number, foreign.genome, "migrant", (), foreign.hash)
        adopt(evolution, migrant, source.outcomes[identifier])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tables", type=Path)
    parser.add_argument("--islands", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--every", type=int, default=8)
    given = parser.parse_args()
    arms = {
        "one search": (1, 0),
        "islands with migrants": (given.islands, given.every),
        "islands apart": (given.islands, 0),
    }
    budgets = [budget for budget in BUDGETS if budget <= given.evaluations]
    found: dict[str, list[list[float]]] = {name: [] for name in arms}
    for problem in problems(given.tables, lcbench=False):
        for seed in range(given.seeds):
            for name, (count, every) in arms.items():
                run = race(
                    Archipelago(problem, count, seed, every),
                    problem,
                    workers=WORKERS,
                    evaluations=given.evaluations,
                    seed=seed,
                )
                found[name].append([problem.regret(float(run.best[b - 1])) for b in budgets])
        print(f"{problem.name}: done", flush=True)
    print(f"{'mean normalised regret after':<30}", *(f"{budget:>8}" for budget in budgets))
    for name, regrets in found.items():
        print(f"{name:<30}", *(f"{value:8.3f}" for value in np.mean(regrets, axis=0)))


if __name__ == "__main__":
    main()
