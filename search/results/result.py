"""What a search was for: its best networks trained in full from several seeds, and their ensemble.

RUN/search/refined/NAME.toml   recipe of a member; NAME is network-12-seed-7
RUN/search/refined/NAME/       its run folder: a training like any other
RUN/search/ensemble/           the ensemble, which `dmi_hpc.ensemble.load_ensemble` reads

Members may be trained elsewhere, e.g. by a job array: ``dmi train NAME.toml --out NAME --resume``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmi_hpc import collectives
from dmi_hpc.data.manifest import SplitName
from dmi_hpc.ensemble import save_ensemble, spread
from dmi_hpc.errors import RunError
from dmi_hpc.files import exclusive, write_text, writing
from dmi_hpc.predict import Model, load_model
from dmi_hpc.problem import Problem
from dmi_hpc.run import Run, open_run
from dmi_hpc.targets import Scale
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import Array
from dmi_hpc.world import World
from search.evolution.pareto import front
from search.records.history import Evaluation, best_first, evaluations
from search.results.calibration import calibrated, judged, nll
from search.results.recipes import to_toml, trained_with, training_recipe
from search.results.training_process import trained
from search.spaces.genome import decode, from_json
from search.spaces.recipe import recipe_space


@dataclass(frozen=True)
class Member:
    """One training of one found network."""

    found: Evaluation
    seed: int

    @property
    def name(self) -> str:
        return f"network-{self.found.name.replace(':', '-')}-seed-{self.seed}"


def front_of(found: Sequence[Evaluation], objectives: Sequence[str]) -> list[Evaluation]:
    """Those that none other beats in fitness and in all `objectives`, the best fitness first.

    objectives: names of metrics; an evaluation that lacks one does not count.
    """
    complete = [e for e in best_first(list(found)) if all(name in e.metrics for name in objectives)]
    rows = [[e.fitness, *(e.metrics[name] for name in objectives)] for e in complete]
    values = np.array(rows, dtype=np.float64).reshape(len(complete), 1 + len(objectives))
    return [complete[i] for i in front(values)]


def members_of(run: Run, top: int, seeds: int, networks: Sequence[str] = ()) -> list[Member]:
    """Which networks to train, each from `seeds` seeds: `networks` by name, else the `top` best.

    Raises RunError if there is no search, or a network has not been evaluated in it.
    """
    best = best_first(evaluations(run.folder))
    if networks:
        known = {found.name: found for found in best}
        if missing := [name for name in networks if name not in known]:
            raise RunError(
                f"network {', '.join(missing)}: no successful evaluation of that name in "
                f"{run.folder}. See: dmi search top {run.folder}"
            )
        best = [known[name] for name in dict.fromkeys(networks)]
    elif not best:
        raise RunError(
            f"{run.folder}: no evaluation has succeeded so far. See: dmi search status {run.folder}"
        )
    else:
        best = best[:top]
    return [Member(found, run.recipe.seed + i) for found in best for i in range(seeds)]


def prepare(run: Run, members: Sequence[Member]) -> Path:
    """Write the recipe of every member; returns the folder."""
    folder = run.search / "refined"
    space = recipe_space(run.recipe, make_task(run.recipe.task))
    for member in members:
        genome = from_json(member.found.genome)
        network = decode(genome, space.network)
        hyper = trained_with(genome, member.found.metrics)
        recipe = training_recipe(run.recipe, run.data, network, hyper, member.seed)
        named = recipe.model_copy(update={"name": f"{run.recipe.name}-{member.name}"})
        with writing(folder):
            write_text(folder / f"{member.name}.toml", to_toml(named))
    return folder


def refine(run: Run, members: Sequence[Member], say: Callable[[str], None]) -> dict[str, Any]:
    """Train all members, those that have finished excepted, and write the ensemble.

    Returns its scores (see ``search.results.calibration.judged``). A member whose training fails is
    left out, and said. Raises RunError if fewer than two are left, Interrupted at a stop signal:
    called again it continues.
    """
    with exclusive(run.search / "refined", "refinement"):
        folder = prepare(run, members)
        done: list[Member] = []
        for number, member in enumerate(members, 1):
            say(f"{member.name} ({number} of {len(members)})")
            failure = trained(folder / f"{member.name}.toml", folder / member.name)
            if failure is None:
                done.append(member)
            else:
                say(f"{member.name} failed and is left out: {failure}")
        if len(done) < 2:
            raise RunError(
                f"{folder}: {len(done)} of {len(members)} trainings succeeded, an ensemble needs 2: "
                "ask for more networks or seeds"
            )
        return _ensemble(run, folder, done)


@dataclass(frozen=True)
class Predictions:
    """Of one split, in the quantity's unit: values (members, n), truth (n,)."""

    values: Array
    truth: Array
    scale: Scale

    @property
    def maes(self) -> Array:
        """(members,) mean absolute errors."""
        return np.asarray(np.abs(self.values - self.truth).mean(axis=1))

    def error(self, chosen: Sequence[int]) -> Array:
        """(n,) of the mean of some members."""
        return self.scale.centre(self.values[list(chosen)]) - self.truth

    def spread(self, chosen: Sequence[int]) -> Array:
        """(n,) standard deviations over some members."""
        return spread(self.values[list(chosen)])


