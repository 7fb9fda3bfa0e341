"""A trained classifier of sites put to work: held-out compounds, learnt elements, chemical systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmi_hpc import collectives
from dmi_hpc.data.manifest import SplitName, require_identity
from dmi_hpc.errors import DataError
from dmi_hpc.files import atomic_file, write_json
from dmi_hpc.predict import Model, load_model
from dmi_hpc.problem import Problem
from dmi_hpc.run import Run
from dmi_hpc.substitution import elements as learnt_elements
from dmi_hpc.substitution.held_out import HeldOut, Learnt, SiteTable, held_out
from dmi_hpc.substitution.systems import Candidate, candidates
from dmi_hpc.substitution.templates import Compound
from dmi_hpc.table import Column, table_file
from dmi_hpc.world import World

Array = np.ndarray[Any, np.dtype[Any]]
FIELDS = ("structure", "template", "element", "atoms")
LEAST_SITES = 20  # an element's weights say something if so many training sites held it
SHOWN = 10  # new candidates of each held-out compound in ranking.csv


@dataclass(frozen=True)
class Classifier:
    """A trained network of sites with its data."""

    model: Model
    problem: Problem

    @classmethod
    def of_run(cls, run: Run) -> Classifier:
        """The best checkpoint. Raises DataError if its task is not one of sites of structures."""
        model = load_model(run, collectives.device_of(World()))
        problem = Problem.open(model.task, run.data)
        require_identity(model.data, problem.shards.manifest.identity, maker=str(run.checkpoints))
        have = {field.name for field in problem.shards.manifest.fields}
        missing = [name for name in FIELDS if name not in have]
        if model.task.quantity.transform != "category" or missing:
            raise DataError(
                f"{run.data}: expected sites of structures, as recipes/prepare/sites.py makes them, and "
                f"a network of their elements; missing fields: {', '.join(missing) or 'none'}"
            )
        return cls(model, problem)

    @property
    def symbols(self) -> tuple[str, ...]:
        return self.model.task.quantity.classes

    def table(self, split: SplitName) -> SiteTable:
        rows = self.problem.shards.rows(split)
        return SiteTable(**self.problem.shards.fields(FIELDS, rows))

    def probabilities(self, split: SplitName, progress: Callable[[int], None]) -> Array:
        """(n, classes) of all sites of the split."""
        rows = self.problem.shards.rows(split)
        found = np.empty((len(rows), len(self.symbols)))
        for part in self.model.of_rows(self.problem.shards, rows, World()):
            found[part.positions] = part.values
            progress(len(part.rows))
        return found

    def formula(self, compound: Compound) -> str:
        """Reduced, in the usual order of the elements."""
        from pymatgen.core import Composition

        return str(Composition({self.symbols[e]: n for e, n in compound}).reduced_formula)


def rank(run: Run, split: SplitName, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Write ranking.json, ranking.csv, elements.csv and elements.png of `run`; returns the first.

    Another split than test: ranking-SPLIT.json and .csv. progress: (what, rows done since, of all).
    """
    network = Classifier.of_run(run)
    table, learnt = network.table(split), Learnt.of(network.table("train"))
    n = len(table.element)
    probabilities = network.probabilities(split, lambda rows: progress("predicting", rows, n))
    found = list(
        held_out(table, probabilities, learnt, SHOWN, lambda rows: progress("ranking", rows, n))
    )
    name = "ranking" if split == "test" else f"ranking-{split}"
    _write_ranking(run.folder / f"{name}.csv", network, found)
    result = {
        "split": split,
        "data": network.problem.shards.manifest.identity,
        "checkpoint": network.model.checkpoint,
        "sites": _of_sites(network, table.element, probabilities, learnt),
        "known": sum(c.known for c in found),
        "compounds": _of_compounds(found),
        "elements": _of_elements(run.folder, network, learnt),
    }
    write_json(run.folder / f"{name}.json", result)
    return result


def _of_sites(
    network: Classifier, truth: Array, probabilities: Array, learnt: Learnt
) -> dict[str, Any]:
    group, row = learnt_elements.table_places(network.symbols)
    predicted = probabilities.argmax(axis=1)
    # as if all elements were equally frequent: rare ones are found, frequent ones less often
    shares = np.full(len(network.symbols), np.inf)
    shares[learnt.elements] = learnt.frequency
    balanced = (probabilities / shares).argmax(axis=1)
    return {
        "rows": len(truth),
        "accuracy": float((predicted == truth).mean()),
        "most_frequent": float((truth == learnt.elements[learnt.frequency.argmax()]).mean()),
        "macro_error": learnt_elements.macro_error(truth, predicted),
        "macro_error_balanced": learnt_elements.macro_error(truth, balanced),
        "confusion": asdict(learnt_elements.confusion(truth, predicted, group, row)),
    }


