"""Materials Project structures in HDF5 -> atomic fingerprints of their sites, for `dmi data import`.

The HDF5 file is that of recipes/prepare/mp_structures.py. Written is one row for each symmetry-distinct
site: its fingerprint, its element, how many atoms of the cell it stands for, and of which structure,
formula and template it is. A template is a structure type with the elements left out: space
group, and the Wyckoff positions of each element. Structures that cannot be drawn are told.

    python recipes/prepare/sites.py mp_structures_106113.h5 sites.h5 --random 25000
    dmi data import sites.h5 --out data/sites --group formula
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dmi_hpc.errors import DataError
from dmi_hpc.files import atomic_file
from dmi_hpc.physics.fingerprints import PIXELS, VIEWS, fingerprints

Array = np.ndarray[Any, np.dtype[Any]]
TOLERANCE = 0.01  # angstrom, of symmetry
LENGTHS = {"formula": 24, "template": 96, "structure": 20}  # of texts


@dataclass(frozen=True)
class Structure:
    row: int
    lattice: Array  # (6,) angstrom, degrees
    numbers: Array  # (n,)
    fractions: Array  # (n, 3)


@dataclass(frozen=True)
class Sites:
    """Of one structure."""

    row: int
    fingerprints: Array  # (m, 12, 16, 16)
    numbers: Array  # (m,)
    atoms: Array  # (m,) in the cell
    formula: str
    template: str


def main() -> None:
    options = _options()
    with h5py.File(options.source) as file:
        structures = list(chosen(file, options))
    if options.out.exists():
        sys.exit(f"{options.out} is there already")
    bad, rows = [], 0
    with atomic_file(options.out) as temp, h5py.File(temp, "w") as out:
        for done, sites in enumerate(_made(structures, options.processes), start=1):
            if isinstance(sites, str):
                bad.append(sites)
            else:
                rows += _append(out, sites)
            if done % 1000 == 0:
                sys.stderr.write(f"{done} of {len(structures)} structures, {rows} sites\n")
    for line in bad:
        sys.stderr.write(f"left out {line}\n")
    kept = len(structures) - len(bad)
    sys.stderr.write(f"{options.out}: {kept} structures, {rows} sites; {len(bad)} left out\n")


def chosen(file: h5py.File, options: argparse.Namespace) -> Iterator[Structure]:
    """In order of their rows."""
    counts = file["n_atoms"][:].astype(np.int64)
    first = np.cumsum(counts) - counts
    numbers, fractions = file["Z"][:], file["frac_1e6"][:]
    lattices = file["lattice_abc_alpha_beta_gamma"][:].astype(float)
    kinds = np.array(
        [len(np.unique(numbers[a : a + n])) for a, n in zip(first, counts, strict=True)]
    )
    rows = np.flatnonzero((counts <= options.max_atoms) & np.isin(kinds, options.elements))
    if options.random is not None:
        if options.random > len(rows):
            sys.exit(f"--random {options.random}: only {len(rows)} structures to choose from")
        rows = np.sort(np.random.default_rng(options.seed).choice(rows, options.random, False))
    for row in rows.tolist():
        atoms = slice(first[row], first[row] + counts[row])
        yield Structure(row, lattices[row], numbers[atoms], fractions[:, atoms].T / 1e6)


def sites_of(structure: Structure) -> Sites | str:
    """Its distinct sites; or what is wrong with it."""
    from pymatgen.core import Composition, Lattice
    from spglib import get_symmetry_dataset

    cell = np.asarray(Lattice.from_parameters(*structure.lattice).matrix)
    crystal: Any = (cell, structure.fractions, structure.numbers)  # arrays do, its types say lists
    found = get_symmetry_dataset(crystal, TOLERANCE)
    if found is None:
        return f"mb-mp-gap-{structure.row + 1:06d}: no symmetry found"
    sites, atoms = np.unique(found.equivalent_atoms, return_counts=True)
    numbers = structure.numbers[sites]
    try:
        pictures = fingerprints(cell, structure.fractions, sites)
    except DataError as error:
        return f"mb-mp-gap-{structure.row + 1:06d}: {error}"
    formula = Composition.from_dict(
        {int(z): int(atoms[numbers == z].sum()) for z in np.unique(numbers)}
    ).reduced_formula
    letters = np.array(list(found.wyckoffs))[sites]
    words = sorted("".join(sorted(letters[numbers == z].tolist())) for z in np.unique(numbers))
    template = f"{found.number}:{'.'.join(words)}"
    return Sites(structure.row, pictures, numbers, atoms, formula, template)


def _made(structures: list[Structure], processes: int) -> Iterator[Sites | str]:
    if processes == 1:
        yield from map(sites_of, structures)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(sites_of, structures, chunksize=64)


def _append(out: h5py.File, sites: Sites) -> int:
    m = len(sites.numbers)
    text = {"formula": sites.formula, "template": sites.template,
            "structure": f"mb-mp-gap-{sites.row + 1:06d}"}  # fmt: skip
    if long := [name for name, value in text.items() if len(value) > LENGTHS[name]]:
        sys.exit(f"{text['structure']}: {', '.join(long)} of more than {LENGTHS[long[0]]} letters")
    columns: dict[str, Array] = {
        "fingerprint": sites.fingerprints,
        "element": sites.numbers.astype(np.uint8) - 1,
        "atoms": sites.atoms.astype(np.uint16),
        **{
            name: np.full(m, value.encode(), dtype=f"S{LENGTHS[name]}")
            for name, value in text.items()
        },
    }
    for name, values in columns.items():
        if name not in out:
            shape = (VIEWS, PIXELS, PIXELS) if name == "fingerprint" else ()
            out.create_dataset(
                name, (0, *shape), values.dtype, maxshape=(None, *shape), chunks=(256, *shape)
            )
        out[name].resize(len(out[name]) + m, axis=0)
        out[name][-m:] = values
    return m


def _options() -> argparse.Namespace:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    parser.add_argument("source", type=Path, help="HDF5 file of structures")
    parser.add_argument("out", type=Path, help="HDF5 file to be written; must not be there yet")
    parser.add_argument("--elements", type=int, nargs="+", default=[2, 3], help="how many kinds")
    parser.add_argument("--max-atoms", type=int, default=30, help="in the cell")
    parser.add_argument("--random", type=int, help="so many structures at random")
    parser.add_argument("--seed", type=int, default=0, help="of --random")
    parser.add_argument("--processes", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