def _ensemble(run: Run, folder: Path, members: Sequence[Member]) -> dict[str, Any]:
    device = collectives.device_of(World())
    models = {m.name: load_model(open_run(folder / m.name), device) for m in members}
    problem = Problem.open(make_task(run.recipe.task), run.data)
    validation, test = (
        _predicted(list(models.values()), problem, name) for name in ("validation", "test")
    )
    chosen = selected(validation)
    errors = zip(validation.maes, test.maes, strict=True)
    scores: dict[str, Any] = {
        "quantity": problem.task.quantity.name,
        "unit": problem.task.quantity.unit,
        "members": [
            {
                "network": m.found.name,
                "seed": m.seed,
                "validation_mae": float(of_validation),
                "test_mae": float(of_test),
                "chosen": i in chosen,
            }
            for i, (m, (of_validation, of_test)) in enumerate(zip(members, errors, strict=True))
        ],
    }
    calibration = calibrated(validation.error(chosen), validation.spread(chosen))
    for name, split in (("validation", validation), ("test", test)):
        scores[name] = judged(split.error(chosen), split.spread(chosen), calibration)
    kept = {members[i].name: models[members[i].name] for i in chosen}
    with writing(run.search):
        save_ensemble(run.search / "ensemble", kept, calibration, scores)
    return scores


def selected(validation: Predictions) -> list[int]:
    """Members of the ensemble: in the order of their errors, each that does not make it worse.

    Worse: the errors are less likely under its calibrated uncertainty, so that accuracy and spread
    both count. At least two. After R. Caruana et al., "Ensemble selection from libraries of models",
    ICML 2004.
    """

    def loss(members: Sequence[int]) -> float:
        error, apart = validation.error(members), validation.spread(members)
        return nll(error, calibrated(error, apart).sigma(apart))

    first, second, *rest = np.argsort(validation.maes, kind="stable").tolist()
    chosen = [first, second]
    least = loss(chosen)
    for member in rest:
        found = loss([*chosen, member])
        if found <= least:
            chosen, least = [*chosen, member], found
    return chosen


def _predicted(models: Sequence[Model], problem: Problem, split: SplitName) -> Predictions:
    rows = problem.shards.rows(split)
    found = np.empty((len(models), len(rows)))
    for model, values in zip(models, found, strict=True):
        for part in model.of_rows(problem.shards, rows, World()):
            values[part.positions] = part.values
    fields = problem.shards.fields((problem.task.target_field,), np.asarray(rows))
    return Predictions(found, problem.target(fields), problem.scale)
