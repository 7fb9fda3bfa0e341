"""Bounds and estimates of the stiffness of two-phase composites from the volume fraction alone.

All take the fraction of the stiff phase as an array of any shape and return C1111 in GPa, the
stress for a unit uniaxial macro strain, in the same shape.

Voigt and Reuss bound every microstructure. Hashin-Shtrikman bound C1111 of statistically isotropic
composites only: one finite or anisotropic cell may lie outside, and a laminate along the load does.
What every cell obeys is the same pair of bounds on the isotropic part of its stiffness tensor
(`isotropic_part`): the trace bounds of Milton and Kohn (J. Mech. Phys. Solids 36 (1988) 597) limit
the projections of (C - C_phase)^-1 whatever the anisotropy, and the inverse is convex. Its
K + 4 G / 3 is C1111 averaged over all load directions. These are statements on the continuum: where
single soft voxels lie in much stiff phase (white noise at contrast 50 from 70 % stiff on), one
element per voxel is too stiff and exceeds the upper bound, until the voxels are subdivided.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dmi_hpc.errors import DMIError
from dmi_hpc.physics.elasticity import Material

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class HashinShtrikman:
    """Bounds on bulk and shear modulus in GPa, and what follows for C1111 = K + 4 G / 3."""

    bulk_lower: FloatArray
    bulk_upper: FloatArray
    shear_lower: FloatArray
    shear_upper: FloatArray

    @property
    def lower(self) -> FloatArray:
        return self.bulk_lower + 4 / 3 * self.shear_lower

    @property
    def upper(self) -> FloatArray:
        return self.bulk_upper + 4 / 3 * self.shear_upper

    @property
    def mean(self) -> FloatArray:
        """The usual estimate: midway between the bounds."""
        return (self.lower + self.upper) / 2


def voigt(fraction: npt.ArrayLike, soft: Material, stiff: Material) -> FloatArray:
    """Rule of mixtures, C1111 at uniform strain: the upper bound of every microstructure."""
    f = _checked(fraction)
    low, high = (float(m.stiffness_GPa()[0, 0]) for m in (soft, stiff))
    return low + f * (high - low)


def reuss(fraction: npt.ArrayLike, soft: Material, stiff: Material) -> FloatArray:
    """C1111 of the stiffness at uniform stress: the lower bound of every microstructure."""
    f = _checked(fraction)
    bulk = _harmonic(f, soft.bulk_GPa, stiff.bulk_GPa, 0.0)
    shear = _harmonic(f, soft.shear_GPa, stiff.shear_GPa, 0.0)
    return bulk + 4 / 3 * shear


def hashin_shtrikman(fraction: npt.ArrayLike, soft: Material, stiff: Material) -> HashinShtrikman:
    """Hashin-Shtrikman bounds (J. Mech. Phys. Solids 11 (1963) 127) of isotropic composites.

    In Walpole's form (1966), which also holds where one phase has the larger bulk and the other
    the larger shear modulus.
    """
    f = _checked(fraction)
    bulks, shears = (soft.bulk_GPa, stiff.bulk_GPa), (soft.shear_GPa, stiff.shear_GPa)

    def bounds(bulk: float, shear: float) -> tuple[FloatArray, FloatArray]:
        zeta = shear / 6 * (9 * bulk + 8 * shear) / (bulk + 2 * shear)
        return _harmonic(f, *bulks, 4 / 3 * shear), _harmonic(f, *shears, zeta)

    bulk_lower, shear_lower = bounds(min(bulks), min(shears))
    bulk_upper, shear_upper = bounds(max(bulks), max(shears))
    return HashinShtrikman(bulk_lower, bulk_upper, shear_lower, shear_upper)


def isotropic_part(stiffness: npt.NDArray[Any]) -> tuple[FloatArray, FloatArray]:
    """Bulk and shear modulus (...) of the isotropic part of Voigt stiffnesses (..., 6, 6)."""
    c = np.asarray(stiffness, dtype=np.float64)
    normal = c[..., :3, :3].sum((-2, -1))
    diagonal = np.trace(c[..., :3, :3], axis1=-2, axis2=-1)
    bulk = normal / 9
    shear = (3 * diagonal - normal) / 30 + np.trace(c[..., 3:, 3:], axis1=-2, axis2=-1) / 5
    return bulk, shear


def _harmonic(f: FloatArray, soft: float, stiff: float, shift: float) -> FloatArray:
    return 1 / ((1 - f) / (soft + shift) + f / (stiff + shift)) - shift


def _checked(fraction: npt.ArrayLike) -> FloatArray:
    f = np.asarray(fraction, dtype=np.float64)
    if not ((f >= 0) & (f <= 1)).all():
        raise DMIError(f"volume fractions span {f.min():.4g}..{f.max():.4g}; expected 0..1")
    return f
