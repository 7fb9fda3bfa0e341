"""All compositions of chosen elements, each once: how many, and in which order. No torch here.

A composition is a chemical system (different elements, in order of Z) with a stoichiometry: positive
whole numbers of atoms without a common divisor. Every system has the same stoichiometries, so that
both are listed separately and combined where they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations
from math import comb
from typing import Any

import numpy as np

from dmi_hpc.data.elements import ELEMENTS
from dmi_hpc.screening.options import Compositions

Array = np.ndarray[Any, np.dtype[Any]]


def count_stoichiometries(components: int, max_atoms: int) -> int:
    """Positive tuples without a common divisor that sum to at most `max_atoms`.

    Tuples of sum m with any divisor: C(m - 1, components - 1). Moebius inversion over the divisors
    d of the whole tuple leaves sum_d mu(d) C(max_atoms // d, components).
    """
    return sum(
        mu * comb(max_atoms // divisor, components)
        for divisor, mu in enumerate(_moebius(max_atoms), start=1)
    )


def _moebius(largest: int) -> list[int]:
    """mu(1), ..., mu(largest), from sum of mu(d) over d | n = 0 for n > 1."""
    mu = [0, 1] + [0] * (largest - 1)
    for d in range(1, largest + 1):
        for multiple in range(2 * d, largest + 1, d):
            mu[multiple] -= mu[d]
    return mu[1:]


def count_systems(wanted: Compositions, components: int) -> int:
    free, fixed = len(wanted.elements) - len(wanted.required), len(wanted.required)
    return comb(free, components - fixed)


def count(wanted: Compositions) -> int:
    """Number of compositions before any filter of charges."""
    return sum(
        count_systems(wanted, n) * count_stoichiometries(n, wanted.max_atoms)
        for n in wanted.components
    )


def stoichiometries(components: int, max_atoms: int) -> Array:
    """(s, components) int64, in lexicographic order; s = `count_stoichiometries`."""
    rows = np.empty((1, 0), dtype=np.int64)
    for position in range(components):
        # what later elements need at least is left to them
        choices = max_atoms - rows.sum(axis=1) - (components - position - 1)
        ends = np.cumsum(choices)
        amount = np.arange(ends[-1]) - np.repeat(ends - choices, choices) + 1
        rows = np.column_stack([np.repeat(rows, choices, axis=0), amount])
    coprime: Array = rows[np.gcd.reduce(rows, axis=1) == 1]
    return coprime


def systems(wanted: Compositions, components: int) -> Array:
    """(g, components) uint8, places in ELEMENTS, ascending; g = `count_systems`."""
    required = sorted(ELEMENTS.index(e) for e in wanted.required)
    free = sorted({ELEMENTS.index(e) for e in wanted.elements} - set(required))
    chosen = components - len(required)
    total = count_systems(wanted, components)
    flat = chain.from_iterable(combinations(free, chosen))
    rows = np.fromiter(flat, np.uint8, total * chosen).reshape(total, chosen)
    fixed = np.broadcast_to(np.array(required, dtype=np.uint8), (total, len(required)))
    return np.sort(np.hstack([rows, fixed]), axis=1)


def formulas(systems: Array, amounts: Array) -> Array:
    """Reduced formulas as `dmi_hpc.data.elements.reduced_formula` writes them: objects.

    systems: (..., n) places in ELEMENTS; amounts: (..., n) positive; both broadcast.
    """
    symbols = np.array(ELEMENTS, dtype=object)
    numbers = np.array(["", "", *map(str, range(2, int(amounts.max(initial=1)) + 1))], dtype=object)
    parts = [symbols[systems[..., i]] + numbers[amounts[..., i]] for i in range(systems.shape[-1])]
    return np.asarray(sum(parts[1:], parts[0]))


def oxidation_states(elements: Sequence[str] = ELEMENTS) -> Array:
    """(elements, k) int64 common oxidation states (pymatgen), rows filled up by repeating."""
    from pymatgen.core.periodic_table import Element  # slow to import

    states = [tuple(Element(symbol).common_oxidation_states) for symbol in elements]
    assert all(states), "ELEMENTS have one each"
    width = max(map(len, states))
    return np.array([row + row[:1] * (width - len(row)) for row in states])
