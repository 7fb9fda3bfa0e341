"""Several objectives on tables of trained networks: error, latency (or FLOPs) and parameters.

    PYTHONPATH=. python benchmarks/search_pareto.py TABLES [--seeds 10] [--evaluations 200]

TABLES: folder with ``nbgraph_*.h5`` or ``macro_*.h5``. Prints the share of the hypervolume of the whole
table's front that each arm has found; the table knows the true one. Objectives are scaled to 0 .. 1
between the least value and the median of the table (costs by their logarithm); worse than the median in
one of them counts nothing. With Optuna installed its NSGA-II runs too.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import numpy.typing as npt

from search.evolution.evolve import Evolution, EvolutionConfig, Failure, Success
from search.evolution.pareto import hypervolume
from search.spaces.parameters import Choice, Parameters, Value

WORKERS = 16
Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Table:
    """objectives: (choices of each gene ..., 3), scaled; nan where an evaluation fails."""

    name: str
    objectives: Values

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"gene{i}" for i in range(self.objectives.ndim - 1))

    @property
    def spec(self) -> dict[str, Choice]:
        sizes = zip(self.names, self.objectives.shape, strict=False)
        return {name: Choice(values=tuple(range(size))) for name, size in sizes}

    def __call__(self, config: Mapping[str, Value]) -> Values | None:
        found: Values = self.objectives[tuple(int(config[name] or 0) for name in self.names)]
        return None if np.isnan(found).any() else found


def read_table(path: Path) -> Table:
    with h5py.File(path) as file:
        if "index" in file:
            score, _, latency, parameters = file["results"][...].astype(float).T
            columns = np.stack([-score, np.log(latency), np.log(parameters)], axis=1)
            objectives = columns[file["index"][...]]
        else:
            genes = file["genes"][...]
            columns = np.stack(
                [
                    -file["mean_accuracy"][...].astype(float),
                    np.log(file["flops"][...]),
                    np.log(file["params"][...]),
                ],
                axis=1,
            )
            objectives = np.full((*(genes.max(axis=0) + 1), 3), np.nan)
            objectives[tuple(genes.T)] = columns
    least, middle = np.nanmin(columns, axis=0), np.nanmedian(columns, axis=0)
    return Table(path.stem, (objectives - least) / (middle - least))


class Arm(Protocol):
    def ask(self) -> tuple[Any, Mapping[str, Value]]: ...
    def tell(self, token: Any, found: Values | None) -> None: ...


class Ours:
    """evolution: with all objectives, or with the error alone."""

    def __init__(self, table: Table, seed: int, *, several: bool) -> None:
        self._several = several
        self._evolution = Evolution(Parameters(table.spec), EvolutionConfig(seed=seed))

    def ask(self) -> tuple[int, Mapping[str, Value]]:
        proposal = self._evolution.ask()
        return proposal.id, dict(proposal.genome)

    def tell(self, token: int, found: Values | None) -> None:
        if found is None:
            self._evolution.tell(token, Failure("invalid"))
            return
        first, *others = found.tolist()
        self._evolution.tell(token, Success(first, tuple(others) if self._several else ()))


class Random:
    def __init__(self, table: Table, seed: int) -> None:
        self._spec, self._rng = table.spec, np.random.default_rng([seed, 1])

    def ask(self) -> tuple[None, Mapping[str, Value]]:
        return None, {name: choice.random(self._rng) for name, choice in self._spec.items()}

    def tell(self, token: None, found: Values | None) -> None:
        pass


class Nsga2:
    """Optuna's, with the population of ours."""

    def __init__(self, table: Table, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        size = EvolutionConfig().population
        sampler = optuna.samplers.NSGAIISampler(seed=seed, population_size=size)
        self._failed = optuna.trial.TrialState.FAIL
        self._study = optuna.create_study(directions=["minimize"] * 3, sampler=sampler)
        self._spec = table.spec

    def ask(self) -> tuple[Any, Mapping[str, Value]]:
        trial = self._study.ask()
        return trial, {n: trial.suggest_categorical(n, c.values) for n, c in self._spec.items()}

    def tell(self, token: Any, found: Values | None) -> None:
        if found is None:
            self._study.tell(token, state=self._failed)
        else:
            self._study.tell(token, found.tolist())


ARMS: dict[str, Callable[[Table, int], Arm]] = {
    "ours, all objectives": lambda table, seed: Ours(table, seed, several=True),
    "ours, error alone": lambda table, seed: Ours(table, seed, several=False),
    "random": Random,
}


def run(table: Table, arm: Arm, seed: int, evaluations: int) -> Values:
    """(n, 3) what was found, on simulated asynchronous workers with log-normal durations."""
    seconds = np.exp(0.3 * np.random.default_rng(seed).standard_normal(evaluations))
    running: list[tuple[float, int, Any, Values | None]] = []
    all_found: list[Values] = []
    now, asked = 0.0, 0
    while asked < evaluations or running:
        if asked < evaluations and len(running) < WORKERS:
            token, config = arm.ask()
            heapq.heappush(running, (now + float(seconds[asked]), asked, token, table(config)))
            asked += 1
            continue
        now, _, token, found = heapq.heappop(running)
        arm.tell(token, found)
        if found is not None:
            all_found.append(found)
    return np.array(all_found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--evaluations", type=int, default=200)
    options = parser.parse_args()
    arms = dict(ARMS)
    if importlib.util.find_spec("optuna"):
        arms["Optuna NSGA-II"] = Nsga2
    paths = sorted([*options.tables.glob("nbgraph_*.h5"), *options.tables.glob("macro_*.h5")])
    reference = np.ones(3)
    lines = [f"| table | {' | '.join(arms)} |", "|---|" + "---|" * len(arms)]
    for path in paths:
        table = read_table(path)
        known = table.objectives.reshape(-1, 3)
        whole = hypervolume(known[~np.isnan(known).any(1)], reference)
        row = []
        for make in arms.values():
            shares = [
                hypervolume(run(table, make(table, seed), seed, options.evaluations), reference)
                / whole
                for seed in range(options.seeds)
            ]
            row.append(f"{np.mean(shares):.3f} ± {np.std(shares, ddof=1):.3f}")
        lines.append(f"| {table.name} | {' | '.join(row)} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
