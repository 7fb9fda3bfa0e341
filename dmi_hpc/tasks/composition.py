"""What tasks on compositions share: imported fractions of elements, and forests to beat."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import pandas
from pydantic import Field as Option
from pydantic import model_validator

from dmi_hpc.config import Config
from dmi_hpc.data.composition import element_fractions
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.errors import DataError
from dmi_hpc.tasks.base import Array, Baseline, BuildContext, Fields, Quantity, Task


class CompositionOptions(Config):
    """[task] of a composition recipe."""

    train_range: tuple[float, float] | None = Option(
        None, description="training rows outside are left out; evaluation keeps all"
    )
    forest_trees: int = Option(100, ge=1, description="of the random-forest baseline")
    quantity: str = "formation_enthalpy"
    unit: str = "eV/atom"

    @model_validator(mode="after")
    def _ordered(self) -> CompositionOptions:
        if self.train_range is not None and not self.train_range[0] < self.train_range[1]:
            raise ValueError(f"train_range: expected [low, high], found {list(self.train_range)}")
        return self


class CompositionTask(Task):
    """A property of a compound from its composition alone, from a user's CSV of formulas and values."""

    Options: ClassVar[type[Config]] = CompositionOptions
    input_fields: ClassVar[tuple[str, ...]] = ("fractions",)
    target_field = "value"
    label_field = "formula"

    def __init__(self, name: str, options: Config) -> None:
        super().__init__(name, options)
        given = cast(CompositionOptions, options)
        self._range, self._trees = given.train_range, given.forest_trees
        self.quantity = Quantity(given.quantity, given.unit)  # type: ignore[misc]

    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        raise DataError(
            f"{target}: no data here, and compositions cannot be computed. Import a CSV of formulas "
            f"and values first: dmi data import FILE.csv --out {target}"
        )

    def in_training(self, target: Array) -> Array:
        if self._range is None:
            return super().in_training(target)
        low, high = self._range
        return np.asarray((target >= low) & (target <= high))

    def baselines(self) -> tuple[Baseline, ...]:
        def forest(train: Fields, target: Array, test: Fields) -> Array:
            from sklearn.ensemble import RandomForestRegressor

            model = RandomForestRegressor(self._trees, n_jobs=-1, random_state=0)
            model.fit(train["fractions"], target)
            return np.asarray(model.predict(test["fractions"]))

        return (Baseline("forest", "Random forest on element fractions", forest),)

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
