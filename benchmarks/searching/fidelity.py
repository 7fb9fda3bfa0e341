"""LCBench with early stopping: who finds what within a number of epochs.

    PYTHONPATH=benchmarks python -m searching.fidelity TABLES/lcbench.onnx [--seeds 5] [--workers 1]

Every trial shows its validation accuracy after each epoch. What was found is the best accuracy seen
at any epoch of any trial so far. A full training is 52 epochs.
"""

from __future__ import annotations

import argparse
import heapq
from bisect import insort
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from search.evolution.evolve import Evolution, EvolutionConfig, Success
from search.evolution.fidelity import Halving, Rungs, ladder
from search.spaces.parameters import Parameters, Value
from searching.tables import EPOCHS, LCBENCH, LCBENCH_TASKS, LCBench, read_lcbench

Values = npt.NDArray[np.float64]
BUDGETS = (20, 50, 100)  # full trainings
NOISE = 0.3  # of the logarithm of a duration


class Curves:
    """Validation accuracy and seconds of a configuration after 1, 2, ... EPOCHS epochs."""

    def __init__(self, path: Path, task: str) -> None:
        self._surrogate, self._task = LCBench(path), task
        (problem,) = read_lcbench(path, (task,))
        self.regret = problem.regret

    def __call__(self, config: Mapping[str, Value]) -> tuple[Values, Values]:
        """(EPOCHS,) accuracy, (EPOCHS,) seconds."""
        x = np.tile(
            np.array([0.0, *(config[name] for name in LCBENCH)], dtype=np.float32), (EPOCHS, 1)
        )
        x[:, 0] = np.arange(1, EPOCHS + 1)
        found = self._surrogate(self._task, x)
        return found[:, 0], found[:, 1]


class Arm(Protocol):
    """A search that is asked for some epochs at a time."""

    def ask(self) -> tuple[int, Mapping[str, Value], int, int]:
        """(trial, configuration, epochs done, epochs to reach)."""

    def tell(self, trial: int, accuracies: Values) -> None:
        """The accuracies of the epochs asked for."""


class Evolving:
    """Ours: evolution over rungs."""

    def __init__(self, config: EvolutionConfig, budgets: tuple[int, ...], reduction: int) -> None:
        self._space = Parameters(LCBENCH)
        self._search = Halving(Evolution(self._space, config), Rungs(budgets, reduction))

    def ask(self) -> tuple[int, Mapping[str, Value], int, int]:
        stage = self._search.ask()
        budgets = self._search.rungs.budgets
        done = budgets[stage.rung - 1] if stage.rung else 0
        config = self._space.config(stage.proposal.genome)
        return stage.proposal.id, config, int(done), int(budgets[stage.rung])

    def tell(self, trial: int, accuracies: Values) -> None:
        self._search.tell(trial, Success(-float(accuracies.max())))


class Stopping:
    """Random configurations under the rule of Ray's ASHAScheduler: at each rung a trial goes on if
    it is in the best 1 / reduction of those that came there before, else it ends for good."""

    def __init__(self, seed: int, budgets: tuple[int, ...], reduction: int) -> None:
        self._space, self._rng = Parameters(LCBENCH), np.random.default_rng(seed)
        self._budgets, self._reduction = budgets, reduction
        self._seen: list[list[float]] = [[] for _ in budgets]
        self._configs: list[Mapping[str, Value]] = []
        self._rung: dict[int, int] = {}
        self._going: list[int] = []

    def ask(self) -> tuple[int, Mapping[str, Value], int, int]:
        if self._going:
            trial = self._going.pop()
            self._rung[trial] += 1
        else:
            trial = len(self._configs)
            self._configs.append(self._space.config(self._space.random(self._rng)))
            self._rung[trial] = 0
        rung = self._rung[trial]
        done = self._budgets[rung - 1] if rung else 0
        return trial, self._configs[trial], done, self._budgets[rung]

    def tell(self, trial: int, accuracies: Values) -> None:
        rung, accuracy = self._rung[trial], float(accuracies[-1])
        seen = self._seen[rung]
        cutoff = np.percentile(seen, 100 * (1 - 1 / self._reduction)) if seen else -np.inf
        insort(seen, accuracy)
        if accuracy >= cutoff and rung < len(self._budgets) - 1:
            self._going.append(trial)


ARMS = ("random", "ASHA stopping", "ASHA", "GA", "GA+SVM", "GA+rungs", "GA+SVM+rungs")


def make(arm: str, seed: int, least: int, reduction: int) -> Arm:
    budgets = ladder(least, EPOCHS, reduction)
    if arm == "ASHA stopping":
        return Stopping(seed, budgets, reduction)
    if arm in ("random", "ASHA"):
        config = EvolutionConfig(seed=seed, surrogate=False, initial=10**9)
    else:
        config = EvolutionConfig(seed=seed, surrogate="SVM" in arm)
    pauses = arm == "ASHA" or arm.endswith("rungs")
    return Evolving(config, budgets if pauses else (EPOCHS,), reduction)


def run(arm: Arm, curves: Curves, *, workers: int, seed: int) -> list[float]:
    """Regret after the epochs of each of BUDGETS full trainings, on asynchronous workers."""
    rng = np.random.default_rng(seed)
    running: list[
        tuple[float, int, int, Values]
    ] = []  # end, number of the stage, trial, accuracies
    known: dict[int, tuple[Values, Values]] = {}
    now, number, asked, spent, best = 0.0, 0, 0, 0, -np.inf
    found: list[float] = []
    while asked < EPOCHS * BUDGETS[-1] or running:
        if asked < EPOCHS * BUDGETS[-1] and len(running) < workers:
            trial, config, done, until = arm.ask()
            if trial not in known:
                known[trial] = curves(config)
            accuracy, seconds = known[trial]
            each = seconds[until - 1] / until * np.exp(NOISE * rng.standard_normal())
            end = now + each * (until - done)
            heapq.heappush(running, (end, number, trial, accuracy[done:until]))
            number, asked = number + 1, asked + until - done
            continue
        now, _, trial, accuracies = heapq.heappop(running)
        arm.tell(trial, accuracies)
        while len(found) < len(BUDGETS) and spent + len(accuracies) > EPOCHS * BUDGETS[len(found)]:
            found.append(best)
        spent += len(accuracies)
        best = max(best, float(accuracies.max()))
    found += [best] * (len(BUDGETS) - len(found))
    return [curves.regret(accuracy) for accuracy in found]


def _one(path: Path, workers: int, least: int, reduction: int, job: tuple[str, str, int]) -> Values:
    arm, task, seed = job
    made = make(arm, seed, least, reduction)
    return np.array(run(made, Curves(path, task), workers=workers, seed=seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("surrogate", type=Path, help="lcbench.onnx, its json files beside it")
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--least", type=int, default=13, help="epochs of the first rung")
    parser.add_argument("--reduction", type=int, default=4)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    one = partial(_one, options.surrogate, options.workers, options.least, options.reduction)
    print("regret, mean and median, after" + "".join(f"{n:>8}" for n in BUDGETS) + " trainings")
    with ProcessPoolExecutor(options.processes) as pool:
        for arm in options.arms:
            jobs = [(arm, task, seed) for task in LCBENCH_TASKS for seed in range(options.seeds)]
            regrets = np.array(list(pool.map(one, jobs)))
            both = (*regrets.mean(axis=0), *np.median(regrets, axis=0))
            print(f"{arm:16}" + "".join(f"{value:8.3f}" for value in both), flush=True)


if __name__ == "__main__":
    main()
