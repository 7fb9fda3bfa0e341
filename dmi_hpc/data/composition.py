"""Tables of compositions and values: formulas become fractions of elements.

Each row: the fractions of ElemNet's 86 elements (Jha et al., Sci. Rep. 8 (2018) 17593), the value,
the atoms in the formula, columns asked for by name (a temperature), the formula as written, and the
file and line it came from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmi_hpc.data.elements import (
    ELEMENTS,
    element_fractions,
    fractions_of,
    parse_formula,
    reduced_formula,
)
from dmi_hpc.data.importing.crossing import Crossing
from dmi_hpc.data.importing.csvs import CsvFiles, Lines, by_line
from dmi_hpc.data.importing.options import ImportOptions
from dmi_hpc.data.importing.records import (
    LISTED,
    BadRecord,
    Batch,
    Chunk,
    PlainSource,
    listed,
)
from dmi_hpc.data.importing.rows import Splits
from dmi_hpc.data.importing.values import Problems, finite_float, from_texts
from dmi_hpc.data.manifest import SPLIT, Field
from dmi_hpc.errors import DataError

__all__ = ["ELEMENTS", "Compositions", "element_fractions", "read_formulas"]

Array = np.ndarray[Any, np.dtype[Any]]

_LONGEST = 256  # bytes of a formula: anything longer is none
_SLICE = 2**16  # rows of a batch of merged ones
_OWN = frozenset({"fractions", "value", "atoms", "formula", "file", "line"})


class Compositions(PlainSource):
    """CSV files with a column of formulas, one of values, and those of `options.fields`."""

    task = "composition"
    unit = "bytes"
    key = "reduced formula: smallest whole numbers, elements in order of Z, 1 not written"

    def __init__(self, files: Sequence[Path], options: ImportOptions) -> None:
        super().__init__()
        self.csv = CsvFiles(files, options.delimiter)
        self.files = self.csv.files
        self.options = options
        other = ". Choose another with --{}, or import any columns with --as table"
        self.formula = self.csv.index(options.formula, other.format("formula"))
        self.value = self.csv.index(options.value, other.format("value"))
        self.beside_value = _columns(options, self.csv, self.files[0])
        self.splits = Splits(options, options.split_column)
        self.given = self.csv.index(options.split_column) if options.split_column else None
        if self.given is not None:
            self.key = self.splits.rule.key
            if options.duplicates in ("mean", "lowest"):
                raise DataError(
                    f"duplicates {options.duplicates!r} makes one row of lines that the split column "
                    "may have put into several splits: choose keep or error"
                )
        self.longest = 1

    @property
    def total(self) -> int:
        return self.csv.total

    @property
    def fields(self) -> tuple[Field, ...]:
        about = "atomic fractions of H Li Be ... Pu: Z <= 94, no He Ne Ar Po At Rn Fr Ra"
        o = self.options
        return (
            Field(
                name="fractions",
                dtype="float32",
                shape=(len(ELEMENTS),),
                unit="1",
                description=about,
            ),
            Field(
                name="value",
                dtype="float64",
                unit=o.unit or "",
                description=o.value if o.quantity is None else o.quantity,
            ),
            Field(
                name="atoms",
                dtype="float64",
                unit="1",
                description="in the formula as written",
            ),
            *(column for column, _ in self.beside_value),
            Field(
                name="formula",
                dtype=f"S{self.longest}",
                unit="",
                description="as written in the file",
            ),
            Field(name="file", dtype="uint16", unit="", description="index into provenance.files"),
            Field(
                name="line",
                dtype="int64",
                unit="",
                description="of the file; the header is line 1",
            ),
        )

    def notes(self) -> Sequence[str]:
        if self.options.unit is not None:
            return ()
        return [
            f"the unit of {self.options.value!r} is not known: say it with --unit (eV/atom, ...)"
        ]

    # the first pass: how long formulas are

    def scan(self) -> Iterator[Chunk] | None:
        return self.csv.chunks()

    def look(self, chunk: Chunk) -> int:
        rows, _, _ = self.csv.records(chunk.payload)
        sizes = (len(row[self.formula].encode()) for row in rows)
        return max((size for size in sizes if size <= _LONGEST), default=1)

    def learn(self, findings: Iterable[int]) -> None:
        self.longest = max([1, *findings])

    def chunks(self) -> Iterator[Chunk]:
        return self.csv.chunks()

    def parse(self, chunk: Chunk) -> Batch:
        lines: Lines = chunk.payload
        rows, lines_of_rows, found_bad = self.csv.records(lines)
        bad = list(found_bad)
        beside, problems = self._beside_value(rows)
        fractions, values, formulas, kept, keys, splits, atoms = [], [], [], [], [], [], []
        for position, (row, number) in enumerate(zip(rows, lines_of_rows, strict=True)):
            formula = row[self.formula]
            try:
                if len(formula.encode()) > _LONGEST:
                    raise DataError(f"longer than {_LONGEST} bytes")
                amounts = parse_formula(formula)
                key = reduced_formula(amounts)
                value, split = finite_float(row[self.value]), self._split(row, key)
                if position in problems:
                    raise DataError(problems[position])
            except DataError as error:
                place = f"{self.files[lines.file]}:{number}"
                bad.append(BadRecord(place, f"{formula[:_LONGEST]!r}: {error}"))
                continue
            fractions.append(fractions_of(amounts))
            values.append(value)
            formulas.append(formula.encode())
            atoms.append(math.fsum(amounts.values()))
            kept.append(position)
            keys.append(key)
            splits.append(split)
        if not keys:
            return Batch({}, by_line(bad))
        columns = {
            "fractions": np.stack(fractions),
            "value": np.array(values, dtype=np.float64),
            "atoms": np.array(atoms, dtype=np.float64),
            **{name: column[kept] for name, column in beside.items()},
            "formula": np.array(formulas, dtype=f"S{self.longest}"),
            "file": np.full(len(keys), lines.file, dtype=np.uint16),
            "line": np.array(lines_of_rows, dtype=np.int64)[kept],
            SPLIT.name: np.array(splits, dtype=np.uint8),
        }
        return Batch(columns, by_line(bad), tuple(keys))

    def _beside_value(self, rows: Sequence[Sequence[str]]) -> tuple[dict[str, Array], Problems]:
        """(n,) of each column beside the value, and what is wrong with a row of any."""
        columns: dict[str, Array] = {}
        problems: Problems = {}
        for column, place in self.beside_value:
            columns[column.name], wrong = from_texts(column, [row[place] for row in rows])
            for position, reason in wrong.items():
                problems.setdefault(position, f"{column.name}: {reason}")
        return columns, problems

    def _split(self, row: Sequence[str], key: str) -> int:
        splits, problems = self.splits.of([key if self.given is None else row[self.given]])
        if problems:
            raise DataError(f"{self.options.split_column}: {problems[0]}")
        return int(splits[0])

    def collect(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Apply options.duplicates: "keep" as they come; the others hold all rows, about 1 kB each."""
        if self.options.duplicates == "keep":
            yield from self._watched(batches)
            return
        columns: dict[str, list[Array]] = {}
        by_key: dict[str, list[int]] = {}
        count = 0
        for batch in batches:
            for name, values in batch.rows.items():
                assert isinstance(values, np.ndarray), "compositions are dense"
                columns.setdefault(name, []).append(values)
            for key in batch.keys:
                by_key.setdefault(key, []).append(count)
                count += 1
        if count:
            whole = {name: np.concatenate(columns.pop(name)) for name in list(columns)}
            yield from self._merged(whole, by_key)

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """As they come; compositions in several splits, which a given split does not keep apart, are
        noted."""
        crossing = Crossing()
        for batch in batches:
            if self.given is not None and batch.count:
                columns = (np.asarray(batch.rows[name]) for name in (SPLIT.name, "file", "line"))
                for key, split, file, line in zip(batch.keys, *columns, strict=True):
                    crossing.add(key, int(split), f"{self.files[file]}:{line}")
            yield batch
        self.crossing, self.across = crossing.found()

    def _merged(self, whole: dict[str, Array], by_key: dict[str, list[int]]) -> Iterator[Batch]:
        """One row for each composition, in order of its first line."""
        values, several = whole["value"], {k: rows for k, rows in by_key.items() if len(rows) > 1}
        self.repeated = len(several)
        for key, rows in itertools.islice(several.items(), LISTED):
            places = (f"{self.files[whole['file'][i]]}:{whole['line'][i]}" for i in rows)
            self.duplicates.append(f"{key}: {', '.join(places)}")
        if self.options.duplicates == "error" and several:
            raise DataError(
                f"{len(several)} compositions occur more than once (choose keep, mean or lowest):"
                + listed(self.duplicates, len(several))
            )
        chosen = {key: rows[0] for key, rows in by_key.items()}
        for key, rows in several.items():
            if self.options.duplicates == "lowest":
                chosen[key] = min(rows, key=lambda row: float(values[row]))
            else:
                values[rows[0]] = math.fsum(values[rows]) / len(rows)
        order = np.fromiter(chosen.values(), np.int64, len(chosen))
        for start in range(0, len(order), _SLICE):
            rows_ = order[start : start + _SLICE]
            yield Batch({name: array.take(rows_, axis=0) for name, array in whole.items()})


