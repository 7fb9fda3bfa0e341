"""Atomic fingerprints: what surrounds a site, seen from 12 directions, with all chemistry left out.

After Ryan, Lengyel and Shatruk, J. Am. Chem. Soc. 140 (2018) 10158. The neighbours of a site are
projected along the 12 directions to the vertices of an icosahedron. Lengths count in the spacing of
the crystal's atoms, (volume / atoms)^(1/3), so that a crystal that is blown up looks the same. All
neighbours look alike, whatever their elements.

The icosahedron stands in a frame that the neighbours themselves define, so that a crystal that is
turned, mirrored or described by another cell looks the same, too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]

VIEWS, PIXELS = 12, 16
REACH = 2.5  # spacings, about 65 neighbours; a view shows -REACH to REACH
WIDTH = 0.22  # standard deviation of a neighbour's Gaussian, spacings
CLOSEST = 0.2  # spacings; hydrogen molecules have 0.3 and more
BRIGHT = 2.0  # brightness at which the bytes end; the nearest neighbours stay below
_SITES = 256  # drawn at once: their neighbours in all views take some 100 MB


def fingerprints(cell: Array, fractions: Array, sites: Array) -> Array:
    """(m, 12, 16, 16) uint8 of the m atoms `sites` of a periodic crystal.

    cell: (3, 3), rows are vectors, any unit of length; fractions: (n, 3) fractional coordinates; sites:
    (m,) numbers of atoms. Raises DataError if the cell has no volume or two atoms coincide.
    """
    return np.concatenate(
        [
            drawn(neighbours(cell, fractions, sites[start : start + _SITES]))
            for start in range(0, len(sites), _SITES)
        ]
    )


def neighbours(cell: Array, fractions: Array, sites: Array) -> Array:
    """(m, k, 3) vectors from each site to its neighbours, in spacings, in the site's own frame.

    k is the largest number of neighbours within `REACH`; rows with fewer end with nan.
    """
    from pymatgen.optimization.neighbors import find_points_in_spheres

    volume = abs(float(np.linalg.det(cell)))
    if not volume > 1e-3 * float(np.prod(np.linalg.norm(cell, axis=1))):
        raise DataError(f"a cell without volume: {np.asarray(cell).tolist()}")
    cell = np.ascontiguousarray(cell / (volume / len(fractions)) ** (1 / 3), dtype=np.float64)
    positions = np.ascontiguousarray(np.mod(fractions, 1.0) @ cell)
    first, second, images, distance = find_points_in_spheres(
        positions,
        np.ascontiguousarray(positions[sites]),
        r=REACH,
        pbc=np.ones(3, dtype=np.int64),
        lattice=cell,
        tol=1e-8,
    )
    other = ~((sites[first] == second) & (images == 0).all(axis=1))
    first, second, images, distance = (found[other] for found in (first, second, images, distance))
    if len(distance) and distance.min() < CLOSEST:
        at = int(distance.argmin())
        raise DataError(
            f"atoms {sites[first[at]] + 1} and {second[at] + 1} are {distance[at]:.2g} spacings apart, "
            f"expected at least {CLOSEST}: one atom twice, or a cell that is mostly empty"
        )
    vectors = positions[second] + images @ cell - positions[sites[first]]
    order = np.lexsort((distance, first))
    first, vectors = first[order], vectors[order]
    counts = np.bincount(first, minlength=len(sites))
    if not counts.all():
        raise DataError(
            f"atom {sites[counts.argmin()] + 1} has no neighbour within {REACH} spacings: a cell "
            "that is mostly empty"
        )
    place = np.arange(len(first)) - np.repeat(np.cumsum(counts) - counts, counts)
    result = np.full((len(sites), int(counts.max()), 3), np.nan)
    result[first, place] = vectors
    return in_own_frame(result)


def in_own_frame(vectors: Array) -> Array:
    """Neighbours (m, k, 3) turned, or turned and mirrored, into a frame that they alone define.

    Its z axis points to the neighbour whose direction agrees best with the others', its x axis is the
    best of those across. Neighbours that a symmetry of the site exchanges agree equally: whichever is
    chosen, the result is the same.
    """
    known = ~np.isnan(vectors[..., 0])
    vectors = np.where(known[..., None], vectors, 0.0)
    distance = np.linalg.norm(vectors, axis=2)
    weight = np.where(known, _weight(np.where(known, distance, 1.0)), 0.0)
    unit = vectors / np.where(known, distance, 1.0)[..., None]
    cosine = unit @ unit.swapaxes(1, 2)  # (m, k, k)
    score = np.einsum("mk,mik->mi", weight, _agreement(cosine)) + weight * 2
    z = _chosen(np.where(known, score, -np.inf), unit)

    along = np.einsum("mkc,mc->mk", vectors, z)
    across = vectors - along[..., None] * z[:, None, :]
    width = np.linalg.norm(across, axis=2)
    flat = across / np.maximum(width, 1e-9)[..., None]
    # a neighbour on the axis says nothing about x
    share = weight * np.clip(width / np.maximum(distance, 1e-9), 0, 1) ** 2
    score = np.einsum("mk,mik->mi", share * (1 + along / 3), _agreement(flat @ flat.swapaxes(1, 2)))
    score = (score + 2 * share) * np.where(width > 0.05, 1.0, 0.0)
    x = _chosen(score, flat)
    lone = np.linalg.norm(x, axis=1) < 0.5  # all neighbours on one line
    x[lone] = _any_across(z[lone])

    places = vectors @ np.stack([x, np.cross(z, x), z], axis=2)  # (m, k, 3)
    x_, y_, z_ = np.moveaxis(places, 2, 0)
    handed = (weight * (1 + x_ / 3 + z_ / 5) * y_ * (y_ * y_ + 0.5)).sum(axis=1)
    places[handed < 0, :, 1] *= -1
    return np.where(known[..., None], places, np.nan)


def drawn(places: Array) -> Array:
    """(m, 12, 16, 16) uint8 pictures of neighbours (m, k, 3); nan is none.

    A view shows what stands before the site in its direction, projected to the plane across: each
    neighbour is a Gaussian of the height weight(distance) x cosine of its angle to the direction.
    Bytes are the square root of the brightness.
    """
    distance = np.linalg.norm(places, axis=2)
    weight = np.where(np.isnan(distance), 0.0, _weight(np.where(distance > 0, distance, 1.0)))
    weight = (weight / np.where(distance > 0, distance, 1.0)).astype(np.float32)
    turned = np.einsum("mkc,vac->mvka", np.nan_to_num(places), _frames()).astype(np.float32)
    grid = ((np.arange(PIXELS) + 0.5) / PIXELS * 2 - 1).astype(np.float32) * REACH
    columns, rows = (
        np.exp(-0.5 * ((turned[..., axis, None] - grid) / WIDTH) ** 2) for axis in (0, 1)
    )
    height = weight[:, None, :] * np.maximum(turned[..., 2], 0)
    image = (columns * height[..., None]).swapaxes(2, 3) @ rows
    return np.asarray(np.rint(255 * np.sqrt(np.minimum(image / BRIGHT, 1))), dtype=np.uint8)


def _weight(distance: Array) -> Array:
    """1/d^2, and smoothly 0 at `REACH`."""
    return np.asarray((1 + np.cos(np.pi * np.minimum(distance / REACH, 1))) / (2 * distance**2))


def _agreement(cosine: Array) -> Array:
    """How much a direction counts for an axis: most if along it, some if against it."""
    square = cosine * cosine
    return np.asarray(square * square + (0.3 * square + 0.1) * cosine)


def _chosen(score: Array, directions: Array) -> Array:
    """(m, 3): the direction with the highest score; of those that differ by rounding alone, the first,
    which is one of the nearest."""
    best = score.max(axis=1, keepdims=True)
    at = (score >= best - 1e-4 * np.abs(best)).argmax(axis=1)
    return np.asarray(directions[np.arange(len(score)), at])


def _any_across(axes: Array) -> Array:
    """(m, 3) unit vectors across the given ones."""
    other = np.eye(3)[np.abs(axes).argmin(axis=1)] if len(axes) else np.empty((0, 3))
    across = np.cross(axes, other)
    return np.asarray(across / np.linalg.norm(across, axis=1, keepdims=True))


@cache
def _frames() -> Array:
    """(12, 3, 3): of each view, the axes of its picture and its direction."""
    around, up = np.pi / 5 * np.arange(10), 5**-0.5 * (-1.0) ** np.arange(10)
    rings = np.column_stack([0.8**0.5 * np.cos(around), 0.8**0.5 * np.sin(around), up])
    direction = np.concatenate([[[0.0, 0, 1], [0, 0, -1]], rings])
    upright = np.where(np.abs(direction[:, 2:]) > 0.9, [[0.0, 1, 0]], [[0.0, 0, 1]])
    first = np.cross(upright, direction)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    return np.stack([first, np.cross(direction, first), direction], axis=1)
