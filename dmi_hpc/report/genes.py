"""Genomes of any search as a table of genes: how diverse they are, and which genes matter.

Nothing here knows what the genes mean: a gene is a path in the genome's JSON, a number or a category.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Numbers = npt.NDArray[np.float64]
ABSENT = "absent"  # the value of a gene that a genome does not have
LOG_SPAN = 50.0  # numbers that span more are compared by their logarithm
MOST_VALUES = 6  # numbers with more of them are grouped
LEAST_GROUP = 3
LEAST_EVALUATIONS = 20  # for a share of a variance


@dataclass(frozen=True)
class Gene:
    """One column: its value in each genome. `numeric` if those present are numbers, of any two."""

    name: str
    values: tuple[Any, ...]

    @cached_property
    def numeric(self) -> bool:
        present = [value for value in self.values if value != ABSENT]
        return len(set(present)) > 1 and all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in present
        )

    @cached_property
    def scaled(self) -> Numbers:
        """(n,) of a numeric gene: 0 to 1 over its range, nan where it is absent."""
        x = np.array([np.nan if value == ABSENT else float(value) for value in self.values])
        low, high = np.nanmin(x), np.nanmax(x)
        if low > 0 and high > LOG_SPAN * low:
            x, low, high = np.log(x), np.log(low), np.log(high)
        return np.asarray((x - low) / (high - low))

    @cached_property
    def codes(self) -> Numbers:
        """(n,) equal numbers for equal values."""
        numbers = {text: i for i, text in enumerate(sorted(set(map(str, self.values))))}
        return np.array([numbers[str(value)] for value in self.values], dtype=np.float64)


def genes(genomes: Sequence[Mapping[str, Any]]) -> list[Gene]:
    """The genes of all genomes, in the order in which they are met first; constant ones left out."""
    flat = [dict(_flat("", genome)) for genome in genomes]
    names = list(dict.fromkeys(name for genome in flat for name in genome))
    columns = [Gene(name, tuple(g.get(name, ABSENT) for g in flat)) for name in names]
    return [gene for gene in columns if len(set(map(str, gene.values))) > 1]


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        # hyper-parameters are known by their own names
        inside = "" if name == "hyper" else name
        return [pair for key in value for pair in _flat(f"{inside} {key}".strip(), value[key])]
    if isinstance(value, list | tuple):
        inner = [pair for i, item in enumerate(value, 1) for pair in _flat(f"{name} {i}", item)]
        return [(f"number of {name}", len(value)), *inner]
    return [(name, value)]


def distances(columns: Sequence[Gene], rows: slice) -> Numbers:
    """(n, n) mean difference of some genomes over all genes: 0 equal, 1 nothing in common.

    A number counts by its share of the range, any other gene as equal or not. J. C. Gower, "A general
    coefficient of similarity and some of its properties", Biometrics 27 (1971) 857.
    """
    parts = []
    for gene in columns:
        if gene.numeric:
            x = gene.scaled[rows]
            lone = np.isnan(x)
            apart = np.abs(np.subtract.outer(x, x))
            apart = np.where(np.isnan(apart), np.logical_xor.outer(lone, lone), apart)
        else:
            codes = gene.codes[rows]
            apart = np.not_equal.outer(codes, codes).astype(np.float64)
        parts.append(apart)
    return np.asarray(np.mean(parts, axis=0))


@dataclass(frozen=True)
class Importance:
    """share: of the variance of the fitness ranks, 0 to 1; best: the values of the lowest ranks."""

    name: str
    share: float
    best: str


def importance(columns: Sequence[Gene], fitness: Sequence[float]) -> list[Importance]:
    """How much of the fitness each gene alone explains, the most important first.

    The share of the variance of the ranks that lies between groups of equal values (numbers with many
    of them: fifths), among genomes that have the gene, corrected for what chance would explain
    (epsilon squared). T. L. Kelley, "An unbiased correlation ratio measure", PNAS 21 (1935) 554. Not
    a cause: a search tries good values together.
    """
    ranks = rankdata(fitness) / len(fitness)
    found = [entry for gene in columns if (entry := _importance(gene, ranks)) is not None]
    return sorted(found, key=lambda entry: -entry.share)


def _importance(gene: Gene, ranks: Numbers) -> Importance | None:
    labels = np.array(_groups(gene))
    members = {label: ranks[labels == label] for label in dict.fromkeys(labels.tolist())}
    members.pop(ABSENT, None)
    large = {label: group for label, group in members.items() if len(group) >= LEAST_GROUP}
    count, total = sum(map(len, large.values())), len(large)
    if total < 2 or count < LEAST_EVALUATIONS:
        return None
    every = np.concatenate(list(large.values()))
    within = sum(float(((group - group.mean()) ** 2).sum()) for group in large.values())
    spread = float(((every - every.mean()) ** 2).sum())
    if spread == 0:
        return None
    share = 1 - (within / (count - total)) / (spread / (count - 1))
    best = min(large, key=lambda label: float(large[label].mean()))
    return Importance(gene.name, max(0.0, share), best)


def _groups(gene: Gene) -> list[str]:
    """A label for each genome: the value, or the range of a fifth of the numbers."""
    distinct = set(gene.values) - {ABSENT} if gene.numeric else set()
    if len(distinct) <= MOST_VALUES:
        return [_text(value) for value in gene.values]
    numbers = np.array([np.nan if v == ABSENT else float(v) for v in gene.values])
    edges = np.unique(np.nanquantile(numbers, np.linspace(0, 1, 6)))
    place = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    return [
        ABSENT if np.isnan(number) else f"{edges[i]:.3g} to {edges[i + 1]:.3g}"
        for number, i in zip(numbers, place, strict=True)
    ]


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
