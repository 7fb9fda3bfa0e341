"""The published parts of the heat capacities (Wang et al. 2020) -> one CSV with a split column.

The published validation part is our test split: nothing is chosen by it. We validate on a share of the
compositions of the published training part, so that no composition is in two splits.

    python recipes/prepare/heat_capacity.py cp_train.csv cp_val.csv cp.csv
    dmi data import cp.csv --out data/heat_capacity --value Cp --unit "J/(mol K)" --field T=float64:K \
        --split-column split
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from dmi_hpc.data.elements import parse_formula, reduced_formula

Row = dict[str, str]


def main() -> None:
    options = _options()
    train, test = rows_of(options.train), rows_of(options.test)
    if shared := {row["key"] for row in train} & {row["key"] for row in test}:
        sys.exit(f"{options.test}: compositions that are in {options.train}, too: {sorted(shared)}")
    chosen = held_out([row["key"] for row in train], options.fold, options.folds, options.seed)
    for row in train:
        row["split"] = "validation" if row["key"] in chosen else "train"
    for row in test:
        row["split"] = "test"
    with options.out.open("x", newline="") as out:
        columns = ["formula", "T", "Cp", "split"]
        writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*train, *test])
    sys.stderr.write(
        f"{options.out}: {len(train)} rows to train and validate ({len(chosen)} compositions for the "
        f"latter), {len(test)} to test\n"
    )


def rows_of(path: Path) -> list[Row]:
    """Its rows, each with the key of its composition."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{**row, "key": reduced_formula(parse_formula(row["formula"]))} for row in rows]


def held_out(keys: Sequence[str], fold: int, folds: int, seed: int) -> set[str]:
    """Every `folds`-th composition of a random order, beginning with number `fold`."""
    unique = sorted(set(keys))
    random.Random(seed).shuffle(unique)
    return set(unique[fold::folds])


def _options() -> argparse.Namespace:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("train", type=Path, help="CSV: formula, T (K), Cp (J/(mol K))")
    parser.add_argument("test", type=Path, help="CSV of the same columns")
    parser.add_argument("out", type=Path, help="CSV to be written; must not be there yet")
    parser.add_argument("--folds", type=int, default=5, help="parts of the training compositions")
    parser.add_argument("--fold", type=int, default=0, help="the part that validates")
    parser.add_argument("--seed", type=int, default=0, help="of the parts")
    return parser.parse_args()


if __name__ == "__main__":
    main()