def _of_compounds(found: Sequence[HeldOut]) -> dict[str, Any]:
    """Shares of held-out compounds that stand first, and among the first 10; by kind of compound."""
    kinds = {
        "all": found,
        "types seen in training": [c for c in found if c.seen],
        "types not seen": [c for c in found if not c.seen],
        **{f"{k} elements": [c for c in found if len(c.elements) == k] for k in (1, 2, 3)},
    }
    methods = ("rank", "rank_new", "by_type", "by_frequency")
    return {
        kind: {
            "compounds": len(some),
            **{
                method: {
                    "first": float(np.mean([getattr(c, method) == 1 for c in some])),
                    "top_10": float(np.mean([getattr(c, method) <= 10 for c in some])),
                    "median": float(np.median([getattr(c, method) for c in some])),
                }
                for method in methods
            },
        }
        for kind, some in kinds.items()
        if some
    }


def _of_elements(folder: Path, network: Classifier, learnt: Learnt) -> dict[str, Any]:
    """What the weights of the last layer say; writes elements.csv and elements.png."""
    layers = [m for m in network.model.module.modules() if isinstance(m, torch.nn.Linear)]
    counts = learnt.frequency * len(network.problem.train_rows)
    chosen = learnt.elements[counts.round() >= LEAST_SITES]
    if len(chosen) < 5:
        return {}
    weights = layers[-1].weight.detach().cpu().double().numpy()[chosen]
    symbols = tuple(network.symbols[element] for element in chosen)
    group, row = learnt_elements.table_places(symbols)
    near, places = learnt_elements.nearest(weights), learnt_elements.projected(weights)
    columns = (Column("element", "text"), Column("group", "integer"), Column("row", "integer"),
               Column("nearest", "text"), Column("x", "real"), Column("y", "real"))  # fmt: skip
    with table_file(folder / "elements.csv", columns) as append:
        names = [symbols[i] for i in near]
        append({"element": list(symbols), "group": group, "row": row, "nearest": names,
                "x": places[:, 0], "y": places[:, 1]})  # fmt: skip
    with atomic_file(folder / "elements.png") as path:
        path.write_bytes(learnt_elements.drawn(places, symbols, group))
    others = group != 3  # lanthanides and actinides, which are of one group by definition
    return {
        "elements": len(chosen),
        "nearest_of_same_group": float((group[near] == group).mean()),
        "without_group_3": float((group[near] == group)[others].mean()),
        "chance": learnt_elements.chance_of_neighbours(group),
    }


def _write_ranking(path: Path, network: Classifier, found: Sequence[HeldOut]) -> None:
    names = ("candidates", "rank", "rank_new", "by_type", "by_frequency")
    columns = (Column("structure", "text"), Column("formula", "text"), Column("type_seen", "integer"),
               *(Column(name, "integer") for name in names), Column("first_new", "text"))  # fmt: skip
    with table_file(path, columns) as append:
        for c in found:
            first = [network.formula(frozenset(zip(e, c.amounts, strict=True))) for e, _ in c.first]
            true = network.formula(frozenset(zip(c.elements, c.amounts, strict=True)))
            ranks = {name: [getattr(c, name)] for name in names}
            texts = {"structure": [c.structure], "formula": [true], "first_new": [" ".join(first)]}
            append({**texts, **ranks, "type_seen": [int(c.seen)]})


def system(
    run: Run, wanted: Sequence[str], out: Path, progress: Callable[[str, int, int], None]
) -> list[Candidate]:
    """Write all candidates of a chemical system, in the templates of the training rows, to `out`.

    The last column says in which split, if any, the compound is: those of the others are what the
    network could have found. Raises DataError if an element does not occur in training.
    """
    network = Classifier.of_run(run)
    table = network.table("train")
    elements = np.unique(table.element)
    symbols = [network.symbols[element] for element in elements]
    if unknown := [symbol for symbol in wanted if symbol not in symbols]:
        raise DataError(f"{', '.join(unknown)}: not among the elements of the training rows")
    n = len(table.element)
    probabilities = network.probabilities("train", lambda rows: progress("predicting", rows, n))
    classes = tuple(network.symbols.index(symbol) for symbol in wanted)
    found = candidates(table, probabilities, elements, classes)
    splits: dict[Compound, str] = {}
    for split in ("test", "validation", "train"):
        for _, template, held in network.table(split).structures():
            splits[template.compound(held)] = split
    columns = (Column("formula", "text"), Column("log_share", "real"), Column("rank", "integer"),
               Column("type", "text"), Column("template", "text"), Column("known", "text"))  # fmt: skip
    with table_file(out, columns) as append:
        append({
            "formula": [network.formula(c.compound) for c in found],
            "log_share": [c.share for c in found],
            "rank": [c.rank for c in found],
            "type": [c.type for c in found],
            "template": [c.template for c in found],
            "known": [splits.get(c.compound, "") for c in found],
        })  # fmt: skip
    return found
