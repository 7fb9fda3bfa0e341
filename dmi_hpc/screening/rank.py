"""The best candidates of a stream, and how they compare with known compounds and with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal

import numpy as np

from dmi_hpc.data.elements import ELEMENTS
from dmi_hpc.data.importing.parallel import ordered_map
from dmi_hpc.screening.enumerate import formulas
from dmi_hpc.screening.hull import Compound, Known, System, hull_of
from dmi_hpc.table import Column

Array = np.ndarray[Any, np.dtype[Any]]

COLUMNS = (
    Column("formula", "text"),
    Column("system", "text"),
    Column("formation_energy", "real", "eV/atom", digits=6),
    Column("above_known_hull", "real", "eV/atom", digits=6),
    Column("above_hull", "real", "eV/atom", digits=6),
    Column("known", "text"),
    Column("decomposes_into", "text"),
)


@dataclass(frozen=True)
class Found:
    """k compositions of n elements each.

    systems: (k, n) places in ELEMENTS; amounts: (k, n) atoms; energy: (k,) predicted formation energy;
    above: (k,) that above the hull of the known compounds, eV/atom.
    """

    systems: Array
    amounts: Array
    energy: Array
    above: Array

    def __len__(self) -> int:
        return len(self.energy)

    def take(self, rows: Array) -> Found:
        return Found(self.systems[rows], self.amounts[rows], self.energy[rows], self.above[rows])

    def formulas(self) -> Array:
        return formulas(self.systems, self.amounts)


class Best:
    """Of all that is added, the `most` nearest to the hull, and of each system `per_system`.

    Systems come one after another, each in one piece or several.
    """

    def __init__(self, most: int, per_system: int | None = None) -> None:
        self._most, self._per_system = most, per_system
        self._parts: dict[int, list[Found]] = {}  # by number of elements
        self._rows, self._worst = 0, np.inf

    @property
    def worst(self) -> float:
        """What lies higher above the hull is not among the best."""
        return self._worst

    def add(self, found: Found) -> None:
        if len(found):
            self._parts.setdefault(found.systems.shape[1], []).append(found)
            self._rows += len(found)
        if self._rows > 2 * self._most:
            # of the system that is not complete yet, so many may still give way to better ones
            self._cut(self._most + (self._per_system or 0))

    def parts(self) -> list[Found]:
        """The best, by number of elements; each part in order of systems."""
        self._cut(self._most)
        return [some[0] for _, some in sorted(self._parts.items())]

    def _cut(self, most: int) -> None:
        parts = {n: self._of_systems(_joined(some)) for n, some in self._parts.items()}
        above = np.concatenate([np.empty(0), *(part.above for part in parts.values())])
        if len(above) > most:
            self._worst = float(np.partition(above, most - 1)[most - 1])
            parts = {n: part.take(part.above <= self._worst) for n, part in parts.items()}
        self._parts = {n: [part] for n, part in parts.items()}
        self._rows = sum(map(len, parts.values()))

    def _of_systems(self, found: Found) -> Found:
        order = np.lexsort((found.above, *found.systems.T[::-1]))
        found = found.take(order)
        if self._per_system is None or not len(found):
            return found
        starts = np.append(True, (np.diff(found.systems.astype(np.int64), axis=0) != 0).any(axis=1))
        first = np.flatnonzero(starts)[np.cumsum(starts) - 1]
        return found.take(np.arange(len(found)) - first < self._per_system)


def _joined(parts: list[Found]) -> Found:
    names = ("systems", "amounts", "energy", "above")
    return Found(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class _OfSystem:
    """All that was found in a system."""

    system: System
    formulas: list[str]
    shares: Array  # (k, n)
    energy: Array
    above: Array


@dataclass(frozen=True)
class _Compare:
    """Picklable: candidates of a system beside what is known, and beside each other."""

    known: Known
    together: Known  # with the candidates below the known hull

    def __call__(self, found: _OfSystem) -> dict[str, list[Any]]:
        before, after = hull_of(found.system, self.known), hull_of(found.system, self.together)
        count = len(found.formulas)
        return {
            "formula": [_usual(text) for text in found.formulas],
            "system": ["-".join(sorted(ELEMENTS[e] for e in found.system))] * count,
            "formation_energy": found.energy.tolist(),
            "above_known_hull": found.above.tolist(),
            # 0 but for rounding where it is a corner itself
            "above_hull": np.maximum(found.energy - after.energy(found.shares), 0.0).tolist(),
            "known": ["yes" if text in self.known.formulas else "" for text in found.formulas],
            "decomposes_into": [_products(before.products(x)) for x in found.shares],
        }


def ranked(
    parts: list[Found], known: Known, processes: int | Literal["auto"]
) -> dict[str, list[Any]]:
    """`COLUMNS` of all that was found, the lowest above the hull of the known compounds first."""
    systems = [each for part in parts for each in _by_system(part)]
    below: Mapping[System, list[Compound]] = {
        each.system: [
            Compound(text, tuple(x), energy)
            for text, x, energy, above in zip(
                each.formulas, each.shares.tolist(), each.energy.tolist(), each.above, strict=True
            )
            if above < 0
        ]
        for each in systems
    }
    compare = _Compare(known, known.plus(below))
    rows: dict[str, list[Any]] = {column.name: [] for column in COLUMNS}
    for made in ordered_map(compare, iter(systems), processes):
        for name, values in made.items():
            rows[name] += values
    order = np.argsort(rows["above_known_hull"], kind="stable")
    return {name: [values[i] for i in order] for name, values in rows.items()}


def _by_system(found: Found) -> Iterator[_OfSystem]:
    names, shares = found.formulas(), found.amounts / found.amounts.sum(axis=1, keepdims=True)
    keys = map(tuple, found.systems.tolist())
    for system, some in groupby(enumerate(keys), key=lambda pair: pair[1]):
        rows = np.array([row for row, _ in some])
        yield _OfSystem(
            system, names[rows].tolist(), shares[rows], found.energy[rows], found.above[rows]
        )


def _products(products: list[tuple[str, float]]) -> str:
    """For people: "0.571 Fe2O3 + 0.429 Na2O", in shares of atoms."""
    return " + ".join(f"{share:.3f} {_usual(formula)}" for formula, share in products)


@lru_cache(maxsize=2**16)
def _usual(formula: str) -> str:
    """In the field's order of elements."""
    from pymatgen.core.composition import Composition  # slow to import

    return str(Composition(formula).reduced_formula)
