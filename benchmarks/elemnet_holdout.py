"""Phase diagrams of chemical systems that a network never saw, beside a random forest's.

    dmi data import FILES --out data/held --unit eV/atom --hold-out Ti-O,Na-Fe-O,Na-Mn-O
    dmi train RECIPE --out runs/held            # [data] path = "data/held"
    python benchmarks/elemnet_holdout.py runs/held --systems Ti-O,Na-Fe-O,Na-Mn-O

For each system: formation energies of its compounds (of a composition the lowest) as the data have
them, as the network and as the forest predict them; from each their convex hull and every compound's
energy above it. MAE of formation energies; Spearman correlation with the true energies above the true
hull, of the predicted energies above the predicted hull, and of those above the true hull (as if it were
known); and of the true ground states (on the true hull) how many are on the predicted hull, which is of
how many compounds. Pure elements are 0 in all. The forest learns from the same training rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pymatgen.core import Composition
from scipy.stats import spearmanr
from sklearn.ensemble import RandomForestRegressor

from dmi_hpc import load
from dmi_hpc.data.elements import ELEMENTS, parse_formula, reduced_formula
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.run import open_run
from dmi_hpc.screening.hull import hull_of
from dmi_hpc.screening.known import known_of

Array = np.ndarray[Any, np.dtype[Any]]

ON_HULL = 1e-6  # eV/atom


def held_out(shards: ShardSet, systems: list[str]) -> dict[str, tuple[list[str], Array, Array]]:
    """{system: (formulas, fractions, energies)} of all compounds in it, each composition once."""
    fields = shards.fields(("formula", "fractions", "value"), np.asarray(shards.rows("test")))
    amounts = [parse_formula(bytes(text).decode()) for text in fields["formula"]]
    found = {}
    for system in systems:
        elements = set(system.split("-"))
        lowest: dict[str, int] = {}
        for row, each in enumerate(amounts):
            if len(each) > 1 and set(each) <= elements:
                name = reduced_formula(each)
                before = lowest.get(name, row)
                lowest[name] = min(before, row, key=lambda r: float(fields["value"][r]))
        rows = list(lowest.values())
        found[system] = (list(lowest), fields["fractions"][rows], fields["value"][rows])
    return found


def require_unseen(shards: ShardSet, systems: list[str]) -> None:
    """The import must have kept them from training and validation."""
    places = [[ELEMENTS.index(e) for e in system.split("-")] for system in systems]
    for split in ("train", "validation"):
        fractions = shards.gather("fractions", shards.rows(split))
        for system, columns in zip(systems, places, strict=True):
            within = fractions[:, columns]
            inside = (within.sum(axis=1) > 1 - 1e-6) & ((within > 0).sum(axis=1) > 1)
            if inside.any():
                raise SystemExit(f"{inside.sum()} compounds of {system} are in the {split} split")


def hull_energies(system: str, formulas: list[str], fractions: Array, energies: Array) -> Array:
    """(n,) eV/atom of the hull of these energies at these compositions."""
    places = tuple(sorted(ELEMENTS.index(e) for e in system.split("-")))
    hull = hull_of(places, known_of(zip(formulas, energies.tolist(), strict=True)))
    return hull.energy(fractions[:, list(places)].astype(np.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--systems", required=True, help="as given to --hold-out")
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="of the forest")
    options = parser.parse_args()
    systems = options.systems.split(",")
    model = load(options.run)
    with ShardSet.open(open_run(options.run.resolve()).data) as shards:
        require_unseen(shards, systems)
        found = held_out(shards, systems)
        train = shards.fields(("fractions", "value"), np.asarray(shards.rows("train")))
    fit = model.task.in_training(train["value"])
    forest = RandomForestRegressor(options.trees, n_jobs=options.jobs, random_state=0)
    forest.fit(train["fractions"][fit], train["value"][fit])
    methods: dict[str, Callable[[Array], Array]] = {
        "network": lambda x: model.predict({"fractions": x}),
        "forest": forest.predict,
    }
    print(f"{fit.sum():,} training rows; {model.checkpoint}, {dict(model.metrics)}\n")
    print(
        "| system | compounds | method | MAE, eV/atom | Spearman, own hull | true hull "
        "| ground states found | on hull |"
    )
    print("|---|--:|---|--:|--:|--:|---|--:|")
    for system, (formulas, fractions, energies) in found.items():
        true_hull = hull_energies(system, formulas, fractions, energies)
        truth = energies - true_hull
        for name, predict in methods.items():
            predicted = np.asarray(predict(fractions))
            above = predicted - hull_energies(system, formulas, fractions, predicted)
            right = (truth < ON_HULL) & (above < ON_HULL)
            row = (
                system,
                len(formulas),
                name,
                f"{abs(predicted - energies).mean():.3f}",
                f"{spearmanr(above, truth).statistic:.3f}",
                f"{spearmanr(predicted - true_hull, truth).statistic:.3f}",
                f"{right.sum()} of {(truth < ON_HULL).sum()}: "
                + ", ".join(
                    Composition(formulas[i]).reduced_formula for i in np.flatnonzero(right)
                ),
                (above < ON_HULL).sum(),
            )
            print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
