"""Formation energies of oxides from the ions on their sites: Ye et al., Nat. Commun. 9 (2018) 3800.

Input: ionic radius and electronegativity of the ion on each site, and, where two ions share a site, a
binary code of how they are ordered on it. Data: an imported CSV. Baselines: a random
forest and ridge regression on the same columns and split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import numpy as np
import pandas
from pydantic import Field, model_validator

from dmi_hpc.config import Config
from dmi_hpc.data.ions import electronegativity, shannon_radius
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.errors import DataError
from dmi_hpc.models.layers import Activation, Dense, Layer
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.tasks.base import (
    Array,
    Baseline,
    BuildContext,
    Fields,
    Published,
    Quantity,
    Task,
)

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator

System = Literal["garnet", "perovskite"]

# coordination of the ions on each site
COORDINATION: dict[System, dict[str, int]] = {
    "garnet": {"C": 8, "A": 6, "D": 4},
    "perovskite": {"A": 12, "B": 6},
}

# hidden units of the published networks, and their errors, eV/atom
HIDDEN: dict[System, int] = {"garnet": 24, "perovskite": 12}
PUBLISHED: dict[System, tuple[str, float]] = {
    "garnet": ("6-24-1, unmixed garnets (7 to 10 meV/atom)", 0.010),
    "perovskite": ("4-12-1, unmixed perovskites (20 to 34 meV/atom)", 0.034),
}


class OxidesOptions(Config):
    """[task] of a recipe of garnets or perovskites."""

    system: System = "perovskite"
    mixed: str | None = Field(
        None, description="the site that two ions share; they then have an order on it"
    )
    orderings: int = Field(
        0, ge=0, description="of a mixed site: 20, 7, 18 for C, A, D of garnets, 10 for perovskites"
    )
    hidden: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None,
        description="units of the published network's layers; default: 24 garnet, 12 perovskite",
    )
    trees: int = Field(300, ge=1, description="of the random-forest baseline")

    @model_validator(mode="after")
    def _site_and_orderings(self) -> OxidesOptions:
        sites = COORDINATION[self.system]
        if self.mixed is not None and self.mixed not in sites:
            raise ValueError(f"mixed: expected one of {', '.join(sites)}, found {self.mixed!r}")
        if (self.mixed is None) != (self.orderings == 0):
            raise ValueError("mixed and orderings belong together: give both, or none")
        return self

    @property
    def sites(self) -> dict[str, int]:
        """Name -> coordination; a mixed site S is two: S1, S2."""
        return sites_of(self.system, self.mixed)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the numbers that the network reads."""
        of_sites = (f"{kind}_{s}" for s in self.sites for kind in ("radius", "electronegativity"))
        return (*of_sites, *(f"code_{bit}" for bit in range(self.orderings.bit_length())))


def sites_of(system: System, mixed: str | None) -> dict[str, int]:
    """Name -> coordination; a mixed site S is two: S1, S2."""
    found = {}
    for site, coordination in COORDINATION[system].items():
        names = (f"{site}1", f"{site}2") if site == mixed else (site,)
        found.update(dict.fromkeys(names, coordination))
    return found


def smaller_first(ions: Mapping[str, str], system: System, mixed: str | None) -> dict[str, str]:
    """The ions of all sites, the smaller one of a mixed site S on S1. Raises DataError."""
    sites = sites_of(system, mixed)
    found = {site: ions[site] for site in sites}
    if mixed is not None:
        first, second = f"{mixed}1", f"{mixed}2"
        radii = [shannon_radius(found[site], sites[site]) for site in (first, second)]
        if radii[0] > radii[1]:
            found[first], found[second] = found[second], found[first]
    return found


def site_columns(ions: Mapping[str, str], coordinations: Mapping[str, int]) -> dict[str, float]:
    """radius_SITE in angstrom and electronegativity_SITE of an ion on each site. Raises DataError.

    Several ions joined by "|" share a site in equal parts: their mean.
    """
    found: dict[str, float] = {}
    for site, coordination in coordinations.items():
        several = [ion.strip() for ion in ions[site].split("|")]
        radii = [shannon_radius(ion, coordination) for ion in several]
        found[f"radius_{site}"] = float(np.mean(radii))
        found[f"electronegativity_{site}"] = float(np.mean([electronegativity(i) for i in several]))
    return found


def code_columns(ordering: int, orderings: int) -> dict[str, int]:
    """code_0 (the highest bit), code_1, ... of an ordering's number, from 0."""
    bits = orderings.bit_length()
    return {f"code_{bit}": ordering >> (bits - 1 - bit) & 1 for bit in range(bits)}


