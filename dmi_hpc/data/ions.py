"""Radius and electronegativity of ions, from pymatgen's tables."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from dmi_hpc.errors import DataError

if TYPE_CHECKING:
    from pymatgen.core import Element, Species

_NUMERALS = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII")


@cache
def shannon_radius(ion: str, coordination: int) -> float:
    """Ionic radius in angstrom at a coordination number, Shannon, Acta Cryst. A32 (1976) 751; high spin.

    Where the tables have none for this coordination: that of the nearest one, moved by the mean
    difference of the two over all ions that have both. Raises DataError: no ion, or none in the tables.
    """
    species = _species(ion)
    radii = _radii(species.element, int(species.oxi_state))
    if not radii:
        raise DataError(f"{ion}: no ionic radius in Shannon's tables")
    if coordination in radii:
        return radii[coordination]
    nearest = min(radii, key=lambda number: (abs(number - coordination), number))
    return radii[nearest] + _mean_difference(nearest, coordination)


@cache
def electronegativity(ion: str) -> float:
    """Pauling's. Raises DataError: no ion, or not known."""
    found = _species(ion).element.data.get("X")
    if found is None:
        raise DataError(f"{ion}: no electronegativity of Pauling")
    return float(found)


def _species(ion: str) -> Species:
    from pymatgen.core import Species  # slow to import

    try:
        species = Species.from_str(ion)
    except ValueError:
        raise DataError(f"{ion!r}: expected an ion such as Ca2+") from None
    if not species.oxi_state:
        raise DataError(f"{ion!r}: expected an ion such as Ca2+, found no charge")
    return species


def _radii(element: Element, charge: int) -> dict[int, float]:
    """Coordination number -> radius; those of one geometry alone (IVSQ) are left out.

    pymatgen's own look-up takes no coordination that is not in the tables, and warns of each spin.
    """
    found = {}
    tables = element.data.get("Shannon radii") or {}  # none of noble gases
    for numeral, spins in tables.get(str(charge), {}).items():
        if numeral in _NUMERALS:
            first = next(iter(spins.values()))
            radius = spins.get("", spins.get("High Spin", first))["ionic_radius"]
            found[_NUMERALS.index(numeral) + 1] = float(radius)
    return found


@cache
def _mean_difference(start: int, end: int) -> float:
    """Of the radii of all ions that have both coordinations."""
    from pymatgen.core import Element

    differences = []
    for element in Element:
        for charge in range(-3, 9):
            radii = _radii(element, charge)
            if start in radii and end in radii:
                differences.append(radii[end] - radii[start])
    return float(np.mean(differences))
