"""How an ElemNet sees elements and binary mixtures, layer by layer, beside the published network.

    python benchmarks/elemnet_projections.py runs/elemnet PUBLISHED

PUBLISHED: folder with layer_projection_elem_act, layer_projection_AB-set and layer_projection_AB-set_act
(.csv or .csv.xz) of github.com/NU-CUCIS/ElemNet: two principal components of the 16 hidden layers of
the published network, for 86 elements and 3,486 mixtures AB.

Of each layer, ours and published: |r| of Li Na K Rb Cs in the plane, and the share of their variance
along the best line (1: they lie on it); of the mixtures, whether those that common oxidation states can
balance lie apart from the others: silhouette in the plane of the two components, ROC AUC of a linear
discriminant in that plane (5-fold, on rows that it has not seen) and, of ours alone, on all
activations. How alike ours and the published are: 1 - Procrustes disparity (1: equal but for rotation,
mirroring and scale), and r of the distances between all pairs.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from pymatgen.core import Element
from scipy.spatial import procrustes
from scipy.spatial.distance import pdist
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score, silhouette_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from dmi_hpc import load
from dmi_hpc.data.elements import element_fractions
from dmi_hpc.predict import Model
from dmi_hpc.projection import activations, layers_of, project

Array = np.ndarray[Any, np.dtype[Any]]

ALKALI = ("Li", "Na", "K", "Rb", "Cs")


def read(folder: Path, name: str) -> pandas.DataFrame:
    path = next(
        path for path in (folder / f"{name}.csv", folder / f"{name}.csv.xz") if path.exists()
    )
    return pandas.read_csv(path, na_filter=False)  # NaN is sodium nitride


def published(table: pandas.DataFrame, layer: int) -> Array:
    return table[[f"act_layer_{layer}_0", f"act_layer_{layer}_1"]].to_numpy(dtype=np.float64)


def balanced(formula: str) -> bool:
    """Of a mixture AB: whether common oxidation states of A and B can add up to zero."""
    a, b = (set(Element(e).common_oxidation_states) for e in re.findall("[A-Z][a-z]?", formula))
    return any(-state in b for state in a)


def on_a_line(points: Array, elements: list[str]) -> tuple[float, float]:
    """(|r|, share of the variance along the best line) of the alkali metals in the plane.

    The first is small for a line along an axis, too; the second does not change by rotation.
    """
    alkali = points[[elements.index(e) for e in ALKALI]]
    variances = np.linalg.eigvalsh(np.cov(alkali.T))
    return float(abs(np.corrcoef(alkali.T)[0, 1])), float(variances[1] / variances.sum())


def auc(values: Array, labels: Array) -> float:
    """Of a linear discriminant on rows that it was not fitted to."""
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    found = cross_val_predict(model, values, labels, cv=folds, method="decision_function")
    return float(roc_auc_score(labels, found))


def alike(ours: Array, theirs: Array) -> tuple[float, float]:
    """(1 - Procrustes disparity, r of pair distances)"""
    _, _, disparity = procrustes(theirs, ours)
    return 1 - float(disparity), float(np.corrcoef(pdist(ours), pdist(theirs))[0, 1])


@dataclass(frozen=True)
class Mixtures:
    formulas: list[str]
    labels: Array  # (n,) bool: balanced

    def scores(self, points: Array) -> tuple[float, float]:
        """(silhouette, AUC) in the plane."""
        return float(silhouette_score(points, self.labels)), auc(points, self.labels)


def seen_by(model: Model, formulas: list[str]) -> dict[int, Array]:
    fractions = np.stack([element_fractions(text) for text in formulas])
    layers = range(1, len(layers_of(model.network)) + 1)
    return activations(model, {"fractions": fractions}, layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="trained ElemNet")
    parser.add_argument("published", type=Path, help="folder of the published projections")
    options = parser.parse_args()
    model = load(options.run)
    elements, mixtures = (
        read(options.published, f"layer_projection_{name}") for name in ("elem_act", "AB-set_act")
    )
    symbols, formulas = elements["element"].tolist(), mixtures["pretty_comp"].tolist()
    ab = Mixtures(formulas, np.array([balanced(text) for text in formulas]))
    print(
        f"{len(symbols)} elements; {len(formulas):,} mixtures AB, {ab.labels.sum():,} of which common "
        f"oxidation states can balance; {model.checkpoint}, {dict(model.metrics)}\n"
    )
    of_elements, of_mixtures = seen_by(model, symbols), seen_by(model, formulas)
    print(
        "| layer | alkali r, ours | on a line | r, published | on a line | silhouette, ours "
        "| published | AUC, plane, ours | published | AUC, all units, ours | elements alike "
        "| r of distances | mixtures alike | r of distances |"
    )
    print("|" + "--:|" * 14)
    for layer in of_elements:
        ours, theirs = project(of_elements[layer]).points, published(elements, layer)
        of_ab, theirs_ab = project(of_mixtures[layer]).points, published(mixtures, layer)
        silhouette, plane = ab.scores(of_ab)
        silhouette_theirs, plane_theirs = ab.scores(theirs_ab)
        row = (
            *(*on_a_line(ours, symbols), *on_a_line(theirs, symbols)),
            *(silhouette, silhouette_theirs, plane, plane_theirs),
            auc(of_mixtures[layer], ab.labels),
            *alike(ours, theirs),
            *alike(of_ab, theirs_ab),
        )
        print(f"| {layer} | " + " | ".join(f"{value:.3f}" for value in row) + " |", flush=True)


if __name__ == "__main__":
    main()
