"""ElemNet (Jha et al. 2018): a property of a compound from its composition alone.

Input: the fractions of 86 elements. Data: a user's CSV of formulas and values, imported by
``dmi data import``. Baseline: a random forest on the same fractions and split.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import pandas
from pydantic import Field as Option
from pydantic import model_validator

from dmi_hpc.config import Config
from dmi_hpc.data.composition import ELEMENTS, element_fractions
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.errors import DataError
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import Activation, Dense, Dropout, Layer, NetworkSpec
from dmi_hpc.tasks.base import (
    Array,
    Baseline,
    BuildContext,
    Fields,
    Published,
    Quantity,
    Task,
)

# (units, how many, dropout after the group): Jha et al., Sci. Rep. 8 (2018) 17593; the paper's
# repository writes keep rates .8 .9 .7 .8, these are the dropped shares
GROUPS = ((1024, 4, 0.2), (512, 3, 0.1), (256, 3, 0.3), (128, 3, 0.2), (64, 2, 0.0), (32, 1, 0.0))


class ElemNetOptions(Config):
    """[task] of a composition recipe."""

    dropout: bool = Option(True, description="the published dropout; it slows short trainings")
    train_range: tuple[float, float] | None = Option(
        None, description="training rows outside are left out; evaluation keeps all"
    )
    forest_trees: int = Option(100, ge=1, description="of the random-forest baseline")
    quantity: str = "formation_enthalpy"
    unit: str = "eV/atom"

    @model_validator(mode="after")
    def _ordered(self) -> ElemNetOptions:
        if self.train_range is not None and not self.train_range[0] < self.train_range[1]:
            raise ValueError(f"train_range: expected [low, high], found {list(self.train_range)}")
        return self


class ElemNet(Task):
    Options = ElemNetOptions
    input_fields: ClassVar[tuple[str, ...]] = ("fractions",)
    target_field = "value"
    label_field = "formula"

    def __init__(self, name: str, options: Config) -> None:
        super().__init__(name, options)
        self.o = cast(ElemNetOptions, options)
        self.quantity = Quantity(self.o.quantity, self.o.unit)  # type: ignore[misc]

    @property
    def input_shape(self) -> tuple[int, ...]:
        return (len(ELEMENTS),)

    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        raise DataError(
            f"{target}: no data here, and compositions cannot be computed. Import a CSV of formulas "
            f"and values first: dmi data import FILE.csv --out {target}"
        )

    def inputs(self, fields: Fields) -> Array:
        """(n, 86) float32: share of atoms of each element, in the order of `dmi_hpc.data.elements`."""
        return np.asarray(fields["fractions"], dtype=np.float32)

    def in_training(self, target: Array) -> Array:
        if self.o.train_range is None:
            return super().in_training(target)
        low, high = self.o.train_range
        return np.asarray((target >= low) & (target <= high))

    def published_network(self) -> NetworkSpec:
        """17 dense layers of ReLU, 4.63 M parameters."""
        layers: list[Layer] = []
        for units, count, rate in GROUPS:
            for _ in range(count):
                layers += [Dense(units=units), Activation()]
            if rate and self.o.dropout:
                layers.append(Dropout(rate=rate))
        return NetworkSpec(input_shape=self.input_shape, layers=tuple(layers))

    def space(self) -> SearchSpace:
        return SearchSpace(
            network=NetworkSpace(
                input_shape=self.input_shape,
                dense_blocks=(3, 20),
                units=(32, 64, 128, 256, 512, 1024),
                norms=(None, "batch"),
                dropouts=(0.0, 0.05, 0.1, 0.2, 0.3),
            ),
            hyper={
                "learning_rate": FloatRange(low=1e-4, high=1e-2, log=True),
                "weight_decay": FloatRange(low=1e-7, high=1e-1, log=True),
                "batch_size": Choice(values=(64, 128, 256, 512), ordered=True),
                "optimizer": Choice(values=("adam", "adamw")),
                "loss": Choice(values=("mae", "huber", "mse")),
            },
            founders=(Founder(name="ElemNet", network=self.published_network()),),
        )

    def baselines(self) -> tuple[Baseline, ...]:
        def forest(train: Fields, target: Array, test: Fields) -> Array:
            from sklearn.ensemble import RandomForestRegressor

            model = RandomForestRegressor(self.o.forest_trees, n_jobs=-1, random_state=0)
            model.fit(train["fractions"], target)
            return np.asarray(model.predict(test["fractions"]))

        return (Baseline("forest", "Random forest on element fractions", forest),)

    def published(self) -> tuple[Published, ...]:
        if self.o.quantity != "formation_enthalpy":
            return ()
        source = "Jha et al., Sci. Rep. 8 (2018) 17593; about 276,000 OQMD compounds"
        return (
            Published("ElemNet", 0.055, None, source),
            Published("Random forest on element fractions", 0.157, None, source),
        )

    def read_inputs(self, path: Path) -> tuple[list[str], dict[str, Array]]:
        """A CSV with a column `formula`."""
        try:
            # NaN is sodium nitride; empty lines count in the numbers of the lines
            table = pandas.read_csv(path, dtype=str, na_filter=False, skip_blank_lines=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: not a readable CSV: {error}") from None
        if "formula" not in table.columns:
            raise DataError(
                f"{path}: expected a column 'formula', found {', '.join(map(str, table.columns))}"
            )
        empty = (table == "").all(axis=1)
        labels, rows = [], []
        for line, text in zip(table.index[~empty] + 2, table["formula"][~empty], strict=True):
            try:
                rows.append(element_fractions(text))
            except DataError as error:
                raise DataError(f"{path}, line {line}: {text!r}: {error}") from None
            labels.append(text)
        if not rows:
            raise DataError(f"{path}: no formulas in it")
        return labels, {"fractions": np.stack(rows)}
