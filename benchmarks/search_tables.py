"""Search algorithms on exhaustively trained tables: normalised regret, median over seeds.

    python benchmarks/search_tables.py TABLES [--seeds 10] [--workers 16]

TABLES holds NAS-Bench-Graph and NAS-Bench-Macro as ``nbgraph_*.h5`` and ``macro_*.h5``. Workers are
simulated. Regret = (best of table - found) / (best of table - median of table); lower is better.
Table genomes are sets of categories, so these are hyper-parameters of an empty network here; they
measure selection, duplicate removal and surrogate, not the operators on blocks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from dmi_hpc.models.space import Choice, NetworkSpace, SearchSpace
from search.evolve import Evolution, EvolutionConfig, Failure, Outcome, Success
from search.genome import Genome
from search.networks import Networks
from search.simulate import simulate

BUDGETS = (50, 100, 200)
ARMS = {
    "random": {"surrogate": False, "initial": max(BUDGETS)},
    "GA": {"surrogate": False},
    "GA+SVM": {"surrogate": True},
}
NO_NETWORK = NetworkSpace(input_shape=(1,), dense_blocks=(0, 0))


@dataclass(frozen=True)
class Table:
    """values: score by position of each gene; NaN where the network was invalid."""

    values: np.ndarray

    @property
    def space(self) -> SearchSpace:
        choices = {
            f"gene{axis}": Choice(values=tuple(range(n)))
            for axis, n in enumerate(self.values.shape)
        }
        return SearchSpace(network=NO_NETWORK, hyper=choices)

    def evaluate(self, durations: np.random.Generator, genome: Genome) -> tuple[Outcome, float]:
        score = float(self.values[tuple(value for _, value in genome.hyper)])
        outcome: Outcome = Failure("invalid") if np.isnan(score) else Success(-score)
        return outcome, float(durations.lognormal(0.0, 0.3))

    def regret(self, fitness: float) -> float:
        best, median = np.nanmax(self.values), np.nanmedian(self.values)
        return (best + fitness) / (best - median)


def read_table(path: Path) -> Table:
    with h5py.File(path) as file:
        if "index" in file:
            return Table(file["results"][:, 0].astype(float)[file["index"][...]])
        genes, accuracy = file["genes"][...], file["mean_accuracy"][...]
    values = np.full(genes.max(axis=0) + 1, np.nan)
    values[tuple(genes.T)] = accuracy
    return Table(values)


def regrets(table: Table, arm: str, workers: int, seed: int) -> list[float]:
    """Regret of one search at each of BUDGETS."""
    evolution = Evolution(Networks(table.space), EvolutionConfig(seed=seed, **ARMS[arm]))
    evaluate: Callable = partial(table.evaluate, np.random.default_rng(seed))
    best = simulate(evolution, evaluate, workers, max(BUDGETS)).best
    return [table.regret(best[budget - 1]) for budget in BUDGETS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    paths = [p for stem in ("nbgraph_*.h5", "macro_*.h5") for p in options.tables.glob(stem)]
    if not paths:
        parser.error(f"no nbgraph_*.h5 or macro_*.h5 in {options.tables}")
    print(f"{'table':22}{'arm':9}" + "".join(f"{budget:>8}" for budget in BUDGETS))
    with ProcessPoolExecutor(options.processes) as pool:
        for path in sorted(paths):
            table = read_table(path)
            for arm in ARMS:
                run = partial(regrets, table, arm, options.workers)
                medians = np.median(list(pool.map(run, range(options.seeds))), axis=0)
                print(f"{path.stem:22}{arm:9}" + "".join(f"{value:8.3f}" for value in medians))


if __name__ == "__main__":
    main()
