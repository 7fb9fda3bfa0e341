"""Epochs that inherited weights save: children with weights of a parent against the same from
scratch.

    python benchmarks/search_inheritance.py
    python benchmarks/search_inheritance.py --compositions expt_deltae.csv:pretty_comp:delta_e

Tasks: effective stiffness of two-phase volumes made by our solver, and any number of composition
properties, FILE:FORMULA:VALUE each. For every seed four random networks are trained. Children are by
turns a mutation of the best of them, and its crossover with another. One that may inherit (``heritage``
of the search says so) is trained with weights of a parent and from scratch; nothing else differs.

Own schedules: a training of its own for each number of epochs, the schedule of the learning rate as
long as it, as a search would train. The ratio is the least number after which the child errs no more
than from scratch after all epochs, by these. One schedule: within one training of all epochs the epoch
at which it does, by that at which the other one did: errors fall at the end of a schedule, so this is
hard on what inherits. A child that never does counts as twice all epochs. Errors are the lowest of
validation; means of errors are geometric. The parent's own epochs come on top.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean, mean, median

import numpy as np
import torch
from loading.report import machine, markdown
from searching.tasks import Case, composition, stiffness

from dmi_hpc import checkpoint
from dmi_hpc.job import Job
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.train import fit
from search.records.kept import Trained
from search.spaces.genome import Genome, decode
from search.spaces.networks import Networks
from search.trials.ending import Deadline
from search.trials.heritage import beginning_with, heritage
from search.trials.trial import trial_config

RANDOM = 4
EPOCHS, HALF, LENGTHS = 12, 6, (2, 3, 4, 6, 8, 12)
FIRST_SEED = 100  # when weights are worth inheriting was decided on children of seeds below 20


@dataclass(frozen=True)
class Pair:
    """Lowest errors up to each epoch of trainings of so many: with inherited weights, from scratch."""

    inherits: dict[int, list[float]]
    anew: dict[int, list[float]]

    @property
    def bar(self) -> float:
        return self.anew[EPOCHS][-1]

    @property
    def own_schedules(self) -> float:
        lengths = (n for n, errors in self.inherits.items() if errors[-1] <= self.bar)
        return next(lengths, 2 * EPOCHS) / EPOCHS

    @property
    def one_schedule(self) -> float:
        reached = (n for n, error in enumerate(self.inherits[EPOCHS], 1) if error <= self.bar)
        return next(reached, 2 * EPOCHS) / (self.anew[EPOCHS].index(self.bar) + 1)


@dataclass(frozen=True)
class Trainer:
    """Trainings of one seed, as in a search."""

    case: Case
    seed: int
    problem: Problem

    def job(self, genome: Genome, epochs: int) -> Job:
        recipe, network = self.case.recipe(self.seed), decode(genome, self.case.space().network)
        config = trial_config(recipe, genome).model_copy(update={"epochs": epochs})
        return Job(self.problem, network, config, self.seed)

    def parent(self, genome: Genome) -> Trained:
        with tempfile.TemporaryDirectory() as folder:
            job = replace(self.job(genome, EPOCHS), checkpoints=Path(folder))
            error = _errors(job)[-1]
            path, _ = checkpoint.best(Path(folder), _unheard)
            return Trained(job.network, checkpoint.read_weights(path), EPOCHS, error)

    def pair(
        self, child: Genome, parents: Sequence[tuple[int, Trained]], number: int
    ) -> Pair | None:
        """None if the child is not to inherit."""
        found = heritage(self.job(child, EPOCHS), parents, number)
        if found is None:
            return None
        anew = {epochs: _errors(self.job(child, epochs)) for epochs in (HALF, EPOCHS)}
        inherits = {}
        with tempfile.TemporaryDirectory() as folder:
            for epochs in LENGTHS:
                job = beginning_with(self.job(child, epochs), found.weights, Path(folder))
                inherits[epochs] = _errors(job)
        return Pair(inherits, anew)


def _errors(job: Job) -> list[float]:
    """The lowest error up to each epoch."""
    history = fit(job, Deadline(None), resume=False, warn=_unheard).history
    return np.minimum.accumulate([epoch.validation_error for epoch in history]).tolist()


def _unheard(message: str) -> None:
    """Nothing that is wrong with a training matters here."""


def pairs(case: Case, seed: int, data: Path, children: int) -> list[Pair | None]:
    """Of the children of one seed."""
    rng, space = np.random.default_rng(seed), Networks(case.space())
    problem = Problem.open(make_task(case.task), data, verify="none", reading=case.recipe(0).data)
    trainer = Trainer(case, seed, problem)
    genomes = [space.random(rng) for _ in range(RANDOM)]
    trained = [trainer.parent(genome) for genome in genomes]
    best, *others = sorted(range(RANDOM), key=lambda n: trained[n].error)
    found = []
    for number in range(children):
        if number % 2:
            parents = [best, int(rng.choice(others))]
            child = space.crossed(*(genomes[n] for n in parents), rng)
        else:
            parents, child = [best], space.mutated(genomes[best], rng)
        found.append(trainer.pair(child, [(n, trained[n]) for n in parents], number))
    return found


def row(case: Case, kind: str, children: Sequence[Pair | None]) -> list[str]:
    found = [pair for pair in children if pair is not None]
    cells = [case.name, kind, f"{len(found)} of {len(children)}"]
    if not found:
        return [*cells, *["-"] * 7]
    own, one = (
        [getattr(p, f"{name}") for p in found] for name in ("own_schedules", "one_schedule")
    )
    return [
        *cells,
        f"{median(own):.2f}",
        f"{mean(own):.2f}",
        str(sum(ratio > 1 for ratio in own)),
        f"{geometric_mean(p.inherits[HALF][-1] / p.bar for p in found):.3f}",
        f"{geometric_mean(p.anew[HALF][-1] / p.bar for p in found):.3f}",
        f"{geometric_mean(p.inherits[EPOCHS][-1] / p.bar for p in found):.3f}",
        f"{median(one):.2f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compositions", nargs="*", default=[], metavar="FILE:FORMULA:VALUE")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--children", type=int, default=4, help="of each seed")
    parser.add_argument("--no-volumes", action="store_true", help="compositions alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [composition(text, epochs=EPOCHS, test=0.05) for text in options.compositions]
    if not options.no_volumes:
        cases.insert(0, stiffness(50.0, samples=600, epochs=EPOCHS, test=0.05))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for place, case in enumerate(cases):
            data, found = Path(scratch) / str(place), []
            case.build(data)
            for seed in range(FIRST_SEED, FIRST_SEED + options.seeds):
                found.append(pairs(case, seed, data, options.children))
                said = [f"{p.own_schedules:.2f}" if p else "anew" for p in found[-1]]
                print(f"{case.name}, seed {seed}: {', '.join(said)}", flush=True)
            for kind, first in (("mutation", 0), ("crossover", 1)):
                rows.append(row(case, kind, [p for each in found for p in each[first::2]]))
            rows.append(row(case, "all", [p for each in found for p in each]))
    heads = (
        *("task", "children", "inherit", "own schedules: median", "mean", "never"),
        *("error after half", "from scratch after half", "after all", "one schedule: median"),
    )
    print(machine())
    print(markdown(heads, rows))


if __name__ == "__main__":
    main()
