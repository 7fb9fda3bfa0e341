"""What stands beside structures: numbers and texts of the whole, arrays of the atoms, labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmi_hpc.data.importing.crystals import Crystal
from dmi_hpc.data.importing.options import FieldSpec, ImportOptions, field_name
from dmi_hpc.data.importing.tables import Column
from dmi_hpc.data.importing.values import Problems, from_array, from_texts
from dmi_hpc.data.manifest import SPLIT, Field
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
Row = Mapping[str, str] | None  # a row of the labels


@dataclass(frozen=True)
class Kind:
    """What the values of a property are: how often which type (b, i, f, S, ? for others) and shape."""

    tally: Mapping[tuple[str, tuple[int, ...]], int]
    longest: int = 1  # bytes of text

    @classmethod
    def of(cls, value: Any, *, entries: bool = False) -> Kind:
        if isinstance(value, str):
            return cls({("S", ()): 1}, max(1, len(value.encode())))
        try:
            array = np.asarray(value)
        except ValueError:
            return cls({("?", ()): 1})
        kind = {"u": "i"}.get(array.dtype.kind, array.dtype.kind)
        if kind not in "bif" or (array.size == 0 and not entries):
            return cls({("?", ()): 1})
        return cls({(kind, array.shape[1:] if entries else array.shape): 1})

    def __or__(self, other: Kind) -> Kind:
        tally = dict(self.tally)
        for key, count in other.tally.items():
            tally[key] = tally.get(key, 0) + count
        return Kind(tally, max(self.longest, other.longest))

    @property
    def count(self) -> int:
        return sum(self.tally.values())

    @property
    def common(self) -> tuple[str, tuple[int, ...], int] | None:
        """Type, shape and number of those that most values are of; None if nothing storable."""
        groups: dict[tuple[bool, tuple[int, ...]], dict[str, int]] = {}
        for (kind, shape), count in self.tally.items():
            if kind != "?":
                groups.setdefault((kind == "S", shape), {})[kind] = count
        if not groups:
            return None
        (_, shape), types = max(groups.items(), key=lambda group: sum(group[1].values()))
        return max(types, key="bifS".find), shape, sum(types.values())

    def dtype(self, floats: str) -> str:
        kind = self.common[0] if self.common else "?"
        return {"b": "uint8", "i": "int64", "f": floats}.get(kind, f"S{self.longest}")


@dataclass(frozen=True)
class Found:
    """What some structures have beside their atoms."""

    structures: int
    properties: Mapping[str, Kind]
    arrays: Mapping[str, Kind]

    @classmethod
    def of(cls, crystal: Crystal) -> Found:
        return cls(
            1,
            {name: Kind.of(value) for name, value in crystal.properties.items()},
            {name: Kind.of(value, entries=True) for name, value in crystal.arrays.items()},
        )

    @classmethod
    def merged(cls, found: Iterable[Found]) -> Found:
        structures, properties, arrays = 0, dict[str, Kind](), dict[str, Kind]()
        for some in found:
            structures += some.structures
            for total, more in ((properties, some.properties), (arrays, some.arrays)):
                for name, kind in more.items():
                    total[name] = total[name] | kind if name in total else kind
        return cls(structures, properties, arrays)


@dataclass(frozen=True)
class _Property:
    source: str
    field: Field


class Properties:
    """The fields that come from labels, properties and arrays; picklable."""

    def __init__(self, options: ImportOptions, labels: Sequence[Column]) -> None:
        self.floats = options.floats
        self.labels = tuple(labels)
        wanted = {column.name for column in labels}
        self.specs = tuple(spec for spec in options.fields if spec.name not in wanted)
        self.asked = bool(options.fields)
        self.split = options.split_column
        self.optional = frozenset(spec.name for spec in options.fields if spec.optional)
        self.found = Found(0, {}, {})
        self.chosen: list[_Property] = []
        self.notes: list[str] = []

    @property
    def fields(self) -> list[Field]:
        return [self._of_column(column) for column in self.labels] + [p.field for p in self.chosen]

    def _of_column(self, column: Column) -> Field:
        field = column.field
        if column.name not in self.optional:
            return field
        dtype = self.floats if field.numpy.kind in "iu" else field.dtype
        return field.model_copy(update={"optional": True, "dtype": dtype})

    def add(self, found: Found) -> None:
        self.found = Found.merged([self.found, found])

    def settle(self) -> None:
        """Decide, once all of the structures are looked through."""
        found = self.found
        both: dict[str, Kind] = {**found.arrays, **found.properties}
        for spec in self.specs:
            kind = both.get(spec.origin)
            if kind is None:
                names = [*(column.source for column in self.labels), *both]
                raise DataError(
                    f"--field {spec.name}: no structure has a property {spec.origin!r}; found "
                    f"{', '.join(names) or 'none'}"
                )
            if kind.common is None:
                raise DataError(
                    f"--field {spec.name}: {spec.origin!r} is neither numbers nor text in any structure"
                )
            self.chosen.append(_Property(spec.origin, self._field(spec, kind)))
        if not self.asked:
            self._all_that_all_have(both)

    def _all_that_all_have(self, both: Mapping[str, Kind]) -> None:
        taken = {column.name for column in self.labels} | {SPLIT.name}
        for source, kind in both.items():
            name = field_name(source)
            reason = ""
            if source == self.split:
                continue
            if kind.common is None or kind.common[2] < kind.count:
                reason = "not of the same type and shape in all structures"
            elif kind.count < self.found.structures:
                reason = f"in {kind.count} of {self.found.structures} structures"
            elif not name or name in taken:
                reason = f"the field name {name!r} is taken"
            if reason:
                self.notes.append(f"property {source!r} is left out: {reason}")
                continue
            taken.add(name)
            self.chosen.append(_Property(source, self._field(FieldSpec(name=name), kind)))

    def _field(self, spec: FieldSpec, kind: Kind) -> Field:
        source = spec.source or spec.name
        dtype = spec.dtype or kind.dtype(self.floats)
        if spec.optional and spec.dtype is None and np.dtype(dtype).kind in "iu":
            dtype = self.floats  # integers know no NaN
        per_atom = source in self.found.arrays and source not in self.found.properties
        return Field(
            name=spec.name,
            dtype=dtype,
            shape=kind.common[1] if kind.common else (),
            unit=spec.unit,
            description=spec.description or f"property {source!r}",
            axis="atom" if per_atom else None,
            optional=spec.optional,
        )

    def fill(
        self,
        columns: dict[str, Array | Ragged],
        problems: dict[str, Problems],
        crystals: Sequence[Crystal],
        labels: Sequence[Row],
    ) -> None:
        """Add the columns of these structures, and what is wrong with them."""
        for column in self.labels:
            cells = [row[column.source] if row is not None else "" for row in labels]
            found = _of_labels(self._of_column(column), cells)
            columns[column.name], problems[column.source] = found
        for chosen in self.chosen:
            field, source = chosen.field, chosen.source
            if field.axis is not None:
                columns[field.name], problems[source] = _of_atoms(field, source, crystals)
            else:
                columns[field.name], problems[source] = _of_whole(field, source, crystals)


def _of_whole(field: Field, source: str, crystals: Sequence[Crystal]) -> tuple[Array, Problems]:
    missing: Problems = {}
    if not field.numeric:
        texts = [str(crystal.properties.get(source, "")) for crystal in crystals]
        return from_texts(field, texts)
    values = np.zeros((len(crystals), *field.shape), dtype=field.numpy)
    for i, crystal in enumerate(crystals):
        value = crystal.properties.get(source)
        if field.optional and _is_unknown(value):
            values[i] = np.nan
            continue
        if value is None:
            missing[i] = "no value"
            continue
        array = np.asarray(value)
        if array.shape != field.shape or array.dtype.kind not in "biuf":
            missing[i] = f"expected numbers {field.shape}, found {_shown(value)}"
            continue
        found, wrong = from_array(field, array[None])
        values[i] = found[0]
        if wrong:
            missing[i] = wrong[0]
    return values, missing


def _is_unknown(value: Any) -> bool:
    """No value, or a single NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _of_labels(field: Field, cells: Sequence[str]) -> tuple[Array, Problems]:
    """Of a column; an empty cell and "nan" are no values."""
    if not field.optional:
        return from_texts(field, cells)
    empty = np.array([cell.strip().lower() in ("", "nan") for cell in cells])
    filled = ["0" if no else cell for no, cell in zip(empty, cells, strict=True)]
    values, problems = from_texts(field, filled)
    return np.where(empty, np.nan, values).astype(field.numpy), problems


def _of_atoms(field: Field, source: str, crystals: Sequence[Crystal]) -> tuple[Ragged, Problems]:
    missing: Problems = {}
    rows = []
    for i, crystal in enumerate(crystals):
        n = len(crystal.numbers)
        found = np.asarray(crystal.arrays.get(source, ()))
        if found.shape != (n, *field.shape):
            missing[i] = f"expected numbers {(n, *field.shape)}, found {found.shape}"
            found = np.zeros((n, *field.shape))
        values, wrong = from_array(field, found)
        if wrong:
            atom, reason = min(wrong.items())
            missing.setdefault(i, f"atom {atom}: {reason}")
        rows.append(values)
    return Ragged.from_rows(rows), missing


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def cells_of(crystal: Crystal, labels: Row) -> dict[str, str]:
    """Texts that may decide a split."""
    own = {name: str(value) for name, value in crystal.properties.items()}
    return {**own, **(labels or {})}