class Oxides(Task):
    Options = OxidesOptions
    quantity = Quantity("formation_energy", "eV/atom")
    target_field = "formation_energy"
    label_field = "compound"

    def __init__(self, name: str, options: Config) -> None:
        super().__init__(name, options)
        self.o = cast(OxidesOptions, options)
        self.input_fields = self.o.columns  # type: ignore[misc]
        # the energy of a compound is that of its lowest ordering
        self.group_field = "compound" if self.o.orderings else None  # type: ignore[misc]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (len(self.o.columns),)

    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        raise DataError(
            f"{target}: no data here, and formation energies cannot be computed. Make a table of them "
            "by recipes/prepare/oxides.py, and import it first: dmi data import FILE.csv --as table "
            f"--out {target}"
        )

    def inputs(self, fields: Fields) -> Array:
        """(n, columns) float32: radius (angstrom) and electronegativity of each site, then the code."""
        return np.column_stack([fields[name] for name in self.o.columns]).astype(np.float32)

    def published_network(self) -> NetworkSpec:
        """Columns standardised; one hidden layer of ReLU."""
        layers: list[Layer] = []
        for units in self.o.hidden or (HIDDEN[self.o.system],):
            layers += [Dense(units=units), Activation()]
        return NetworkSpec(input_shape=self.input_shape, layers=tuple(layers), standardize=True)

    def space(self) -> SearchSpace:
        return SearchSpace(
            network=NetworkSpace(
                input_shape=self.input_shape,
                dense_blocks=(1, 4),
                units=(8, 12, 16, 24, 32, 64, 128),
                norms=(None, "batch"),
                activations=("relu", "leaky_relu", "elu", "gelu", "silu"),
                dropouts=(0.0, 0.05, 0.1, 0.2),
                dense_skips=(None, "residual", "dense"),
                standardize=True,
            ),
            hyper={
                "learning_rate": FloatRange(low=1e-3, high=1e-1, log=True),
                "weight_decay": FloatRange(low=1e-6, high=1.0, log=True),
                "batch_size": Choice(values=(8, 16, 32, 64), ordered=True),
                "loss": Choice(values=("mse", "huber", "mae")),
            },
            founders=(Founder(name="Ye 2018", network=self.published_network()),),
        )

    def baselines(self) -> tuple[Baseline, ...]:
        def regression(kind: str) -> Callable[[Fields, Array, Fields], Array]:
            def predict(train: Fields, target: Array, test: Fields) -> Array:
                model = _fitted(kind, self.o.trees, self.inputs(train), target)
                return np.asarray(model.predict(self.inputs(test)))

            return predict

        return (
            Baseline("forest", "Random forest on the same columns", regression("forest")),
            Baseline("ridge", "Ridge regression on the same columns", regression("ridge")),
        )

    def published(self) -> tuple[Published, ...]:
        if self.o.mixed is not None:
            return ()
        label, mae = PUBLISHED[self.o.system]
        source = "Ye et al., Nat. Commun. 9 (2018) 3800; other compounds than these"
        return (Published(label, mae, None, source),)

    def read_inputs(self, path: Path) -> tuple[list[str], dict[str, Array]]:
        """A CSV with an ion on each site: A,B with Ca2+,Ti4+; all orderings of a mixed site."""
        try:
            table = pandas.read_csv(path, dtype=str, na_filter=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable CSV: {error}") from None
        if missing := [site for site in self.o.sites if site not in table.columns]:
            raise DataError(
                f"{path}: expected columns {', '.join(self.o.sites)}, found "
                f"{', '.join(map(str, table.columns))}: {missing[0]} is missing"
            )
        labels: list[str] = []
        rows: list[dict[str, float]] = []
        for line, cells in enumerate(table[list(self.o.sites)].to_numpy(), start=2):
            ions = dict(zip(self.o.sites, map(str, cells), strict=True))
            try:
                placed = smaller_first(ions, self.o.system, self.o.mixed)
                columns = site_columns(placed, self.o.sites)
            except DataError as error:
                raise DataError(f"{path}, line {line}: {error}") from None
            for ordering in range(max(1, self.o.orderings)):
                labels.append(" ".join(f"{site}={ion}" for site, ion in ions.items()))
                rows.append({**columns, **code_columns(ordering, self.o.orderings)})
        if not rows:
            raise DataError(f"{path}: no compounds in it")
        return labels, {name: np.array([row[name] for row in rows]) for name in self.o.columns}


def _fitted(kind: str, trees: int, features: Array, target: Array) -> BaseEstimator:
    """A regression of (n, f) features."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind == "ridge":
        model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 3, 13)))
    else:
        model = RandomForestRegressor(trees, n_jobs=-1, random_state=0)
    return model.fit(features, target)
