"""Equal epochs: asynchronous workers that train epoch by epoch, with and without early stopping.

The learning curves are those of the LCBench surrogate. What is found after some epochs is the best
accuracy that any trial has shown at any epoch so far, for all arms alike: whoever trains keeps the best
checkpoint. Epochs of trials that still run count.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from search.evolution.evolve import Evolution, EvolutionConfig, Success
from search.evolution.fidelity import REDUCTION, Halving, Rungs, ladder
from search.spaces.parameters import Value
from searching.ours import Arm, Ours
from searching.rivals import ARMS, Random
from searching.structure import plain
from searching.tables import EPOCHS, LCBENCH, NOISE, LCBench, Optimiser, Problem, Values

LEAST_ERROR = 1e-3  # per cent

Curve = Callable[[Mapping[str, Value]], tuple[Values, float]]


class Stage(NamedTuple):
    """Training of one configuration from after epoch `first` to `last`."""

    token: Any
    config: Mapping[str, Value]
    first: int = 0
    last: int = EPOCHS


class Trainer(Protocol):
    """What `race_epochs` drives; any number of stages may be outstanding."""

    def ask(self) -> Stage: ...

    def goes_on(self, token: Any, epoch: int, score: float) -> bool:
        """Called after each epoch but the last of a stage, whether to train on."""

    def tell(self, token: Any, epoch: int, scores: Values) -> None:
        """A stage ended; scores: of the trial at all its epochs, (epoch,)."""


class ToTheEnd:
    """Every trial is trained to the end."""

    def __init__(self, optimiser: Optimiser) -> None:
        self._optimiser = optimiser

    def ask(self) -> Stage:
        found = self._optimiser.ask()
        assert found is not None, "LCBench is not a finite table"
        return Stage(*found)

    def goes_on(self, token: Any, epoch: int, score: float) -> bool:
        return True

    def tell(self, token: Any, epoch: int, scores: Values) -> None:
        self._optimiser.tell(token, float(scores.max()))


@dataclass(frozen=True)
class _Trial:
    """As much of a trial as Ray's scheduler looks at."""

    trial_id: str


class RayASHA:
    """Random configurations, stopped by ``ray.tune.schedulers.ASHAScheduler`` itself."""

    def __init__(self, problem: Problem, seed: int) -> None:
        from ray.tune.schedulers import ASHAScheduler

        self._draws = Random(problem, seed)
        self._scheduler = ASHAScheduler(
            metric="score", mode="max", max_t=EPOCHS, grace_period=1, reduction_factor=REDUCTION
        )
        self._asked = 0

    def ask(self) -> Stage:
        trial = _Trial(str(self._asked))
        self._asked += 1
        self._scheduler.on_trial_add(None, trial)
        return Stage(trial, self._draws.ask()[1])

    def goes_on(self, token: Any, epoch: int, score: float) -> bool:
        result = {"training_iteration": epoch, "score": score}
        decision = self._scheduler.on_trial_result(None, token, result)
        return bool(decision == self._scheduler.CONTINUE)

    def tell(self, token: Any, epoch: int, scores: Values) -> None:
        pass  # the rungs have it, and the draws are independent


class OursWithRungs:
    """Evolution under `search.evolution.fidelity.Halving`: trials pause at rungs, and some go on."""

    def __init__(
        self, problem: Problem, seed: int, *, rungs: tuple[int, ...], extrapolate: bool = False
    ) -> None:
        space, self._config = plain(problem)
        self._budgets = rungs
        evolution = Evolution(space, EvolutionConfig(seed=seed))
        self._halving = Halving(evolution, Rungs(rungs, REDUCTION, extrapolate=extrapolate))

    def ask(self) -> Stage:
        stage = self._halving.ask()
        first = self._budgets[stage.rung - 1] if stage.rung else 0
        config = self._config(stage.proposal.genome)
        return Stage(stage.proposal.id, config, first, self._budgets[stage.rung])

    def goes_on(self, token: Any, epoch: int, score: float) -> bool:
        return True

    def tell(self, token: Any, epoch: int, scores: Values) -> None:
        errors = np.maximum(100 - scores, LEAST_ERROR)  # per cent; the surrogate may exceed 100
        self._halving.tell(token, Success(float(errors.min())), errors.tolist())


