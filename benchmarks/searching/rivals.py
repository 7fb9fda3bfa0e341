"""Other people's optimisers behind the `Optimiser` of `searching.tables`: ask and tell, nothing else.

Every rival searches the same parameters in its own types: unordered choices stay unordered, log scales
stay log. A failed evaluation is told in the library's own way (Optuna: FAIL, DeepHyper: "F"). Settings
are the library's defaults unless the name of the arm or `ARMS` says otherwise. LEAP and Propulate,
which have no ask and tell, are in `rivals_evolution`.

Libraries are imported when an arm is made, so that one can do without those it does not run.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from search.spaces.parameters import Choice, Integer, Real, Value
from searching.rivals_evolution import Leap, Propulate
from searching.tables import Optimiser, Problem

INITIAL = 16  # random configurations of the arms that have no default of their own, one per worker


class Random:
    """Independent draws."""

    def __init__(self, problem: Problem, seed: int) -> None:
        self._parameters, self._rng = problem.parameters, np.random.default_rng([seed, 1])

    def ask(self) -> tuple[None, Mapping[str, Value]]:
        return None, {name: p.random(self._rng) for name, p in self._parameters.items()}

    def tell(self, token: None, score: float | None) -> None:
        pass


class Optuna:
    """Any Optuna sampler through ``Study.ask`` and ``Study.tell``, in memory."""

    def __init__(self, problem: Problem, seed: int, *, sampler: str, **options: Any) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():  # multivariate and constant_liar are called experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            made = getattr(optuna.samplers, sampler)(seed=seed, **options)
        self._study = optuna.create_study(direction="maximize", sampler=made)
        self._failed = optuna.trial.TrialState.FAIL
        self._parameters = problem.parameters

    def ask(self) -> tuple[Any, Mapping[str, Value]]:
        trial = self._study.ask()
        config: dict[str, Value] = {}
        for name, p in self._parameters.items():
            if isinstance(p, Choice):
                config[name] = trial.suggest_categorical(name, p.values)
            elif isinstance(p, Real):
                config[name] = trial.suggest_float(name, p.low, p.high, log=p.log)
            else:
                config[name] = trial.suggest_int(name, int(p.low), int(p.high), log=p.log)
        return trial, config

    def tell(self, token: Any, score: float | None) -> None:
        if score is None:
            self._study.tell(token, state=self._failed)
        else:
            self._study.tell(token, score)


class DeepHyper:
    """A search of DeepHyper through ``ask`` and ``tell``, one configuration at a time.

    That is how its own manager calls it when single workers become free. Choices are labels; as
    ordered integers they give CBO the same proposals. RegularizedEvolution repeats itself only under
    the same PYTHONHASHSEED.
    """

    def __init__(self, problem: Problem, seed: int, *, search: str, **options: Any) -> None:
        import deephyper.hpo

        self._choices: dict[str, dict[Any, Value]] = {}
        space = deephyper.hpo.HpProblem()
        for name, p in problem.parameters.items():
            if isinstance(p, Choice):
                labels = [str(place) for place in range(len(p.values))]
                self._choices[name] = dict(zip(labels, p.values, strict=True))
                space.add_hyperparameter(labels, name)
            else:
                whole = isinstance(p, Integer)
                ends = (int(p.low), int(p.high)) if whole else (float(p.low), float(p.high))
                space.add_hyperparameter((*ends, "log-uniform") if p.log else ends, name)
        self._folder = tempfile.TemporaryDirectory()  # it insists on a place for its log
        self._search = getattr(deephyper.hpo, search)(
            space,
            random_state=seed,
            log_dir=self._folder.name,
            checkpoint_history_to_csv=False,
            **options,
        )

    def ask(self) -> tuple[Any, Mapping[str, Value]]:
        with warnings.catch_warnings():  # "has been evaluated at this point before"
            warnings.simplefilter("ignore", UserWarning)
            (found,) = self._search.ask(1)
        config = {
            name: self._choices[name][value] if name in self._choices else value
            for name, value in found.items()
        }
        return found, config

    def tell(self, token: Any, score: float | None) -> None:
        self._search.tell([(token, "F" if score is None else score)])


SAMPLING: Mapping[str, Any] = {  # a cheap acquisition for many workers; CBO's best known setting
    "search": "CBO",
    "acq_func": "UCB",
    "acq_optimizer": "sampling",
    "multi_point_strategy": "qUCB",
    "acq_optimizer_kwargs": {"max_total_failures": -1},
}
ARMS: Mapping[str, Callable[[Problem, int], Optimiser]] = {
    "random": Random,
    "Optuna TPE": partial(Optuna, sampler="TPESampler", multivariate=True, constant_liar=True),
    "Optuna NSGA-II": partial(Optuna, sampler="NSGAIISampler"),
    "Optuna NSGA-II, 16": partial(Optuna, sampler="NSGAIISampler", population_size=INITIAL),
    "DeepHyper RegEvo": partial(DeepHyper, search="RegularizedEvolution"),
    "DeepHyper RegEvo, 16": partial(
        DeepHyper, search="RegularizedEvolution", population_size=INITIAL, sample_size=5
    ),
    "DeepHyper CBO": partial(
        DeepHyper, search="CBO", acq_optimizer_kwargs={"max_total_failures": -1}
    ),
    "DeepHyper CBO, UCB": partial(DeepHyper, **SAMPLING),
    "LEAP": partial(Leap, population=INITIAL),
    "LEAP, 32": partial(Leap, population=2 * INITIAL),
    "Propulate": partial(Propulate, population=2 * INITIAL),
    "Propulate, 16": partial(Propulate, population=INITIAL),
}
