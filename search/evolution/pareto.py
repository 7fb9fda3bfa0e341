"""Several objectives, all of them minimised: fronts, crowding, the order of NSGA-II, hypervolume.

A point dominates another if it is nowhere worse and somewhere better. K. Deb et al., "A fast and
elitist multiobjective genetic algorithm: NSGA-II", IEEE Trans. Evol. Comput. 6 (2002) 182.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

from search.base import Vector

Integers = npt.NDArray[np.int64]


def nondominated_ranks(values: Vector) -> Integers:
    """(n, m) objectives -> (n,) fronts: 0 is dominated by none, k by points of front k - 1.

    Raises ValueError for what is not finite.
    """
    points, back = np.unique(_checked(values), axis=0, return_inverse=True)
    # in lexicographic order only earlier points dominate
    ranks = _swept(points) if points.shape[1] <= 2 else _chained(points)
    return ranks[back.reshape(-1)]


def _swept(points: Vector) -> Integers:
    """Of one or two objectives: a point is dominated by a front whose least last value it reaches."""
    least: list[float] = []  # ascending, by front
    ranks = np.empty(len(points), np.int64)
    for i, value in enumerate(points[:, -1].tolist()):
        ranks[i] = k = bisect_right(least, value)
        least[k : k + 1] = [value]
    return ranks


def _chained(points: Vector) -> Integers:
    """Of any number: the rank is the longest chain of points that dominate each other."""
    ranks = np.zeros(len(points), np.int64)
    for i in range(1, len(points)):
        above = ranks[:i][(points[:i] <= points[i]).all(1)]
        if above.size:
            ranks[i] = above.max() + 1
    return ranks


def front(values: Vector) -> Integers:
    """Indices of the points that none dominates, ascending; equal points are all among them.

    Raises ValueError for what is not finite.
    """
    values = _checked(values)
    left = np.lexsort(values.T[::-1])
    found: list[Integers] = []
    while left.size:
        best = values[left[0]]
        equal = (values[left] == best).all(1)
        found.append(left[equal])
        left = left[(values[left] < best).any(1)]
    return np.sort(np.concatenate(found)) if found else left


def crowding(values: Vector, ranks: Integers | None = None) -> Vector:
    """(n,) distance between the neighbours of a point in its front, summed over the objectives.

    Each objective counts in units of its range in the front; its ends have distance inf. ranks: (n,)
    the fronts; None: all are one. Raises ValueError for what is not finite.
    """
    values = _checked(values)
    fronts = np.zeros(len(values), np.int64) if ranks is None else ranks
    distance = np.zeros(len(values))
    for column in values.T:
        rows = np.lexsort((column, fronts))
        value = column[rows]
        _, first, size = np.unique(fronts[rows], return_index=True, return_counts=True)
        last = first + size - 1
        span = np.repeat(value[last] - value[first], size)
        gap = np.zeros(len(rows))
        gap[1:-1] = value[2:] - value[:-2]
        gap[span > 0] /= span[span > 0]
        gap[first] = gap[last] = np.inf
        distance[rows] += gap
    return distance


def order(values: Vector, violation: Vector | None = None) -> Integers:
    """(n,) place of each point, 0 for the best: by front, then by crowding, the lonelier first.

    violation: (n,) by how much a point breaks the constraints, <= 0 if it keeps them. What breaks
    them comes after all that keeps them, the least breach first (Deb's rule). Equal ones stay in
    their order. Raises ValueError for what is not finite.
    """
    values = _checked(values)
    breach = np.zeros(len(values)) if violation is None else np.maximum(violation, 0.0)
    if not np.isfinite(breach).all():
        raise ValueError("a violation is not finite: record such a point as a failure")
    keeps = np.flatnonzero(breach == 0)
    ranks = np.zeros(len(values), np.int64)
    distance = np.zeros(len(values))
    ranks[keeps] = nondominated_ranks(values[keeps])
    distance[keeps] = crowding(values[keeps], ranks[keeps])
    places = np.empty(len(values), np.int64)
    places[np.lexsort((-distance, ranks, breach))] = np.arange(len(values))
    return places


def hypervolume(values: Vector, reference: Vector) -> float:
    """What the points dominate up to `reference` (m,), exactly; points beyond it count nothing.

    Made for few objectives: the time grows as n^(m-1). Raises ValueError for what is not finite.
    """
    values, reference = _checked(values), np.asarray(reference, dtype=np.float64)
    if reference.shape != values.shape[1:] or not np.isfinite(reference).all():
        raise ValueError(f"the reference is {reference}, expected {values.shape[1]} finite numbers")
    inside = values[(values < reference).all(1)]
    return _volume(inside[front(inside)], reference)


def _volume(points: Vector, reference: Vector) -> float:
    """Cut in slabs along the last objective."""
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(reference[0] - points.min())
    points = points[np.argsort(points[:, -1], kind="stable")]
    thickness = np.diff(points[:, -1], append=reference[-1])
    if points.shape[1] == 2:
        widths = reference[0] - np.minimum.accumulate(points[:, 0])
        return float(widths @ thickness)
    flat, edge = points[:, :-1], reference[:-1]
    volumes = (_volume(flat[: i + 1], edge) * t for i, t in enumerate(thickness) if t > 0)
    return float(sum(volumes))


def _checked(values: Vector) -> Vector:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or not values.shape[1]:
        raise ValueError(f"objectives have shape {values.shape}, expected (points, objectives)")
    if not np.isfinite(values).all():
        raise ValueError("an objective is not finite: record such a point as a failure")
    return values
