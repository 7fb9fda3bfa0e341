"""Epochs that inherited weights save: children with weights of their parent against the same from
scratch.

    python benchmarks/search_inheritance.py
    python benchmarks/search_inheritance.py --compositions expt_deltae.csv:pretty_comp:delta_e

Tasks: effective stiffness of two-phase volumes made by our solver, and any number of composition
properties, FILE:FORMULA:VALUE each. For every seed four random networks are trained, and children of the
best of them, one mutation each: once with what fits of its weights, once from scratch; data, schedule
and number of epochs are the same. The ratio is the epoch at which the child that inherited is as good as
the other one ever becomes, by the epoch at which that one was. A child that never is counts as twice the
epochs of a training. Errors are those of validation; the parent's own epochs come on top.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from loading.report import machine, markdown

from dmi_hpc.config import Recipe, parse
from dmi_hpc.data.build import Alone
from dmi_hpc.models.space import SearchSpace
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import BuildContext
from search.evolution.evolve import Success
from search.records.kept import Kept
from search.spaces.genome import Genome, to_json
from search.spaces.networks import Networks
from search.trials.trial import Assignment, Evaluator, Goal

RANDOM = 4
TRIES = 40
MEMORY_GB = 4.0


@dataclass(frozen=True)
class Case:
    """A task with small networks. table: CSV, columns of formula and value; else the solver's data."""

    name: str
    task: Mapping[str, Any]
    epochs: int
    network: Mapping[str, Any]
    table: tuple[str, str, str] | None = None

    def recipe(self, seed: int) -> Recipe:
        raw = {
            "name": self.name,
            "seed": seed,
            "task": dict(self.task),
            "data": {"validation": 0.25, "test": 0.05},
            "train": {"schedule": "one_cycle", "clip_norm": 1.0, "loader_threads": 0},
            "search": {"epochs": self.epochs},
        }
        return parse(Recipe, raw, where=self.name)

    def space(self) -> SearchSpace:
        space = make_task(self.task).space()
        network = space.network.model_copy(update=self.network)
        return space.model_copy(update={"network": network, "founders": ()})

    def build(self, folder: Path) -> None:
        if self.table is None:
            context = BuildContext(self.recipe(0).data, 0, Alone(), 1, lambda rows: None)
            make_task(self.task).build_data(folder, context)
            return
        file, formula, value = self.table
        names = ("--formula", formula, "--value", value, "--duplicates", "mean")
        split = ("--validation", "0.25", "--test", "0.05")
        dmi = (sys.executable, "-m", "dmi_hpc", "data", "import")
        subprocess.run([*dmi, file, "--out", str(folder), *names, *split], check=True)


def stiffness(epochs: int) -> Case:
    task = {"name": "homogenization", "voxels": 9, "contrast": 50.0, "samples": 600}
    network = {
        "conv_blocks": (1, 4),
        "filters": (4, 8, 12, 16, 24),
        "kernels": (1, 3),
        "dense_blocks": (0, 2),
        "units": (8, 16, 32, 64),
    }
    return Case("stiffness of 9^3 voxels", task, epochs, network)


def composition(text: str, epochs: int) -> Case:
    file, formula, value = text.rsplit(":", 2)
    task = {"name": "elemnet", "dropout": False, "quantity": value, "unit": "as in the file"}
    network = {"dense_blocks": (1, 5), "units": (16, 32, 64, 128, 256)}
    name = f"composition {Path(file).name.split('.')[0]}"
    return Case(name, task, epochs, network, (file, formula, value))


@dataclass(frozen=True)
class Pair:
    """Lowest error up to each epoch of a child that inherited, and of the same from scratch."""

    share: float
    inherits: list[float]
    anew: list[float]

    @property
    def ratio(self) -> float:
        needed = next(
            (epoch for epoch, error in enumerate(self.inherits, 1) if error <= self.anew[-1]),
            2 * len(self.anew),
        )
        return needed / (self.anew.index(self.anew[-1]) + 1)

    @property
    def reached(self) -> bool:
        return self.inherits[-1] <= self.anew[-1]


def curve(
    evaluator: Evaluator, genome: Genome, number: int, epochs: int, parents: tuple[int, ...] = ()
) -> tuple[list[float], float] | None:
    """Lowest error up to each epoch, and the share inherited; None if it cannot be trained."""
    errors, share = [], 0.0
    for epoch in range(1, epochs + 1):
        outcome = evaluator(to_json(genome), Assignment(number, Goal(epoch), parents))
        if not isinstance(outcome.told, Success):
            return None
        errors.append(outcome.told.fitness)
        share = outcome.metrics["inherited"]
    return errors, share


def pairs(case: Case, seed: int, data: Path, folder: Path, children: int) -> list[Pair]:
    """Children of one trained network."""
    torch.set_num_threads(1)
    rng, space = np.random.default_rng(seed), Networks(case.space())
    evaluator = Evaluator(case.recipe(seed), data, torch.device("cpu"), MEMORY_GB, Kept(folder))
    genomes = [space.random(rng) for _ in range(RANDOM)]
    told = [evaluator(to_json(g), Assignment(n)).told for n, g in enumerate(genomes)]
    errors = [outcome.fitness if isinstance(outcome, Success) else np.inf for outcome in told]
    best = int(np.argmin(errors))
    parent = genomes[best]
    found: list[Pair] = []
    for number in range(RANDOM, TRIES):
        child = space.mutated(parent, rng)
        inherits = curve(evaluator, child, 2 * number, case.epochs, (best,))
        anew = curve(evaluator, child, 2 * number + 1, case.epochs)
        if inherits is not None and anew is not None:
            found.append(Pair(inherits[1], inherits[0], anew[0]))
        if len(found) == children:
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compositions", nargs="*", default=[], metavar="FILE:FORMULA:VALUE")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--children", type=int, default=3)
    options = parser.parse_args()
    cases = [stiffness(12), *(composition(text, 12) for text in options.compositions)]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for place, case in enumerate(cases):
            here = Path(scratch) / str(place)
            case.build(here / "data")
            found = []
            for seed in range(options.seeds):
                found += pairs(case, seed, here / "data", here / str(seed), options.children)
                for pair in found[-options.children :]:
                    ends = f"{pair.inherits[0]:.4g} to {pair.inherits[-1]:.4g}, {pair.anew[-1]:.4g} anew"
                    print(
                        f"{case.name} seed {seed}: {ends}, {pair.ratio:.2f} of the epochs",
                        flush=True,
                    )
            rows.append(
                [
                    case.name,
                    str(len(found)),
                    f"{mean(p.share for p in found):.0%}",
                    f"{median(p.ratio for p in found):.2f}",
                    f"{mean(p.ratio for p in found):.2f}",
                    f"{sum(not p.reached for p in found)}",
                    f"{median(p.inherits[-1] / p.anew[-1] for p in found):.3f}",
                ]
            )
    heads = ("task", "children", "inherited", "median ratio", "mean", "never", "error, same epochs")
    print(machine())
    print(markdown(heads, rows))


if __name__ == "__main__":
    main()
