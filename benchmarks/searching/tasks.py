"""Tasks of the project with small networks, that real searches are measured on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmi_hpc.config import Recipe, parse
from dmi_hpc.data.build import Alone
from dmi_hpc.models.space import SearchSpace
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import BuildContext

SMALL_VOLUMES = {
    "conv_blocks": (1, 4),
    "filters": (4, 8, 12, 16, 24),
    "kernels": (1, 3),
    "dense_blocks": (0, 2),
    "units": (8, 16, 32, 64),
}
SMALL_VECTORS = {"dense_blocks": (1, 5), "units": (16, 32, 64, 128, 256)}
VALIDATION = 0.25


@dataclass(frozen=True)
class Case:
    """A task with its trials. epochs: of one; test: share of rows; table: of a CSV (file, formula,
    value), else the solver's data."""

    name: str
    task: Mapping[str, Any]
    epochs: int
    network: Mapping[str, Any]
    test: float
    table: tuple[str, str, str] | None = None

    def recipe(self, seed: int, **search: Any) -> Recipe:
        """search: further keys of [search]."""
        raw = {
            "name": self.name,
            "seed": seed,
            "task": dict(self.task),
            "data": {"validation": VALIDATION, "test": self.test},
            "train": {"schedule": "one_cycle", "clip_norm": 1.0, "loader_threads": 0},
            "search": {"epochs": self.epochs, **search},
        }
        return parse(Recipe, raw, where=self.name)

    def space(self) -> SearchSpace:
        """The task's, with small networks and without founders."""
        space = make_task(self.task).space()
        network = space.network.model_copy(update=self.network)
        return space.model_copy(update={"network": network, "founders": ()})

    def build(self, folder: Path) -> None:
        """Make the data set."""
        if self.table is None:
            context = BuildContext(self.recipe(0).data, 0, Alone(), 1, lambda rows: None)
            make_task(self.task).build_data(folder, context)
            return
        file, formula, value = self.table
        split = ("--validation", str(VALIDATION), "--test", str(self.test), "--duplicates", "mean")
        names = ("--formula", formula, "--value", value)
        dmi = (sys.executable, "-m", "dmi_hpc", "data", "import")
        subprocess.run([*dmi, file, "--out", str(folder), *names, *split], check=True)


def stiffness(contrast: float, *, samples: int, epochs: int, test: float) -> Case:
    """Effective stiffness of two-phase volumes."""
    task = {"name": "homogenization", "voxels": 9, "contrast": contrast, "samples": samples}
    return Case(f"stiffness, contrast {contrast:g}", task, epochs, SMALL_VOLUMES, test)


def composition(text: str, *, epochs: int, test: float) -> Case:
    """A property of compounds; text: FILE:FORMULA:VALUE, columns of a CSV."""
    file, formula, value = text.rsplit(":", 2)
    task = {"name": "elemnet", "dropout": False, "quantity": value, "unit": "as in the file"}
    name = f"composition {Path(file).name.split('.')[0]}"
    return Case(name, task, epochs, SMALL_VECTORS, test, (file, formula, value))