def race_epochs(
    trainer: Trainer, curve: Curve, *, workers: int, epochs: int, seed: int
) -> tuple[Values, float]:
    """(epochs,) best score seen when that many epochs were trained; real seconds of the optimiser.

    curve: configuration -> (EPOCHS,) scores and the duration of one epoch.
    """
    rng = np.random.default_rng(seed)
    running: list[tuple[float, int, int]] = []  # (end of an epoch, number of the stage, the epoch)
    stages: list[tuple[Stage, Values, float]] = []
    best: list[float] = []
    now = spent = 0.0
    while len(best) < epochs:
        begin = time.perf_counter()
        if len(running) < workers:
            stage = trainer.ask()
            spent += time.perf_counter() - begin
            scores, seconds = curve(stage.config)
            seconds *= float(np.exp(NOISE * rng.standard_normal()))
            heapq.heappush(running, (now + seconds, len(stages), stage.first + 1))
            stages.append((stage, scores, seconds))
            continue
        now, number, epoch = heapq.heappop(running)
        stage, scores, seconds = stages[number]
        score = float(scores[epoch - 1])
        best.append(max(score, best[-1] if best else -np.inf))
        if epoch < stage.last and trainer.goes_on(stage.token, epoch, score):
            heapq.heappush(running, (now + seconds, number, epoch + 1))
        else:
            trainer.tell(stage.token, epoch, scores[:epoch])
        spent += time.perf_counter() - begin
    return np.array(best), spent


@cache
def _surrogate(path: Path) -> LCBench:
    return LCBench(path)


def lcbench_curve(surrogate: LCBench, task: str) -> Curve:
    """All epochs of one configuration of a data set; durations in the surrogate's seconds."""

    def curve(config: Mapping[str, Value]) -> tuple[Values, float]:
        row = np.array([config[name] for name in LCBENCH], dtype=np.float32)
        epochs = np.arange(1, EPOCHS + 1, dtype=np.float32)[:, None]
        found = surrogate(task, np.hstack([epochs, np.tile(row, (EPOCHS, 1))]))
        return found[:, 0], max(float(found[-1, 1]), 1e-6) / EPOCHS

    return curve


def _ours(problem: Problem, seed: int) -> Ours:
    return Ours(problem, Arm(), seed)


def _full(make: Callable[[Problem, int], Optimiser], problem: Problem, seed: int) -> Trainer:
    return ToTheEnd(make(problem, seed))


EPOCH_ARMS: Mapping[str, Callable[[Problem, int], Trainer]] = {
    "random": partial(_full, Random),
    "Ray ASHA": RayASHA,
    "Optuna TPE": partial(_full, ARMS["Optuna TPE"]),
    "DeepHyper CBO, UCB": partial(_full, ARMS["DeepHyper CBO, UCB"]),
    "ours": partial(_full, _ours),
    "ours, rungs": partial(OursWithRungs, rungs=ladder(1, EPOCHS, REDUCTION)),  # as ASHA's
    "ours, rungs 6 18": partial(OursWithRungs, rungs=(6, 18, EPOCHS)),
    "ours, rungs 13": partial(OursWithRungs, rungs=(13, EPOCHS)),
    "ours, rungs 6 18, extrapolated": partial(
        OursWithRungs, rungs=(6, 18, EPOCHS), extrapolate=True
    ),
    "ours, rungs 13, extrapolated": partial(OursWithRungs, rungs=(13, EPOCHS), extrapolate=True),
}


def epoch_line(
    surrogate: Path, problem: Problem, arm: str, seed: int, *, workers: int, budget: int
) -> dict[str, Any]:
    """One line of the results; best and regret after 1, 2 .. `budget` full trainings."""
    task = problem.name.removeprefix("lcbench_")
    found, spent = race_epochs(
        EPOCH_ARMS[arm](problem, seed),
        lcbench_curve(_surrogate(surrogate), task),
        workers=workers,
        epochs=budget * EPOCHS,
        seed=seed,
    )
    best = found[EPOCHS - 1 :: EPOCHS]
    return {
        "problem": problem.name,
        "group": "lcbench, budgets in full trainings",
        "arm": arm,
        "seed": seed,
        "workers": workers,
        "best": best.tolist(),
        "regret": [problem.regret(float(score)) for score in best],
        "optimiser_s": spent,
    }
