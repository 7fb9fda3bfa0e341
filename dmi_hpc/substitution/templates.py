"""New compounds by substitution: all elements in a known structure type, ranked by its sites.

After Ryan, Lengyel and Shatruk, J. Am. Chem. Soc. 140 (2018) 10158. A *template* is a known structure
with its elements taken out: k groups of symmetry-distinct sites, one element on each group. A
*candidate* is an assignment of k different elements to the groups. Its score is the sum over the sites
of log p(element | site).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations, permutations
from math import gcd
from typing import Any

import numpy as np

from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
Compound = frozenset[tuple[int, int]]  # (class of the element, atoms in the reduced formula)

MOST_GROUPS = 3  # all candidates are looked at: 600,000 of three groups
FLOOR = 1e-9  # a probability below is one that the network cannot tell from zero


@dataclass(frozen=True)
class Template:
    """A structure without its elements.

    groups: (m,) from 0 to k - 1, which sites hold the same element; atoms: (m,) of the cell that each
    site stands for.
    """

    name: str
    groups: Array
    atoms: Array

    def __post_init__(self) -> None:
        found = np.unique(self.groups)
        if not 1 <= len(found) <= MOST_GROUPS or (found != np.arange(len(found))).any():
            raise DataError(
                f"{self.name}: {len(found)} different elements, expected 1 to {MOST_GROUPS}. Leave "
                "the structure out"
            )

    @cached_property
    def amounts(self) -> tuple[int, ...]:
        """Atoms of each group in the reduced formula."""
        whole = np.bincount(self.groups, weights=self.atoms).astype(int).tolist()
        return tuple(amount // gcd(*whole) for amount in whole)

    def compound(self, elements: Iterable[int]) -> Compound:
        """That this assignment makes."""
        return frozenset(zip(map(int, elements), self.amounts, strict=True))


def assignment_scores(template: Template, probabilities: Array) -> Array:
    """(E,) * k: the score of each assignment of E elements, -inf where two groups share one.

    probabilities: (m, E) of each site.
    """
    logs = np.log(np.maximum(probabilities, FLOOR))
    k = len(template.amounts)
    groups = np.stack([logs[template.groups == g].sum(axis=0) for g in range(k)])  # (k, E)
    scores = groups[0]
    for group in groups[1:]:
        scores = scores[..., None] + group
    return np.asarray(scores + _different(k, groups.shape[1]))


@lru_cache(maxsize=2 * MOST_GROUPS)
def _different(k: int, elements: int) -> Array:
    """(E,) * k: 0 where all indices differ, else -inf."""
    result = np.zeros([elements] * k)
    for first, second in combinations(range(k), 2):
        axes = [1] * k
        axes[first] = axes[second] = elements
        result = np.where(np.eye(elements, dtype=bool).reshape(axes), -np.inf, result)
    return result


class Known:
    """Compounds that are no discoveries, found by the amounts of a template."""

    def __init__(self, compounds: Iterable[Compound]) -> None:
        found: dict[tuple[int, ...], set[Compound]] = {}
        for compound in compounds:
            found.setdefault(tuple(sorted(n for _, n in compound)), set()).add(compound)
        self._of_amounts: Mapping[tuple[int, ...], set[Compound]] = found

    def assignments(self, template: Template) -> Array:
        """(n, k) of all that make a known compound."""
        amounts = template.amounts
        orders = set(permutations(range(len(amounts))))
        found = [
            [compound[i][0] for i in order]
            for compound in map(sorted, self._of_amounts.get(tuple(sorted(amounts)), ()))
            for order in orders
            if tuple(compound[i][1] for i in order) == amounts
        ]
        return np.array(found, dtype=np.int64).reshape(-1, len(amounts))


def without(scores: Array, assignments: Array) -> Array:
    """The scores, -inf for these assignments (n, k)."""
    left = scores.copy()
    left[tuple(assignments.T)] = -np.inf
    return left


def rank_of(scores: Array, elements: Iterable[int]) -> int:
    """1 for the best assignment. Others of the same score stand before it."""
    score = scores[tuple(elements)]
    return (
        int((scores >= score).sum()) if np.isfinite(score) else int(np.isfinite(scores).sum()) + 1
    )


def best(scores: Array, count: int) -> list[tuple[tuple[int, ...], float]]:
    """The first `count` assignments with their scores; fewer if there are fewer."""
    flat = scores.reshape(-1)
    count = min(count, int(np.isfinite(flat).sum()))
    if count == 0:
        return []
    chosen = np.argpartition(-flat, count - 1)[:count]
    chosen = chosen[np.lexsort((chosen, -flat[chosen]))]
    places = np.stack(np.unravel_index(chosen, scores.shape), axis=1)
    return [
        (tuple(place), float(score))
        for place, score in zip(places.tolist(), flat[chosen], strict=True)
    ]
