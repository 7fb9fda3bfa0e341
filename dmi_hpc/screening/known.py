"""Known compounds and their formation energies, from a shard set of compositions or a CSV."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas

from dmi_hpc.data.elements import ELEMENTS, parse_formula, reduced_formula
from dmi_hpc.data.importing.values import finite_float
from dmi_hpc.data.manifest import MANIFEST
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.errors import DataError
from dmi_hpc.screening.hull import Compound, Known, System
from dmi_hpc.screening.options import Candidates

UNIT = "eV/atom"
_ROWS = 2**16


def read_known(options: Candidates) -> Known:
    """Raises DataError naming the first record that cannot be used."""
    if options.known is None:
        return Known({})
    if (options.known / MANIFEST).exists():
        return known_of(_of_set(options.known))
    return _by_system(_of_csv(options.known, options.formula, options.value))


def known_of(records: Iterable[tuple[str, float]]) -> Known:
    """Of formulas and formation energies, eV/atom. Raises DataError as `parse_formula`."""
    return _by_system(itertools.starmap(_compound, records))


def _by_system(found: Iterable[tuple[System, Compound]]) -> Known:
    compounds: dict[System, list[Compound]] = {}
    for system, compound in found:
        compounds.setdefault(system, []).append(compound)
    return Known(compounds)


def _compound(formula: str, energy: float) -> tuple[System, Compound]:
    amounts = parse_formula(formula)
    atoms = sum(amounts.values())
    ordered = sorted((ELEMENTS.index(e), amount / atoms) for e, amount in amounts.items())
    system, fractions = zip(*ordered, strict=True)
    return system, Compound(reduced_formula(amounts), fractions, energy)


def _of_set(path: Path) -> Iterator[tuple[str, float]]:
    with ShardSet.open(path, verify="read") as shards:
        fields = {field.name: field for field in shards.manifest.fields}
        if missing := {"formula", "value"} - set(fields):
            raise DataError(
                f"{path}: known compounds need fields formula and value; {', '.join(sorted(missing))} "
                "is not there. Make the set by: dmi data import FILE.csv --as composition"
            )
        if (unit := fields["value"].unit) not in ("", UNIT):
            raise DataError(f"{path}: known formation energies in {unit}; expected {UNIT}")
        for start in range(0, len(shards), _ROWS):
            rows = np.arange(start, min(start + _ROWS, len(shards)))
            part = shards.fields(("formula", "value"), rows)
            for text, value in zip(part["formula"], part["value"].tolist(), strict=True):
                yield bytes(text).decode(), value


def _of_csv(path: Path, formula: str, value: str) -> Iterator[tuple[System, Compound]]:
    try:
        # NaN is sodium nitride; empty lines count in the numbers of the lines
        table = pandas.read_csv(path, dtype=str, na_filter=False, skip_blank_lines=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable CSV: {error}") from None
    if missing := {formula, value} - set(table.columns):
        raise DataError(
            f"{path}: expected columns {formula!r} and {value!r}; missing "
            f"{', '.join(sorted(missing))}, found {', '.join(map(str, table.columns))}"
        )
    filled = ~(table == "").all(axis=1)
    records = zip(
        table.index[filled] + 2, table[formula][filled], table[value][filled], strict=True
    )
    for line, text, number in records:
        try:
            found = _compound(text, finite_float(number))
        except DataError as error:
            raise DataError(f"{path}, line {line}: {text!r}: {error}") from None
        yield found
