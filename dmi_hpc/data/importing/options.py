"""What a user says of an import: kind, fields, splits, what to do with bad records."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic import Field as Option

from dmi_hpc.data.elements import ELEMENTS
from dmi_hpc.data.manifest import SPLIT, Compression, Field
from dmi_hpc.errors import DataError

Kind = Literal["composition", "table", "array", "hdf5", "image", "structure", "molecule"]
ROW = "row number"  # a group of its own: each row is split by itself


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FieldSpec(_Plain):
    """One field that is wanted. What is not said is found in the files."""

    name: str = Option(pattern=r"^[A-Za-z][A-Za-z0-9_]*$", max_length=64)
    source: str | None = Option(None, description="column, array or dataset; default: the name")
    dtype: str | None = None
    unit: str = ""
    description: str = ""
    axis: str | None = Option(None, description="ragged: a name of `axes`")
    refers: str | None = Option(None, description="values number the entries of that axis")
    optional: bool = Option(False, description="structures: NaN is stored where there is no value")

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        if not self.optional:  # provenance of what earlier versions could say stays as it was
            data.pop("optional", None)
        return data

    @model_validator(mode="after")
    def _storable(self) -> FieldSpec:
        dtype = self.dtype or ("float64" if self.optional else "int8")
        Field(name=self.name, dtype=dtype, unit="", description="", optional=self.optional)
        return self

    @property
    def origin(self) -> str:
        return self.source or self.name


class AxisSpec(_Plain):
    """Where the number of entries of each row stands; exactly one of the two."""

    name: str
    lengths: str | None = Option(None, description="dataset: entries of each row")
    offsets: str | None = Option(None, description="dataset: where each row begins, and the end")

    @model_validator(mode="after")
    def _one(self) -> AxisSpec:
        if (self.lengths is None) == (self.offsets is None):
            raise ValueError(f"axis {self.name}: expected either lengths or offsets")
        return self


class ImportOptions(_Plain):
    """How files become a shard set."""

    kind: Kind | Literal["auto"] = "auto"
    format: str | None = Option(None, description="of all files, instead of their suffixes")
    fields: tuple[FieldSpec, ...] = ()
    axes: tuple[AxisSpec, ...] = ()
    bad: Literal["error", "skip"] = Option("error", description="records that cannot be used")
    group: str | None = Option(None, description="column or property: equal values share a split")
    split_column: str | None = Option(None, description="column that names each row's split")
    validation: float = Option(0.1, ge=0, lt=1, description="share of keys")
    test: float = Option(0.1, ge=0, lt=1, description="share of keys")
    seed: int = Option(0, ge=0, lt=2**64)
    rows_per_shard: int | None = Option(None, ge=1, description="default: about 256 MiB a shard")
    compression: Compression | None = None
    shuffle: int | None = Option(
        None, ge=0, description="seed of the order that rows are stored in"
    )
    floats: Literal["float64", "float32"] = Option("float64", description="of numbers in text")
    processes: int | Literal["auto"] = "auto"
    replace: bool = Option(False, description="another data set in the folder")
    # compositions and molecules
    formula: str = Option("formula", description="column of formulas")
    smiles: str = Option("smiles", description="column of SMILES")
    value: str = Option("target", description="column of values")
    quantity: str | None = Option(None, description="what the values are; default: the column")
    unit: str | None = Option(None, description="of the values")
    duplicates: Literal["keep", "error", "mean", "lowest"] = Option(
        "keep", description="lines of one composition; kept ones always share a split"
    )
    hold_out: tuple[str, ...] = Option(
        (), description="chemical systems (Ti-O): all compounds within them are for testing"
    )
    # tables
    delimiter: str = Option(",", min_length=1, max_length=1)
    # images and structures
    labels: Path | None = Option(None, description="CSV: name of a file, then its properties")
    masks: str | None = Option(None, description="folder of masks, or suffix of folders (_annot)")
    # structures
    cutoff: float | None = Option(None, gt=0, le=100, description="of neighbours, angstrom")
    max_neighbours: int | None = Option(None, ge=1, description="nearest ones kept, an atom")

    @model_validator(mode="after")
    def _consistent(self) -> ImportOptions:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation + test is {self.validation + self.test:g}, expected less than 1: the "
                "rest is for training"
            )
        names = [spec.name for spec in self.fields]
        if len(set(names)) < len(names) or SPLIT.name in names:
            raise ValueError(
                f"fields: expected distinct names and none called split, found {names}"
            )
        if isinstance(self.processes, int) and self.processes < 1:
            raise ValueError(f"processes: expected at least 1, found {self.processes}")
        if self.group is not None and self.split_column is not None:
            raise ValueError("a group and a split column cannot both decide the split: give one")
        if self.hold_out and self.split_column is not None:
            raise ValueError("hold_out and a split column cannot both decide the split: give one")
        for system in self.hold_out:
            names = system.split("-")
            if len(names) < 2 or not set(names) <= set(ELEMENTS):
                raise ValueError(f"hold_out: found {system!r}, expected systems such as Na-Fe-O")
        if self.replace and self.shuffle is not None:
            raise ValueError("replace and shuffle exclude each other: delete the old set yourself")
        if self.max_neighbours is not None and self.cutoff is None:
            raise ValueError("max_neighbours needs a cutoff (CGCNN: 8 angstrom, 12 neighbours)")
        return self

    @property
    def group_column(self) -> str | None:
        """The column that decides, unless each row is to be split by itself."""
        return None if self.group == ROW else self.group

    def check_kind(self, kind: Kind) -> None:
        """Raises DataError if something is asked for that this kind of input has not."""
        for names, kinds in _OF_KINDS.items():
            for name in names:
                default = type(self).model_fields[name].default
                if getattr(self, name) != default and kind not in kinds:
                    raise DataError(
                        f"--{name.replace('_', '-')} is for {' and '.join(kinds)} imports; this is "
                        f"one of kind {kind} (choose another with --as)"
                    )
        if kind != "structure" and (spec := next((s for s in self.fields if s.optional), None)):
            raise DataError(
                f"--field {spec.name}: only structures have optional fields, not a {kind}"
            )

    def of_kind(self, kind: Kind) -> dict[str, Any]:
        """What decides the content of the set, for its provenance."""
        no_content = {"kind", "processes", "replace", "bad", "rows_per_shard", "compression"}
        others = {n for names, kinds in _OF_KINDS.items() if kind not in kinds for n in names}
        kept = self.model_dump(mode="json", exclude=no_content | others)
        return {"kind": kind, "bad": self.bad, **kept}


_OF_KINDS: Mapping[tuple[str, ...], tuple[Kind, ...]] = {
    ("formula", "duplicates", "hold_out"): ("composition",),
    ("smiles",): ("molecule",),
    ("value", "quantity", "unit"): ("composition", "molecule"),
    ("delimiter",): ("table", "composition", "molecule"),
    ("labels",): ("image", "structure"),
    ("masks",): ("image",),
    ("cutoff", "max_neighbours"): ("structure",),
    ("axes",): ("array", "hdf5"),
    ("group",): ("molecule", "table", "array", "hdf5", "image", "structure"),
    ("floats",): ("table", "image", "structure"),
}


def field_of_text(text: str) -> FieldSpec:
    """`NAME[=DTYPE[?][:UNIT[:DESCRIPTION]]]`, each part but the name may be empty; ?: optional."""
    name, _, rest = text.partition("=")
    dtype, _, rest = rest.partition(":")
    unit, _, description = rest.partition(":")
    raw = {"dtype": dtype.strip().rstrip("?") or None, "optional": dtype.strip().endswith("?")}
    about = {"unit": unit.strip(), "description": description.strip()}
    return _field({"name": name.strip(), **raw, **about}, where=f"--field {text!r}")


def read_map(path: Path) -> tuple[tuple[FieldSpec, ...], tuple[AxisSpec, ...]]:
    """Fields and axes of a TOML file: tables [fields.NAME] and [axes.NAME]. Raises DataError."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable map: {error}") from None
    unknown = set(raw) - {"fields", "axes"}
    tables = {name: raw.get(name, {}) for name in ("fields", "axes")}
    if unknown or not all(isinstance(table, dict) for table in tables.values()):
        raise DataError(f"{path}: expected tables [fields.NAME] and [axes.NAME], found {list(raw)}")
    for table, entries in tables.items():
        for name, entry in entries.items():
            if not isinstance(entry, dict):
                raise DataError(f"{path}: {table}.{name}: expected a table, found {entry!r}")
    fields = [
        _field({**entry, "name": name}, where=f"{path}: fields.{name}")
        for name, entry in tables["fields"].items()
    ]
    axes = []
    for name, entry in tables["axes"].items():
        try:
            axes.append(AxisSpec(**{**entry, "name": name}))
        except (ValidationError, TypeError) as error:
            raise DataError(f"{path}: axes.{name}: {_first_problem(error)}") from None
    return tuple(fields), tuple(axes)


def _field(raw: dict[str, Any], where: str) -> FieldSpec:
    try:
        return FieldSpec(**raw)
    except (ValidationError, TypeError) as error:
        raise DataError(
            f"{where}: {_first_problem(error)}; expected NAME[=DTYPE[:UNIT[:DESCRIPTION]]], e.g. "
            "energy=float32:eV/atom:formation energy"
        ) from None


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        return f"{place}: {first['msg']}" if place else str(first["msg"])
    return str(error)


def field_name(text: str) -> str:
    """A name that a field may have, from whatever a column is called; "" if nothing is left."""
    name = re.sub(r"[^A-Za-z0-9_]+", "_", text).strip("_")[:60].rstrip("_")
    return f"c_{name}" if name[:1].isdigit() else name
