"""Configurations of JARVIS-like JSON (energies, forces) as one extended XYZ file for dmi data import.

python recipes/prepare/potentials.py mlearn_Ni.json.xz ni.xyz --split split.json --element Ni
dmi data import ni.xyz --out data/ni --cutoff 4 --split-column split

The JSON is a list of {"jid", "atoms": {"lattice_mat", "coords", "elements", "cartesian"}, "total_energy"
(eV/atom), "forces" (eV/angstrom)}. Each frame gets its energy_per_atom, its split (train, validation,
test) and its forces. The split file names the training and test configurations of an element by their
place in the list, from 1; the others are for validation.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import write


def splits(given: dict[str, list[int]], count: int) -> list[str]:
    """The split of each configuration."""
    found = ["validation"] * count
    for name in ("train", "test"):
        for place in given[name]:
            found[place - 1] = name
    return found


def frame(record: dict[str, Any], split: str) -> Atoms:
    atoms = record["atoms"]
    where = {"positions" if atoms["cartesian"] else "scaled_positions": atoms["coords"]}
    made = Atoms(atoms["elements"], cell=atoms["lattice_mat"], pbc=True, **where)
    made.info.update(energy_per_atom=record["total_energy"], split=split)
    made.arrays["forces"] = np.array(record["forces"], dtype=np.float64)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help=".json or .json.xz")
    parser.add_argument("target", type=Path, help=".xyz")
    parser.add_argument("--split", type=Path, required=True)
    parser.add_argument("--element", required=True)
    given = parser.parse_args()
    opened = lzma.open if given.source.suffix == ".xz" else open
    with opened(given.source, "rt", encoding="utf-8") as stream:
        records = json.load(stream)
    found = splits(json.loads(given.split.read_text())[given.element], len(records))
    frames = [frame(record, split) for record, split in zip(records, found, strict=True)]
    write(given.target, frames, format="extxyz")
    print(f"{len(frames)} configurations in {given.target}")


if __name__ == "__main__":
    main()
