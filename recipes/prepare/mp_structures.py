"""Materials Project structures in HDF5 -> JSON Lines for `dmi data import`.

The HDF5 file holds, for structures one after another: n_atoms, lattice_abc_alpha_beta_gamma (angstrom,
degrees), Z and frac_1e6 (3, atoms; fractional coordinates x 1e6), and targets, NaN where not known.

    python recipes/prepare/mp_structures.py mp_structures_106113.h5 e_form.jsonl --with e_form
    dmi data import e_form.jsonl --out data/mp_e_form --cutoff 8 --max-neighbours 12
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

TARGETS = {  # of the file: name here
    "band_gap_eV": "gap",
    "e_form_eV_per_atom": "e_form",
    "log10_K_VRH_GPa": "log10_k",
    "log10_G_VRH_GPa": "log10_g",
    "refractive_index": "n",
}
FOLD_SEED = 18012019  # matbench: KFold(5, shuffle=True, random_state=18012019) in order of the rows


def main() -> None:
    options = _options()
    with h5py.File(options.source) as file:
        targets = {name: file[key][:].astype(float) for key, name in TARGETS.items()}
        rows = chosen(file["n_atoms"][:], targets, options)
        splits = None
        if options.fold is not None:
            splits = fold(len(file["n_atoms"]), options.fold, options.validation, options.seed)
        with options.out.open("x") as out:
            for record in records(file, rows, targets, splits):
                out.write(json.dumps(record, separators=(",", ":")) + "\n")
    sys.stderr.write(f"{options.out}: {len(rows)} structures\n")


def chosen(n_atoms: Array, targets: dict[str, Array], options: argparse.Namespace) -> Array:
    """Row numbers, ascending."""
    keep = np.ones(len(n_atoms), dtype=bool)
    for name in options.known:
        keep &= np.isfinite(targets[name])
    if options.max_atoms is not None:
        keep &= n_atoms <= options.max_atoms
    rows = np.flatnonzero(keep)
    if options.random is not None:
        if options.random > len(rows):
            sys.exit(
                f"--random {options.random}: only {len(rows)} structures are left to choose from"
            )
        rows = np.sort(np.random.default_rng(options.seed).choice(rows, options.random, False))
    return rows[: options.first]


def fold(rows: int, number: int, validation: float, seed: int) -> Array:
    """Text of each row: the official test rows, and a random share of the others to validate on."""
    from sklearn.model_selection import KFold

    train, test = list(KFold(5, shuffle=True, random_state=FOLD_SEED).split(np.arange(rows)))[
        number
    ]
    splits = np.full(rows, "train", dtype="U10")
    splits[test] = "test"
    count = round(validation * len(train))
    splits[np.random.default_rng(seed).choice(train, count, replace=False)] = "validation"
    return splits


def records(
    file: h5py.File, rows: Array, targets: dict[str, Array], splits: Array | None
) -> Iterator[dict[str, Any]]:
    """Structures as JARVIS writes them, with id and targets beside; null where not known."""
    from pymatgen.core import Element

    symbols = ["", *(Element.from_Z(z).symbol for z in range(1, 119))]
    counts = file["n_atoms"][:].astype(np.int64)
    first = np.cumsum(counts) - counts
    lattices, numbers = file["lattice_abc_alpha_beta_gamma"][:], file["Z"][:]
    fractions = file["frac_1e6"][:]
    for row in rows.tolist():
        atoms = slice(first[row], first[row] + counts[row])
        record: dict[str, Any] = {
            "id": f"mb-mp-gap-{row + 1:06d}",
            "atoms": {
                "lattice_mat": cell(lattices[row].astype(float)).round(6).tolist(),
                "coords": (fractions[:, atoms].T / 1e6).tolist(),
                "elements": [symbols[z] for z in numbers[atoms]],
            },
        }
        for name, values in targets.items():
            known = np.isfinite(values[row])
            record[name] = round(float(values[row]), 6) if known else None
        if splits is not None:
            record["split"] = str(splits[row])
        yield record


def cell(lengths_angles: Array) -> Array:
    """(3, 3) rows are cell vectors: pymatgen's convention."""
    from pymatgen.core import Lattice

    return np.asarray(Lattice.from_parameters(*lengths_angles).matrix)


def _options() -> argparse.Namespace:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("source", type=Path, help="HDF5 file of structures")
    parser.add_argument("out", type=Path, help="JSON Lines to be written; must not be there yet")
    parser.add_argument(
        "--with",
        dest="known",
        action="append",
        default=[],
        choices=sorted(TARGETS.values()),
        help="only structures whose target is known; repeatable",
    )
    parser.add_argument("--max-atoms", type=int, help="only structures of at most so many atoms")
    parser.add_argument("--first", type=int, help="of those, the first so many")
    parser.add_argument("--random", type=int, help="of those, so many at random")
    parser.add_argument("--seed", type=int, default=0, help="of --random, and of what validates")
    parser.add_argument(
        "--fold", type=int, choices=range(5), help="split: this fold of matbench_mp_gap is the test"
    )
    parser.add_argument(
        "--validation", type=float, default=0.1, help="with --fold: share of the other rows"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
