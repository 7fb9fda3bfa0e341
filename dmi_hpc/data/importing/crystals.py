"""One structure in plain arrays, read from CIF, POSCAR, extended XYZ or JSON; its neighbours."""

from __future__ import annotations

import io
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from dmi_hpc.data.importing.optional import library, readable
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]

_PARALLEL_PLANES = 1e-3  # a cell thinner than this share of its edges is none
_SPARE = 4  # times the neighbours wanted are looked for first, at the mean density
_RIM = 1e-3  # angstrom: the last neighbour, and others as far, lie well inside what was searched
CLOSEST = 0.5  # angstrom: nearer ones are one atom twice (pymatgen's is_valid; H2 has 0.74)


@dataclass(frozen=True)
class Crystal:
    """Atoms in a cell, and whatever stood beside them.

    numbers: (n,) atomic numbers; positions: (n, 3) angstrom, Cartesian; cell: (3, 3) angstrom, rows
    are vectors, 0 where there is none; periodic: (3,) 0 or 1. properties: of the whole; arrays:
    (n, ...) of the atoms.
    """

    numbers: Array
    positions: Array
    cell: Array
    periodic: Array
    properties: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.numbers)
        if n == 0:
            raise DataError("no atoms")
        if ((self.numbers < 1) | (self.numbers > 118)).any():
            raise DataError("atoms of no known element")
        if self.positions.shape != (n, 3) or self.cell.shape != (3, 3):
            raise DataError(
                f"positions {self.positions.shape} and cell {self.cell.shape} of {n} atoms"
            )
        if not (np.isfinite(self.positions).all() and np.isfinite(self.cell).all()):
            raise DataError("positions or cell are not finite")
        vectors = self.cell[self.periodic.astype(bool)]
        edges = np.linalg.norm(vectors, axis=1)
        volume = math.sqrt(max(0.0, float(np.linalg.det(vectors @ vectors.T))))
        if len(vectors) and volume <= _PARALLEL_PLANES ** len(vectors) * math.prod(edges):
            raise DataError(f"a cell without volume: {self.cell.tolist()}")

    @property
    def formula(self) -> str:
        """Reduced: smallest whole numbers, elements in order of Z, 1 not written."""
        from pymatgen.core import Element

        counts = Counter(self.numbers.tolist())
        divisor = math.gcd(*counts.values())
        parts = ((Element.from_Z(z).symbol, counts[z] // divisor) for z in sorted(counts))
        return "".join(f"{symbol}{n}" if n > 1 else symbol for symbol, n in parts)


def _quiet() -> warnings.catch_warnings[None]:
    """A structure is used or it is not: what a library thinks of it besides is dropped."""
    return warnings.catch_warnings(action="ignore")


def from_cif(text: str) -> Crystal:
    """The one structure of a CIF, in its conventional cell as written. Raises DataError."""
    from pymatgen.io.cif import CifParser

    with readable("not a readable CIF"), _quiet():
        found = CifParser(io.StringIO(text)).parse_structures(primitive=False, on_error="raise")
    if len(found) != 1:
        raise DataError(f"holds {len(found)} structures, expected one")
    return from_structure(found[0])


def from_poscar(text: str) -> Crystal:
    """Raises DataError, also where the file names no elements (VASP 4)."""
    from pymatgen.io.vasp import Poscar

    with readable("not a readable POSCAR"), _quiet():
        found = Poscar.from_str(text, read_velocities=False)
    if not found.true_names:
        raise DataError("names no elements (a POSCAR of VASP 4): add the line of symbols")
    return from_structure(found.structure)


def from_structure(structure: Any) -> Crystal:
    """Of a pymatgen Structure, with its site properties. Raises DataError if it is disordered."""
    if not structure.is_ordered:
        raise DataError("disordered: some sites are occupied in part or by several elements")
    arrays = {}
    for name, values in structure.site_properties.items():
        if all(value is not None for value in values):
            arrays[name] = _array(values)
    return Crystal(
        numbers=np.array([site.specie.Z for site in structure], dtype=np.int64),
        positions=np.array(structure.cart_coords, dtype=np.float64),
        cell=np.array(structure.lattice.matrix, dtype=np.float64),
        periodic=np.array(structure.pbc, dtype=np.uint8),
        arrays={name: a for name, a in arrays.items() if a is not None},
    )


def _array(values: Any) -> Array | None:
    """Numbers as an array; None if they are none."""
    try:
        found = np.array(values)
    except ValueError:
        return None
    return found if found.dtype.kind in "biuf" else None


def from_extxyz(text: str) -> Crystal:
    """One frame. Raises DataError."""
    ase = library("ase.io.extxyz", "extended XYZ files")
    with readable("not a readable frame"), _quiet():
        atoms = next(ase.read_extxyz(io.StringIO(text), index=0))
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    n = len(atoms)
    arrays = {k: v for k, v in atoms.arrays.items() if k not in ("numbers", "positions")}
    arrays |= {k: v for k, v in results.items() if k in _PER_ATOM}
    whole = {k: v for k, v in results.items() if k not in _PER_ATOM}
    return Crystal(
        numbers=np.asarray(atoms.numbers, dtype=np.int64),
        positions=np.asarray(atoms.positions, dtype=np.float64).reshape(n, 3),
        cell=np.asarray(atoms.cell.array, dtype=np.float64),
        periodic=np.asarray(atoms.pbc, dtype=np.uint8),
        properties={**atoms.info, **whole},
        arrays={k: np.asarray(v) for k, v in arrays.items() if np.asarray(v).dtype.kind in "biuf"},
    )


_PER_ATOM = ("forces", "magmoms", "charges", "energies", "stresses")


def is_structure(value: Any) -> bool:
    """A dictionary of pymatgen (sites in a lattice) or of JARVIS (coords in a lattice_mat)."""
    return isinstance(value, dict) and ({"lattice", "sites"} <= set(value) or _jarvis(value))


def _jarvis(value: Mapping[str, Any]) -> bool:
    return {"lattice_mat", "coords", "elements"} <= set(value)


def from_json(record: Any) -> Crystal:
    """A structure, or an object with one and properties beside it. Raises DataError."""
    if is_structure(record):
        return _from_dict(record)
    if not isinstance(record, dict):
        raise DataError(f"expected an object, found {type(record).__name__}")
    found = [key for key, value in record.items() if is_structure(value)]
    if len(found) != 1:
        raise DataError(f"expected one structure in the object, found {len(found)}")
    crystal = _from_dict(record[found[0]])
    n, properties, arrays = len(crystal.numbers), {}, dict(crystal.arrays)
    for key, value in record.items():
        if key == found[0] or value is None or isinstance(value, dict):
            continue
        array = _array(value) if isinstance(value, list) else None
        if array is not None and array.shape[:1] == (n,) and array.ndim > 1:
            arrays[key] = array  # (n, ...): a list of n numbers could be anything
        else:
            properties[key] = value if array is None else array
    return Crystal(
        crystal.numbers, crystal.positions, crystal.cell, crystal.periodic, properties, arrays
    )


def _from_dict(value: Mapping[str, Any]) -> Crystal:
    with readable("not a readable structure"), _quiet():
        if not _jarvis(value):
            from pymatgen.core import Structure

            return from_structure(Structure.from_dict(value))
        cell = np.array(value["lattice_mat"], dtype=np.float64)
        places = np.array(value["coords"], dtype=np.float64)
        return Crystal(  # not by way of a Structure, an object for each atom: twice as fast
            numbers=np.array([_number(str(e).strip()) for e in value["elements"]], dtype=np.int64),
            positions=places if value.get("cartesian", False) else places @ cell,
            cell=cell,
            periodic=np.ones(3, dtype=np.uint8),
        )


@cache
def _number(element: str) -> int:
    """Z of a symbol, also of an ion's (Fe3+)."""
    from pymatgen.core import get_el_sp

    return int(get_el_sp(element).Z)


@dataclass(frozen=True)
class Neighbours:
    """Edges from each atom to its neighbours, by atom, then by distance.

    pairs: (edges, 2) the atom and its neighbour; images: (edges, 3) the cell that the neighbour is
    in; distances: (edges,) angstrom.
    """

    pairs: Array
    images: Array
    distances: Array


def require_apart(found: Neighbours) -> None:
    """Raises DataError if atoms are on top of each other. found: all within CLOSEST, or more."""
    near = np.flatnonzero(found.distances < CLOSEST)
    if len(near):
        worst = near[found.distances[near].argmin()]
        (i, j), distance = found.pairs[worst].tolist(), found.distances[worst]
        what = f"atoms {i} and {j}" if i != j else f"atom {i} and its periodic image"
        raise DataError(
            f"{what} are on top of each other: {distance:.3g} angstrom apart, expected at least "
            f"{CLOSEST}"
        )


def neighbours_of(crystal: Crystal, cutoff: float, nearest: int | None) -> Neighbours:
    """All neighbours within `cutoff` angstrom, or the nearest ones of them (CGCNN: 8 and 12)."""
    if nearest is not None and crystal.periodic.all():
        volume = abs(float(np.linalg.det(crystal.cell))) / len(crystal.numbers)
        radius = (3 / (4 * math.pi) * _SPARE * nearest * volume) ** (1 / 3)
        if radius < cutoff:
            found = _within(crystal, radius, nearest)
            enough = len(found.pairs) == nearest * len(crystal.numbers)
            if enough and found.distances.max() < radius - _RIM:
                return found
    return _within(crystal, cutoff, nearest)


def _within(crystal: Crystal, cutoff: float, nearest: int | None) -> Neighbours:
    from pymatgen.optimization.neighbors import find_points_in_spheres

    points = np.ascontiguousarray(crystal.positions)
    centres, others, images, distances = find_points_in_spheres(
        points,
        points,
        r=float(cutoff),
        pbc=np.ascontiguousarray(crystal.periodic, dtype=np.int64),
        lattice=_box(crystal),
        tol=1e-8,
    )
    real = (centres != others) | (distances > 1e-8)
    centres, others, images, distances = (
        a[real] for a in (centres, others, images.astype(np.int64), distances)
    )
    # equal distances differ in their last bits: rounded, so that all machines keep the same ones
    keys = (*(images[:, i] for i in (2, 1, 0)), others, distances.round(6), centres)
    order = np.lexsort(keys)
    if nearest is not None:
        counts = np.bincount(centres, minlength=len(points))
        rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = order[rank < nearest]
    if np.abs(images[order]).max(initial=0) > 127:
        raise DataError(f"neighbours within {cutoff} angstrom are more than 127 cells away")
    return Neighbours(
        np.stack([centres[order], others[order]], axis=1).astype(np.int32),
        images[order].astype(np.int8),
        distances[order].astype(np.float32),
    )


def _box(crystal: Crystal) -> Array:
    """A cell with volume: where the crystal is not periodic any vector will do."""
    box = np.array(crystal.cell, dtype=np.float64)
    free = ~crystal.periodic.astype(bool)
    if free.any():
        size = float(np.ptp(crystal.positions, axis=0).max()) + 1.0
        basis = box[~free]
        _, _, directions = np.linalg.svd(basis) if len(basis) else (0, 0, np.eye(3))
        box[free] = directions[len(basis) :] * size
    return np.ascontiguousarray(box)
