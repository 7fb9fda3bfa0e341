"""What the tasks on molecules share: their options, forests on fingerprints, files to predict."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from typing import ClassVar, Literal, cast

from pydantic import Field as Option

from dmi_hpc.config import Config
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.errors import DataError
from dmi_hpc.tasks.base import Array, Baseline, BuildContext, Quantity, Task
from dmi_hpc.tasks.forests import Forest

Fingerprint = Literal["maccs", "morgan"]
_NAMES: dict[Fingerprint, str] = {"maccs": "MACCS keys", "morgan": "Morgan bits"}


class MoleculeOptions(Config):
    """[task] of any recipe on molecules."""

    target: str = Option("value", description="field that is predicted")
    quantity: str = Option("value", description="what it is")
    unit: str = ""
    classification: bool = Option(
        False, description="the target is 0 or 1, predicted as a probability"
    )
    forest_trees: int = Option(200, ge=1, description="of the random-forest baselines")


class MoleculeTask(Task):
    """Data imported by ``dmi data import --as molecule``; baselines: forests on fingerprints."""

    Options = MoleculeOptions
    input_fields: ClassVar[tuple[str, ...]] = ("maccs", "morgan")
    label_field = "smiles"

    def __init__(self, name: str, options: Config) -> None:
        super().__init__(name, options)
        o = cast(MoleculeOptions, options)
        self._trees = o.forest_trees
        transform: Literal["logit", "identity"] = "logit" if o.classification else "identity"
        self.target_field = o.target  # type: ignore[misc]
        self.quantity = Quantity(o.quantity, o.unit, transform)  # type: ignore[misc]

    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        raise DataError(
            f"{target}: no data here, and properties of molecules cannot be computed. Import a table "
            f"of SMILES and values first: dmi data import FILE.csv --as molecule --out {target}"
        )

    def baselines(self) -> tuple[Baseline, ...]:
        return tuple(
            Baseline(f"forest_{name}", f"Random forest on {_NAMES[name]}", self._forest(name))
            for name in _NAMES
        )

    def _forest(self, fingerprint: Fingerprint) -> Forest:
        classes = self.quantity.transform == "logit"
        return Forest(itemgetter(fingerprint), self._trees, classes=classes, share=1 / 3)

    def read_inputs(self, path: Path) -> tuple[list[str], dict[str, Array]]:
        """A CSV or TSV with a column `smiles`."""
        from dmi_hpc.data.importing.molecules import read_molecules

        labels, fields = read_molecules(path)
        return labels, {name: cast(Array, fields[name]) for name in self.input_fields}
