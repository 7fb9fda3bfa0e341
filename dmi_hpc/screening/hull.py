"""Convex hulls of formation energies: how far a composition lies above or below known compounds.

The lower hull over the compositions of a system of n elements is the maximum of linear functions
mu . x, one for each facet: mu are the chemical potentials of the elements in equilibrium with the n
compounds of the facet, x the fractions. So a thousand candidates cost one product of matrices, where
`pymatgen.analysis.phase_diagram` decomposes one after another; the tests compare both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from dmi_hpc.data.elements import ELEMENTS

Array = np.ndarray[Any, np.dtype[Any]]
System = tuple[int, ...]  # places in ELEMENTS, ascending

_FLAT = (
    1e-9  # facets of less volume, relative to that of the elements, stand upright or are slivers
)


@dataclass(frozen=True)
class Compound:
    """fractions: of the elements of its own system, all positive; energy: of formation, eV/atom."""

    formula: str
    fractions: tuple[float, ...]
    energy: float


@dataclass(frozen=True)
class Hull:
    """The lower hull of one system of n elements, which themselves have the energy 0.

    shares: (p, n) fractions of the compounds at hand, the elements first; facets: (f, n) rows of
    `shares`; potentials: (f, n) eV/atom.
    """

    names: tuple[str, ...]
    shares: Array
    facets: Array
    potentials: Array

    def energy(self, fractions: Array) -> Array:
        """(m, n) fractions -> (m,) eV/atom of the hull there."""
        return np.asarray((fractions @ self.potentials.T).max(axis=1))

    def products(self, fractions: Array) -> list[tuple[str, float]]:
        """(n,) fractions -> compounds of the hull that it decomposes into, and their shares of atoms."""
        # of all facets the one that surrounds the point, on which no share is negative
        inverse = np.linalg.inv(self.shares[self.facets])
        amounts = np.einsum("n,fnk->fk", fractions, inverse)
        facet = int(amounts.min(axis=1).argmax())
        pairs = zip(self.facets[facet], amounts[facet], strict=True)
        found = [(self.names[i], float(amount)) for i, amount in pairs if amount > 1e-6]
        return sorted(found, key=lambda pair: -pair[1])


class Known:
    """Compounds by chemical system, the lowest of each composition."""

    def __init__(self, compounds: Mapping[System, Sequence[Compound]]) -> None:
        self._all = compounds
        self.formulas = frozenset(c.formula for some in compounds.values() for c in some)
        self._by_system = {
            # above the elements nothing is on a hull
            system: below
            for system, some in compounds.items()
            if (below := [c for c in _lowest(some) if c.energy < 0])
        }

    def __len__(self) -> int:
        return len(self.formulas)

    def plus(self, more: Mapping[System, Sequence[Compound]]) -> Known:
        """These and others."""
        systems = {*self._all, *more}
        return Known({s: (*self._all.get(s, ()), *more.get(s, ())) for s in systems})

    def within(self, system: System) -> list[tuple[Compound, tuple[int, ...]]]:
        """Compounds of two elements or more of the system, with the places of these in it."""
        n = len(system)
        found = []
        for size in range(2, n + 1):
            for places in combinations(range(n), size):
                some = self._by_system.get(tuple(system[i] for i in places), ())
                found += [(compound, places) for compound in some]
        return found


def _lowest(compounds: Sequence[Compound]) -> list[Compound]:
    """One of each composition."""
    best: dict[str, Compound] = {}
    for each in compounds:
        if each.formula not in best or each.energy < best[each.formula].energy:
            best[each.formula] = each
    return list(best.values())


def hull_of(system: System, known: Known) -> Hull:
    """The hull of the known compounds of a system, of its subsystems, and its elements."""
    assert list(system) == sorted(set(system)), system
    compounds, n = known.within(system), len(system)
    shares = np.zeros((n + len(compounds), n))
    shares[:n] = np.eye(n)
    for row, (compound, places) in enumerate(compounds, start=n):
        shares[row, list(places)] = compound.fractions
    energies = np.array([0.0] * n + [compound.energy for compound, _ in compounds])
    names = (*(ELEMENTS[e] for e in system), *(compound.formula for compound, _ in compounds))
    facets = lower_facets(shares, energies)
    potentials = np.linalg.solve(shares[facets], energies[facets][..., None])[..., 0]
    return Hull(names, shares, facets, potentials)


@dataclass(frozen=True)
class Potentials:
    """Hulls of the known compounds in several systems at once; picklable."""

    known: Known

    def __call__(self, systems: Array) -> Array:
        """(g, n) -> (g, f, n) chemical potentials; systems of fewer facets are filled up by -inf."""
        found = [hull_of(tuple(row), self.known).potentials for row in systems.tolist()]
        made = np.full((len(found), max(map(len, found)), systems.shape[1]), -np.inf)
        for one, some in zip(made, found, strict=True):
            one[: len(some)] = some
        return made


def lower_facets(shares: Array, energies: Array) -> Array:
    """(f, n) rows of the points that span the lower hull: of (p, n) fractions, (p,) energies <= 0.

    The first n points are the elements, at energy 0.
    """
    from scipy.spatial import ConvexHull

    p, n = shares.shape
    if p == n:
        return np.arange(n)[None]
    # a point above all others, as the hull must have a volume; its facets are the upper ones
    top = np.append(np.full(n - 1, 1 / n), 1.0)
    points = np.vstack([np.column_stack([shares[:, 1:], energies]), top])
    facets = ConvexHull(points).simplices
    facets = facets[(facets < p).all(axis=1)]
    return np.asarray(facets[np.abs(np.linalg.det(shares[facets])) > _FLAT])
