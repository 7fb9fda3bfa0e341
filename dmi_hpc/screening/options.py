"""What is screened, and what is kept of it: a TOML file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from dmi_hpc.config import Config, parse
from dmi_hpc.data.elements import ELEMENTS
from dmi_hpc.errors import DataError

Precision = Literal["fp32", "tf32", "bf16"]


class Compositions(Config):
    """[compositions]: whole numbers of atoms of different elements, each composition once."""

    elements: tuple[str, ...] = Field(ELEMENTS, min_length=2, description="default: all 86")
    required: tuple[str, ...] = Field((), description="elements that every composition has")
    components: tuple[Annotated[int, Field(ge=2, le=5)], ...] = Field(
        (2, 3), min_length=1, description="numbers of different elements"
    )
    max_atoms: int = Field(10, ge=2, le=60, description="atoms of the reduced formula, at most")
    charge_neutral: bool = Field(
        False, description="only what common oxidation states can balance, one state an element"
    )

    @field_validator("elements", "required")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in ELEMENTS]:
            raise ValueError(f"found {', '.join(unknown)}; expected some of {' '.join(ELEMENTS)}")
        if len(set(names)) < len(names):
            raise ValueError(f"found an element twice: {', '.join(names)}")
        return names

    @model_validator(mode="after")
    def _possible(self) -> Compositions:
        if len(set(self.components)) < len(self.components):
            raise ValueError(f"components: found a number twice in {list(self.components)}")
        if missing := set(self.required) - set(self.elements):
            raise ValueError(f"required: {', '.join(sorted(missing))} is not one of the elements")
        most, fewest = max(self.components), min(self.components)
        if most > len(self.elements) or fewest < len(self.required) or most > self.max_atoms:
            raise ValueError(
                f"components {list(self.components)}: impossible of {len(self.elements)} elements, "
                f"{len(self.required)} of them required, and at most {self.max_atoms} atoms"
            )
        return self


class Candidates(Config):
    """[candidates]: which compositions are kept, and what they are compared with."""

    known: Annotated[Path, AfterValidator(Path.resolve)] | None = Field(
        None, description="shard set of compositions, or CSV; default: the elements alone"
    )
    formula: str = Field("formula", description="column of a CSV of known compounds")
    value: str = Field("target", description="column of their formation energies, eV/atom")
    within: float = Field(0.1, description="highest energy above the known hull, eV/atom")
    per_system: int | None = Field(None, ge=1, description="the best ones of a chemical system")
    most: int = Field(100_000, ge=1, description="the best ones of all")
    new: bool = Field(True, description="without the compositions that are known")
    table: Literal["csv", "parquet", "h5"] = "csv"


class Screening(Config):
    """A screening file. `dmi predict` needs [compositions] only, `dmi screen` all of it."""

    compositions: Compositions = Compositions()
    candidates: Candidates = Candidates()
    precision: Precision = Field("fp32", description="of the network")
    processes: int | Literal["auto"] = Field("auto", description="that compute hulls")


def read_screening(path: Path) -> Screening:
    """Read and check a screening file. Raises DataError, or RecipeError naming the key."""
    try:
        raw: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable screening file: {error}") from None
    return parse(Screening, raw, where=str(path))
