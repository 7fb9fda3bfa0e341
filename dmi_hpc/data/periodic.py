"""Properties of the elements that pymatgen knows: a table of descriptors that needs no file."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

import numpy as np

from dmi_hpc.data.descriptors import ElementTable
from dmi_hpc.data.elements import ELEMENTS

PROPERTIES = (
    *("Z", "group", "row", "mendeleev_no", "atomic_mass"),
    *("X", "ionization_energy", "electron_affinity", "min_oxidation_state", "max_oxidation_state"),
    *("atomic_radius", "average_ionic_radius", "van_der_waals_radius", "molar_volume"),
    *("melting_point", "boiling_point", "thermal_conductivity"),
)


@cache
def periodic_table() -> ElementTable:
    """`PROPERTIES` of the 86 elements; the median over the others where one has none (Kr: a radius)."""
    from pymatgen.core import Element
    from pymatgen.core import __file__ as source

    with warnings.catch_warnings(action="ignore"):  # of each property that an element lacks
        found = [[getattr(Element(symbol), name) for name in PROPERTIES] for symbol in ELEMENTS]
    values = np.array([[np.nan if v is None else float(v) for v in row] for row in found])
    return ElementTable(Path(source), PROPERTIES, values, frozenset(ELEMENTS), "").filled()
