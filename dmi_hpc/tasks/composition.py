"""What tasks on compositions share: imported fractions of elements, and forests to beat."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
from pydantic import Field as Option
from pydantic import model_validator

from dmi_hpc.config import Config
from dmi_hpc.data.composition import read_formulas
from dmi_hpc.data.descriptors import Statistic, descriptors
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.errors import DataError
from dmi_hpc.tasks.base import Array, Baseline, BuildContext, Fields, Quantity, Task
from dmi_hpc.tasks.forests import Forest

_STATISTICS: tuple[Statistic, ...] = ("avg", "dev", "range", "max", "min", "mode")


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
        on_fractions = Forest(itemgetter("fractions"), self._trees)
        on_descriptors = Forest(_described, self._trees)
        return (
            Baseline("forest", "Random forest on element fractions", on_fractions),
            Baseline(
                "forest_descriptors", "Random forest on composition descriptors", on_descriptors
            ),
        )

    def read_inputs(self, path: Path) -> tuple[list[str], dict[str, Array]]:
        """A CSV with a column `formula`."""
        labels, fields = read_formulas(path)
        return labels, {"fractions": fields["fractions"]}


def _described(fields: Fields) -> Array:
    """Statistics of what pymatgen knows of the elements, and how many there are."""
    from dmi_hpc.data.periodic import periodic_table

    fractions = np.asarray(fields["fractions"])
    found = descriptors(periodic_table(), fractions, np.ones(len(fractions)), _STATISTICS)
    return np.column_stack([found, (fractions > 0).sum(axis=1)])
