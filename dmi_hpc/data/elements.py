"""Formulas as fractions of the 86 elements of ElemNet (Jha et al., Sci. Rep. 8 (2018) 17593)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]

_SYMBOLS = (
    "H Li Be B C N O F Na Mg Al Si P S Cl K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr "
    "Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho "
    "Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Ac Th Pa U Np Pu"
)
# Z = 1 to 94 without He Ne Ar Po At Rn Fr Ra, in order of Z
ELEMENTS: tuple[str, ...] = tuple(_SYMBOLS.split())
_INDEX = {element: i for i, element in enumerate(ELEMENTS)}


def parse_formula(formula: str) -> dict[str, float]:
    """Amount of each element. Raises DataError saying why the formula cannot be used.

    Parentheses, decimals and spaces are understood ("Ca(OH)2", "Li0.5CoO2", "Fe2 O3"); a hydrate's
    dot is not: "CuSO4.5H2O" reads as O4.5.
    """
    from pymatgen.core.composition import Composition  # slow to import

    try:
        amounts: dict[str, float] = Composition(formula).get_el_amt_dict()
    except (ValueError, OverflowError) as error:
        raise DataError(f"not a formula: {str(error) or formula!r}") from None
    for element in amounts:
        if element not in _INDEX:
            raise DataError(f"element {element} is not one of the {len(ELEMENTS)} of ElemNet")
    if not amounts or not math.isfinite(sum(amounts.values())):
        raise DataError("no finite amount of any element")
    return amounts


def reduced_formula(amounts: Mapping[str, float]) -> str:
    """The same text for the same composition: smallest whole numbers, in order of Z.

    pymatgen's own reduced formula keeps Fe2O3.5 apart from Fe4O7.
    """
    exact = {e: Fraction(a).limit_denominator(1_000_000) for e, a in amounts.items()}
    common = math.lcm(*(f.denominator for f in exact.values()))
    whole = {e: int(f * common) for e, f in exact.items()}
    divisor = math.gcd(*whole.values()) or 1
    ordered = sorted(whole, key=lambda element: _INDEX[element])
    return "".join(f"{e}{n}" if (n := whole[e] // divisor) != 1 else e for e in ordered)


def fractions_of(amounts: Mapping[str, float]) -> Array:
    """(86,) float32, summing to 1."""
    fractions = np.zeros(len(ELEMENTS), dtype=np.float64)
    for element, amount in amounts.items():
        fractions[_INDEX[element]] = amount
    return np.asarray(fractions / fractions.sum(), dtype=np.float32)


def element_fractions(formula: str) -> Array:
    """(86,) float32, atomic fractions in the order of ELEMENTS. Raises DataError as parse_formula."""
    return fractions_of(parse_formula(formula))
