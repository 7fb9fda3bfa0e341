"""The trilinear hexahedron with mean dilatation, on the unit cube (numpy, no solver state).

Corners are numbered in the order of CORNERS; element vectors are (corner, component), 24 long.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

CORNERS = tuple(itertools.product((0, 1), repeat=3))
# Axes sheared by the Voigt components 23, 13 and 12.
_SHEARED = ((1, 2), (0, 2), (0, 1))
_DILATATION = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])


def isotropic_stiffness(bulk: float, shear: float) -> FloatArray:
    deviatoric = np.diag([2.0, 2.0, 2.0, 1.0, 1.0, 1.0]) - 2 / 3 * np.outer(
        _DILATATION, _DILATATION
    )
    return bulk * np.outer(_DILATATION, _DILATATION) + shear * deviatoric


def strain_matrix(point: Sequence[float]) -> FloatArray:
    """(6, 24) strain at `point` of the unit element from its displacements (corner, component)."""
    gradient = np.empty((8, 3))
    for corner, upper in enumerate(CORNERS):
        value = [x if up else 1 - x for x, up in zip(point, upper, strict=True)]
        slope = [1.0 if up else -1.0 for up in upper]
        gradient[corner] = [slope[axis] * value[axis - 1] * value[axis - 2] for axis in range(3)]
    matrix = np.zeros((6, 8, 3))
    for axis in range(3):
        matrix[axis, :, axis] = gradient[:, axis]
    for row, (first, second) in enumerate(_SHEARED, start=3):
        matrix[row, :, first] = gradient[:, second]
        matrix[row, :, second] = gradient[:, first]
    return matrix.reshape(6, 24)


def element_modes() -> FloatArray:
    """(18, 24) G: energy of an element = (bulk s0^2 + shear (s1^2 + ... + s17^2)) / 2, s = G u."""
    dilatation = _DILATATION @ strain_matrix((0.5, 0.5, 0.5))
    gauss = (0.5 - 1 / math.sqrt(12), 0.5 + 1 / math.sqrt(12))
    unit_shear = isotropic_stiffness(0.0, 1.0)
    points = [strain_matrix(point) for point in itertools.product(gauss, repeat=3)]
    values, vectors = np.linalg.eigh(sum(b.T @ unit_shear @ b for b in points) / 8)
    # 6 rigid motions and the dilatation cost no deviatoric energy; the other eigenvalues are 1/6..1.
    return np.vstack([dilatation, (vectors[:, 7:] * np.sqrt(values[7:])).T])


def affine_displacement() -> FloatArray:
    """(24, 6) corner displacements of the unit element under each unit macro strain."""
    displacement = np.zeros((8, 3, 6))
    for corner, position in enumerate(CORNERS):
        for axis in range(3):
            displacement[corner, axis, axis] = position[axis]
        for column, (first, second) in enumerate(_SHEARED, start=3):
            displacement[corner, first, column] = position[second] / 2
            displacement[corner, second, column] = position[first] / 2
    return displacement.reshape(24, 6)


def inverse_symbol(element: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """(3, 3, N1, N2, N3/2+1, 1) inverse of a homogeneous mesh in Fourier space; zero at zero.

    element: (24, 24) stiffness. A cube is its own image under inversion through its centre, so the
    block of two corners depends on their offset's sign only by transposition: the symbol is real.
    """
    frequencies = [2 * np.pi * np.fft.fftfreq(n) for n in shape[:2]]
    frequencies.append(2 * np.pi * np.fft.rfftfreq(shape[2]))
    k1, k2, k3 = np.meshgrid(*frequencies, indexing="ij")
    blocks = element.reshape(8, 3, 8, 3)
    symbol = np.zeros((*k1.shape, 3, 3))
    for row, a in enumerate(CORNERS):
        for column, b in enumerate(CORNERS):
            angle = (b[0] - a[0]) * k1 + (b[1] - a[1]) * k2 + (b[2] - a[2]) * k3
            symbol += np.cos(angle)[..., None, None] * blocks[row, :, column]
    symbol[0, 0, 0] = np.eye(3)
    inverse = np.linalg.inv(symbol)
    inverse[0, 0, 0] = 0.0
    return np.ascontiguousarray(np.moveaxis(inverse, (-2, -1), (0, 1)))[..., None]
