"""Candidates of one chemical system: its elements in all structure types that the training has seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
from scipy.special import logsumexp

from dmi_hpc.substitution.held_out import SiteTable
from dmi_hpc.substitution.templates import Compound, assignment_scores

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Candidate:
    """A compound in a structure type. share: log of the probability of the assignment among all of
    its template; rank: its place among them."""

    compound: Compound
    type: str
    template: str  # the structure whose sites were substituted
    share: float
    rank: int


def candidates(
    table: SiteTable, probabilities: Array, elements: Array, wanted: tuple[int, ...]
) -> list[Candidate]:
    """One for each compound and type, the best of its templates; the most probable first.

    table, probabilities: sites of the templates; elements: (E,) classes that may be assigned;
    wanted: the classes of the system, all of which a candidate has.
    """
    places = np.searchsorted(elements, wanted).tolist()
    best: dict[tuple[Compound, str], Candidate] = {}
    for found in _all(table, probabilities[:, elements], places, elements):
        key = (found.compound, found.type)
        if key not in best or found.share > best[key].share:
            best[key] = found
    return sorted(best.values(), key=lambda c: (-c.share, c.type, c.template))


def _all(
    table: SiteTable, probabilities: Array, places: list[int], elements: Array
) -> Iterator[Candidate]:
    for rows, template, _ in table.structures():
        if len(template.amounts) != len(places):
            continue
        scores = assignment_scores(template, probabilities[rows])
        total = logsumexp(scores)
        type_ = bytes(table.template[rows[0]]).decode()
        for assignment in permutations(places):
            score = scores[assignment]
            yield Candidate(
                template.compound(elements[list(assignment)].tolist()),
                type_,
                template.name,
                share=float(score - total),
                rank=int((scores >= score).sum()),
            )
