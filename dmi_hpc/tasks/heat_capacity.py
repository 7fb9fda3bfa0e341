"""Heat capacity from composition and temperature: Wang et al., Chem. Mater. 32 (2020) 4954.

Input: the temperature, and statistics of the properties of a compound's elements. Data: a user's CSV of
formulas, temperatures and values, imported by ``dmi data import``; the properties come from another.
Baselines: extra trees, a random forest and ridge regression on the same features and split.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import numpy as np
from pydantic import AfterValidator, Field

from dmi_hpc.config import Config
from dmi_hpc.data.composition import read_formulas
from dmi_hpc.data.descriptors import ElementTable, Missing, Statistic, descriptors, read_elements
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.errors import DataError
from dmi_hpc.models.layers import Activation, Dense, Dropout, Layer, UnitLength
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

# of the paper's review, with the temperature: 1 + 7 x 44 properties of Oliynyk
PUBLISHED: tuple[Statistic, ...] = ("avg", "dev", "range", "max", "min", "mode", "sum")
SHIFT_K = 100.0  # there are values at 0 K
# capacity grows as the atoms, and levels off with the temperature
EXTENDED: tuple[Callable[[Fields], Array], ...] = (
    lambda fields: np.asarray(np.log(fields["atoms"])),
    lambda fields: np.asarray(np.log(fields["T"] + SHIFT_K)),
    lambda fields: np.asarray(1 / (fields["T"] + SHIFT_K)),
    lambda fields: np.asarray(fields["T"] / (fields["T"] + 3 * SHIFT_K)),
)


class HeatCapacityOptions(Config):
    """[task] of a heat-capacity recipe."""

    # absolute from the start: a run predicts from any folder
    properties: Annotated[Path, AfterValidator(Path.resolve)] = Field(
        description="CSV of element properties: a column `element`, the others numbers"
    )
    checksum: str | None = Field(
        None, description="xxh3 that the CSV must have; a training keeps it with its weights"
    )
    missing: Missing = Field(
        "error", description="a property that an element lacks: median over the other elements"
    )
    statistics: tuple[Statistic, ...] = Field(PUBLISHED, min_length=1)
    extended: bool = Field(
        False, description="also the logarithm of the atoms, and functions of T that level off"
    )
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (64, 32), description="units of the published network's layers; its notebook: 16"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="of the published network")
    trees: int = Field(100, ge=1, description="of the baselines that have trees")


class HeatCapacity(Task):
    Options = HeatCapacityOptions
    quantity = Quantity("heat_capacity", "J/(mol K)", "log")
    input_fields: ClassVar[tuple[str, ...]] = ("fractions", "atoms", "T")
    target_field = "value"
    label_field = "formula"

    def __init__(self, name: str, options: Config) -> None:
        super().__init__(name, options)
        self.o = cast(HeatCapacityOptions, options)

    def recipe_options(self) -> dict[str, Any]:
        return {**super().recipe_options(), "checksum": self.elements.checksum}

    @cached_property
    def elements(self) -> ElementTable:
        """The user's table. Raises DataError if it is gone, or not the one of the training."""
        table = read_elements(self.o.properties)
        if self.o.checksum not in (None, table.checksum):
            raise DataError(
                f"{self.o.properties}: xxh3 {table.checksum}, but the network was trained with a table "
                f"of {self.o.checksum}. Put that table back, or train again"
            )
        return table.filled() if self.o.missing == "median" else table

    @property
    def input_shape(self) -> tuple[int, ...]:
        own = 1 + len(EXTENDED) * self.o.extended
        return (own + len(self.o.statistics) * len(self.elements.properties),)

    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        raise DataError(
            f"{target}: no data here, and heat capacities cannot be computed. Import a CSV of formulas, "
            f"temperatures and values first: dmi data import FILE.csv --out {target} --value Cp "
            '--unit "J/(mol K)" --field T=float64:K'
        )

    def inputs(self, fields: Fields) -> Array:
        """(n, 1 + statistics x properties) float32: T in K, all properties by each statistic.

        `extended`: what EXTENDED says stands between them.
        """
        made = descriptors(self.elements, fields["fractions"], fields["atoms"], self.o.statistics)
        own = [np.asarray(fields["T"])]
        if self.o.extended:
            own += [of(fields) for of in EXTENDED]
        return np.column_stack([*own, made]).astype(np.float32)

    def published_network(self) -> NetworkSpec:
        """Features standardised, rows of unit length; dense, dropout, leaky ReLU (DenseNet)."""
        layers: list[Layer] = [UnitLength()]
        for units in self.o.hidden:
            layers.append(Dense(units=units))
            if self.o.dropout:
                layers.append(Dropout(rate=self.o.dropout))
            layers.append(Activation(function="leaky_relu"))
        return NetworkSpec(input_shape=self.input_shape, layers=tuple(layers), standardize=True)

    def space(self) -> SearchSpace:
        return SearchSpace(
            network=NetworkSpace(
                input_shape=self.input_shape,
                dense_blocks=(1, 5),
                units=(16, 32, 64, 128, 256, 512),
                norms=(None, "batch"),
                activations=("relu", "leaky_relu", "elu", "gelu", "silu"),
                dropouts=(0.0, 0.05, 0.1, 0.2, 0.3, 0.5),
                dense_skips=(None, "residual", "dense"),
                standardize=True,
            ),
            hyper={
                "learning_rate": FloatRange(low=3e-4, high=2e-2, log=True),
                "weight_decay": FloatRange(low=1e-6, high=1.0, log=True),
                "batch_size": Choice(values=(32, 64, 128, 256), ordered=True),
                "optimizer": Choice(values=("adam", "adamw")),
                "loss": Choice(values=("mae", "huber", "mse")),
            },
            founders=(Founder(name="DenseNet", network=self._without_unit_length()),),
        )

    def _without_unit_length(self) -> NetworkSpec:
        network = self.published_network()
        layers = tuple(layer for layer in network.layers if not isinstance(layer, UnitLength))
        return network.model_copy(update={"layers": layers})

    def baselines(self) -> tuple[Baseline, ...]:
        def regression(kind: str) -> Callable[[Fields, Array, Fields], Array]:
            def predict(train: Fields, target: Array, test: Fields) -> Array:
                compositions = np.unique(train["fractions"], axis=0, return_inverse=True)[1]
                model = _fitted(kind, self.o.trees, self.inputs(train), target, compositions)
                return np.asarray(model.predict(self.inputs(test)))

            return predict

        return (
            Baseline("extra_trees", "Extra trees on the same features", regression("extra_trees")),
            Baseline("forest", "Random forest on the same features", regression("forest")),
            Baseline("ridge", "Ridge regression on the same features", regression("ridge")),
        )

    def published(self) -> tuple[Published, ...]:
        source = "Wang et al., Chem. Mater. 32 (2020) 4954; their validation part"
        return (
            Published("DenseNet 64-32 (R2 0.910)", 13.62, None, source),
            Published("Extra trees (R2 0.909)", 13.65, None, source),
        )

    def read_inputs(self, path: Path) -> tuple[list[str], dict[str, Array]]:
        """A CSV with columns `formula` and `T` (K)."""
        formulas, fields = read_formulas(path, ("T",))
        labels = [f"{f}, {t:g} K" for f, t in zip(formulas, fields["T"], strict=True)]
        return labels, fields


def _fitted(
    kind: str, trees: int, features: Array, target: Array, compositions: Array
) -> BaseEstimator:
    """A regression of (n, f) features. compositions: (n,), the number of each row's."""
    from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if kind == "ridge":
        # how strong: by compositions that are left out, as the rows of one resemble each other
        penalties = {"ridge__alpha": np.logspace(0, 4, 9)}
        folds = GroupKFold(min(5, int(compositions.max()) + 1))
        search = GridSearchCV(make_pipeline(StandardScaler(), Ridge()), penalties, cv=folds)
        return search.fit(features, target, groups=compositions)
    made = {"extra_trees": ExtraTreesRegressor, "forest": RandomForestRegressor}[kind]
    return made(trees, n_jobs=-1, random_state=0).fit(features, target)