def read_formulas(path: Path, columns: Sequence[str] = ()) -> tuple[list[str], dict[str, Array]]:
    """A CSV with the column `formula`, and others of numbers, for prediction.

    Returns the formulas as written, and the fields fractions (n, 86), atoms (n,) and `columns` (n,).
    Raises DataError naming the line of the first that cannot be used.
    """
    csv = CsvFiles([path], ",")
    places = {name: csv.index(name) for name in ("formula", *columns)}
    labels: list[str] = []
    amounts: list[dict[str, float]] = []
    numbers: dict[str, list[float]] = {name: [] for name in columns}
    for chunk in csv.chunks():
        rows, lines, bad = csv.records(chunk.payload)
        if bad:
            raise DataError(str(bad[0]))
        for row, line in zip(rows, lines, strict=True):
            formula = row[places["formula"]]
            try:
                amounts.append(parse_formula(formula))
                for name in columns:
                    numbers[name].append(finite_float(row[places[name]]))
            except DataError as error:
                raise DataError(f"{path}, line {line}: {formula!r}: {error}") from None
            labels.append(formula)
    if not labels:
        raise DataError(f"{path}: no formulas in it")
    fields = {name: np.array(values) for name, values in numbers.items()}
    fields["fractions"] = np.stack([fractions_of(each) for each in amounts])
    fields["atoms"] = np.array([math.fsum(each.values()) for each in amounts])
    return labels, fields


def _columns(options: ImportOptions, csv: CsvFiles, file: Path) -> tuple[tuple[Field, int], ...]:
    """The field of each column that is asked for beside the value, and its place in a line."""
    columns = []
    for spec in options.fields:
        if spec.name in _OWN:
            raise DataError(
                f"{file}: field {spec.name!r} is one that every import of compositions has. Choose "
                f"another name, in a --map FILE ([fields.NAME] with source = {spec.origin!r})"
            )
        if spec.axis or spec.refers:
            raise DataError(f"field {spec.name}: a table has no ragged fields")
        column = Field(
            name=spec.name,
            dtype=spec.dtype or "float64",
            unit=spec.unit,
            description=spec.description or f"column {spec.origin!r}",
        )
        columns.append((column, csv.index(spec.origin)))
    if columns and options.duplicates == "mean":
        names = ", ".join(column.name for column, _ in columns)
        raise DataError(
            f"duplicates 'mean' makes one row of lines that may differ in {names}: choose keep, error "
            "or lowest"
        )
    return tuple(columns)
