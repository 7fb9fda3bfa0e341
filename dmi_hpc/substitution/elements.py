"""What a classifier of sites has learnt about the elements, judged by the periodic table.

Groups are those of IUPAC, 1 to 18; lanthanides and actinides count as group 3.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Confusion:
    """Errors among elements of one group, and of one row of the table: shares of all errors, and what
    the shares would be if each wrong site got one of the wrongly given elements at random."""

    errors: int
    group: float
    group_chance: float
    row: float
    row_chance: float


def table_places(symbols: tuple[str, ...]) -> tuple[Array, Array]:
    """(n,) group and (n,) row of each element."""
    from pymatgen.core import Element

    found = [Element(symbol) for symbol in symbols]
    return np.array([e.group for e in found]), np.array([e.row for e in found])


def confusion(truth: Array, predicted: Array, group: Array, row: Array) -> Confusion:
    """truth, predicted: (n,) classes; group, row: of each class."""
    wrong = truth != predicted
    t, p = truth[wrong], predicted[wrong]
    given = np.bincount(p, minlength=len(group)) / max(len(p), 1)

    def shares(of: Array) -> tuple[float, float]:
        if not len(t):
            return 0.0, 0.0
        alike = (of[:, None] == of) & ~np.eye(len(of), dtype=bool)
        chance = (alike * given).sum(axis=1)[t] / np.maximum(1 - given[t], 1e-12)
        return float((of[t] == of[p]).mean()), float(chance.mean())

    return Confusion(int(wrong.sum()), *shares(group), *shares(row))


def macro_error(truth: Array, predicted: Array) -> float:
    """Mean over the elements that occur of the share of their sites that are not recognised."""
    found = np.unique(truth)
    return float(np.mean([(predicted[truth == element] != element).mean() for element in found]))


def nearest(weights: Array) -> Array:
    """(n,) which other row of weights (n, f) has the highest cosine with each."""
    unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    return np.asarray(cosine.argmax(axis=1))


def chance_of_neighbours(group: Array) -> float:
    """Share of the pairs of different elements that are of one group."""
    alike = (group[:, None] == group).sum() - len(group)
    return float(alike / (len(group) * (len(group) - 1)))


def projected(weights: Array, seed: int = 0) -> Array:
    """(n, 2): t-SNE by cosine distance, van der Maaten and Hinton 2008."""
    from sklearn.manifold import TSNE

    perplexity = min(10.0, (len(weights) - 1) / 3)
    model = TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=seed)
    return np.asarray(model.fit_transform(np.asarray(weights, dtype=np.float64)))


def drawn(places: Array, symbols: tuple[str, ...], group: Array) -> bytes:
    """PNG of elements at places (n, 2), coloured by group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.scatter(places[:, 0], places[:, 1], c=group, cmap="turbo", s=260, alpha=0.35, linewidths=0)
    for place, symbol in zip(places, symbols, strict=True):
        axes.annotate(symbol, place, ha="center", va="center", fontsize=9)
    axes.set(xticks=[], yticks=[], title="Weights of the elements, t-SNE; colour: group")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()
