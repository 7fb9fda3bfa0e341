"""How well substitution finds compounds that the network has not seen.

A *held-out compound* is a structure of a split that nothing was learnt from; without its elements it is
a template. Its *rank* is the place of the true elements among all assignments of different elements
that occur in the training rows: 1 is best, and others of the same score stand before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmi_hpc.substitution.templates import (
    Known,
    Template,
    assignment_scores,
    best,
    rank_of,
    without,
)

Array = np.ndarray[Any, np.dtype[Any]]
Role = tuple[str, int, int]  # template; sites of the group; atoms of it in the reduced formula
BACK_OFF = 5.0  # sites that the general frequencies count for, beside those of a structure type


@dataclass(frozen=True)
class SiteTable:
    """Sites, those of one structure anywhere among the rows.

    structure, template: (n,) text; element: (n,) class; atoms: (n,) of the cell that a site stands for.
    """

    structure: Array
    template: Array
    element: Array
    atoms: Array

    def structures(self) -> Iterator[tuple[Array, Template, tuple[int, ...]]]:
        """Row numbers, structure without its elements, and the elements of its groups."""
        order = np.argsort(self.structure, kind="stable")
        cuts = np.flatnonzero(self.structure[order][1:] != self.structure[order][:-1]) + 1
        for rows in np.split(order, cuts):
            elements, groups = np.unique(self.element[rows], return_inverse=True)
            name = bytes(self.structure[rows[0]]).decode()
            yield rows, Template(name, groups, self.atoms[rows]), tuple(elements.tolist())


@dataclass(frozen=True)
class HeldOut:
    """One held-out compound and its ranks."""

    structure: str
    elements: tuple[int, ...]  # of the groups
    amounts: tuple[int, ...]
    candidates: int
    seen: bool  # training structures are of its type
    known: bool  # a compound of the training rows: not held out at all
    rank: int
    rank_new: int  # without the candidates that are compounds of the training rows
    by_type: int  # rank by how often the elements occur in structures of this type
    by_frequency: int  # rank by how often the elements occur
    first: tuple[tuple[tuple[int, ...], float], ...]  # the best new candidates with their scores


@dataclass(frozen=True)
class Learnt:
    """What the rows of the training say without a network."""

    elements: Array  # (E,) classes that occur, ascending
    frequency: Array  # (E,) shares of the sites
    of_role: dict[Role, Counter[int]]
    types: frozenset[str]
    known: Known  # compounds, by places in `elements`

    @classmethod
    def of(cls, table: SiteTable) -> Learnt:
        elements, counts = np.unique(table.element, return_counts=True)
        of_role: dict[Role, Counter[int]] = {}
        compounds = set()
        for rows, template, found in table.structures():
            places = np.searchsorted(elements, found).tolist()
            compounds.add(template.compound(places))
            for place, role in zip(places, roles(_type(table, rows), template), strict=True):
                of_role.setdefault(role, Counter())[place] += 1
        types = frozenset(bytes(text).decode() for text in np.unique(table.template))
        return cls(elements, counts / counts.sum(), of_role, types, Known(compounds))

    def by_type(self, type_: str, template: Template) -> Array:
        """(m, E): shares of the elements on such sites in structures of this type."""
        groups = []
        for role in roles(type_, template):
            counts = np.zeros(len(self.elements))
            for place, count in self.of_role.get(role, Counter()).items():
                counts[place] = count
            groups.append((counts + BACK_OFF * self.frequency) / (counts.sum() + BACK_OFF))
        return np.stack(groups)[template.groups]


def roles(type_: str, template: Template) -> list[Role]:
    """Of each group."""
    sites = np.bincount(template.groups).tolist()
    return [(type_, n, amount) for n, amount in zip(sites, template.amounts, strict=True)]


def _type(table: SiteTable, rows: Array) -> str:
    return bytes(table.template[rows[0]]).decode()


def held_out(
    table: SiteTable,
    probabilities: Array,
    learnt: Learnt,
    count: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> Iterator[HeldOut]:
    """Ranks of all structures of `table`; probabilities: (n, 118) of its sites; progress: rows done."""
    for rows, template, elements in table.structures():
        yield _ranked(template, elements, _type(table, rows), probabilities[rows], learnt, count)
        progress(len(rows))


def _ranked(
    template: Template,
    elements: tuple[int, ...],
    type_: str,
    probabilities: Array,
    learnt: Learnt,
    count: int,
) -> HeldOut:
    scores = assignment_scores(template, probabilities[:, learnt.elements])
    others = without(scores, learnt.known.assignments(template))
    general = np.broadcast_to(learnt.frequency, (len(template.groups), len(learnt.elements)))
    by_type = assignment_scores(template, learnt.by_type(type_, template))
    by_frequency = assignment_scores(template, general)
    candidates = int(np.isfinite(scores).sum())
    places = np.searchsorted(learnt.elements, elements).tolist()
    foreign = not set(elements) <= set(learnt.elements.tolist())
    methods = {"rank": scores, "rank_new": others, "by_type": by_type, "by_frequency": by_frequency}
    return HeldOut(
        template.name,
        elements,
        template.amounts,
        candidates,
        seen=type_ in learnt.types,
        known=not foreign and not np.isfinite(others[tuple(places)]),
        first=tuple(
            (tuple(learnt.elements[list(at)].tolist()), score) for at, score in best(others, count)
        ),
        **{
            name: candidates + 1 if foreign else rank_of(each, places)
            for name, each in methods.items()
        },
    )
