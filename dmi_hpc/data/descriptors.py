"""Composition-based feature vectors: statistics of the properties of a compound's elements.

Murdock et al., Integr. Mater. Manuf. Innov. 9 (2020) 221; Wang et al., Chem. Mater. 32 (2020) 4954. The
properties come from a user's CSV: a column `element`, and one column of numbers for each property
(Oliynyk, Magpie, JARVIS, mat2vec, one-hot).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas
import xxhash

from dmi_hpc.data.elements import ELEMENTS, reduced_formula
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
Statistic = Literal["avg", "dev", "range", "max", "min", "mode", "sum", "var"]
Missing = Literal["error", "median"]

STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
_LEAST = 1e-6  # float32 fractions that differ by less are equal


@dataclass(frozen=True)
class ElementTable:
    """Properties of the elements, (86, p) float64 in the order of ELEMENTS; NaN: not known.

    known: elements with a row in the file. checksum: xxh3 of the file.
    """

    path: Path
    properties: tuple[str, ...]
    values: Array = field(repr=False)
    known: frozenset[str] = field(repr=False)
    checksum: str

    def filled(self) -> ElementTable:
        """With the median over the elements of the file where an element lacks a property."""
        rows = [ELEMENTS.index(element) for element in sorted(self.known)]
        empty = [
            name
            for name, column in zip(self.properties, self.values[rows].T, strict=True)
            if np.isnan(column).all()
        ]
        if empty:
            raise DataError(f"{self.path}: no element has the property {empty[0]!r}")
        values = self.values.copy()
        values[rows] = np.where(
            np.isnan(values[rows]), np.nanmedian(values[rows], axis=0), values[rows]
        )
        return ElementTable(self.path, self.properties, values, self.known, self.checksum)


def read_elements(path: Path) -> ElementTable:
    """A CSV of element properties, plain or compressed. Raises DataError.

    Rows of what is no element of `dmi_hpc.data.elements` (noble gases, a "Dummy") are left out.
    """
    try:
        content = path.read_bytes()
        # "NaN" is no element, but an empty cell is an unknown property
        table = pandas.read_csv(path, dtype={"element": str})
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable table of element properties: {error}") from None
    names = tuple(map(str, table.columns.drop("element", errors="ignore")))
    if "element" not in table.columns or not names:
        raise DataError(
            f"{path}: expected a column 'element' and columns of properties, found "
            f"{', '.join(map(str, table.columns))}"
        )
    if text := [name for name in names if table[name].dtype.kind not in "iufb"]:
        raise DataError(f"{path}: property {text[0]!r}: expected numbers, found text")
    table = table[table["element"].isin(ELEMENTS)]
    if twice := table["element"][table["element"].duplicated()].tolist():
        raise DataError(f"{path}: element {twice[0]} stands there more than once")
    if table.empty:
        raise DataError(f"{path}: no row of an element (H, Li, ...) in it")
    values = np.full((len(ELEMENTS), len(names)), np.nan)
    rows = [ELEMENTS.index(element) for element in table["element"]]
    values[rows] = table[list(names)].to_numpy(dtype=np.float64)
    if np.isinf(values).any():
        raise DataError(f"{path}: expected finite properties, found infinity")
    known = frozenset(map(str, table["element"]))
    return ElementTable(path, names, values, known, xxhash.xxh3_128_hexdigest(content))


def descriptors(
    table: ElementTable, fractions: Array, atoms: Array, statistics: Sequence[Statistic]
) -> Array:
    """(n, len(statistics) * p) float64, all properties by the first statistic first.

    fractions: (n, 86), of atoms; atoms: (n,), in the formula as it is written, which "sum" depends on.
    avg, dev: mean and mean deviation, weighted by the fractions; range, max, min, var: over the
    elements, each counted once; mode: of the most frequent element (the least value of several);
    sum: over the atoms. Raises DataError naming the composition, the element and the property that
    the table does not know.
    """
    present, shares = _ranked(fractions)
    values = table.values[present]  # (n, k, p)
    inside = shares > 0  # (n, k)
    _require_known(table, fractions, atoms, np.isnan(values) & inside[:, :, None])
    of = _Entries(np.where(inside[:, :, None], values, 0.0), shares, inside, np.asarray(atoms))
    return np.concatenate([_BY_NAME[name](of) for name in statistics], axis=1)


def _ranked(fractions: Array) -> tuple[Array, Array]:
    """(n, k) elements of each row and their fractions, the largest first; k: most of any row."""
    most = max(1, int((fractions > 0).sum(axis=1).max(initial=0)))
    present = np.argsort(-fractions, axis=1, kind="stable")[:, :most]
    return present, np.take_along_axis(fractions, present, axis=1).astype(np.float64)


def _require_known(table: ElementTable, fractions: Array, atoms: Array, unknown: Array) -> None:
    """unknown: (n, k, p) bool."""
    rows = np.flatnonzero(unknown.any(axis=(1, 2)))
    if not len(rows):
        return
    row = rows[0]
    amounts = {
        ELEMENTS[i]: float(fractions[row, i] * atoms[row]) for i in np.flatnonzero(fractions[row])
    }
    absent = [element for element in amounts if element not in table.known]
    formula = reduced_formula({e: round(amount, 5) for e, amount in amounts.items()})
    if absent:
        raise DataError(
            f"{formula}: element {absent[0]} has no row in {table.path}. Take a table that has it, or "
            "leave such compounds out"
        )
    of = [table.values[ELEMENTS.index(element)] for element in amounts]
    place = int(np.flatnonzero(np.isnan(of).any(axis=0))[0])
    which = list(amounts)[int(np.flatnonzero(np.isnan(of)[:, place])[0])]
    raise DataError(
        f"{formula}: {which} has no {table.properties[place]!r} in {table.path}. Fill the table, or "
        'take missing = "median"'
    )


@dataclass(frozen=True)
class _Entries:
    """values: (n, k, p), 0 where there is no element; shares, inside: (n, k); atoms: (n,)."""

    values: Array
    shares: Array
    inside: Array
    atoms: Array

    def mean(self) -> Array:
        return np.asarray(np.einsum("nk,nkp->np", self.shares, self.values))

    def deviation(self) -> Array:
        apart = np.abs(self.values - self.mean()[:, None])
        return np.asarray(np.einsum("nk,nkp->np", self.shares, apart))

    def largest(self) -> Array:
        return np.asarray(
            np.where(self.inside[:, :, None], self.values, -np.inf).max(axis=1, initial=-np.inf)
        )

    def least(self, among: Array | None = None) -> Array:
        inside = self.inside if among is None else among
        return np.asarray(
            np.where(inside[:, :, None], self.values, np.inf).min(axis=1, initial=np.inf)
        )

    def mode(self) -> Array:
        return self.least(self.shares > self.shares[:, :1] - _LEAST)

    def variance(self) -> Array:
        count = self.inside.sum(axis=1)[:, None]
        mean = self.values.sum(axis=1) / count
        apart = np.where(self.inside[:, :, None], self.values - mean[:, None], 0.0)
        return np.asarray((apart**2).sum(axis=1) / count)


_BY_NAME: Mapping[Statistic, Callable[[_Entries], Array]] = {
    "avg": _Entries.mean,
    "dev": _Entries.deviation,
    "range": lambda of: of.largest() - of.least(),
    "max": _Entries.largest,
    "min": _Entries.least,
    "mode": _Entries.mode,
    "sum": lambda of: of.mean() * of.atoms[:, None],
    "var": _Entries.variance,
}
