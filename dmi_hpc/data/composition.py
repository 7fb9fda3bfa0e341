"""Import tables of compositions and values into a shard set, with every bad line accounted for.

Each row: the fractions of ElemNet's 86 elements (Jha et al., Sci. Rep. 8 (2018) 17593), the value,
the formula as written, and the file and line it came from.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic import Field as Option

from dmi_hpc.data.build import Alone, BuildPlan, build
from dmi_hpc.data.elements import (
    ELEMENTS,
    element_fractions,
    fractions_of,
    parse_formula,
    reduced_formula,
)
from dmi_hpc.data.manifest import SPLIT, Field, Manifest, SplitRule, split_of
from dmi_hpc.data.shards import file_checksum
from dmi_hpc.errors import DataError

__all__ = [
    "ELEMENTS",
    "BadLine",
    "CompositionImport",
    "DuplicateGroup",
    "ImportReport",
    "Place",
    "element_fractions",
    "import_compositions",
]

Array = np.ndarray[Any, np.dtype[Any]]

ROWS_PER_SHARD = 65_536  # about 27 MB
_SHOWN = 10  # bad lines or duplicates in an error message
_OPEN: Mapping[str, Callable[..., IO[str]]] = {
    ".xz": lzma.open,
    ".gz": gzip.open,
    ".bz2": bz2.open,
}


class CompositionImport(BaseModel):
    """How a table becomes a data set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    formula: str = Option("formula", description="column of formulas")
    value: str = Option("target", description="column of values")
    quantity: str = "formation_enthalpy"
    unit: str = "eV/atom"
    bad: Literal["error", "skip"] = Option("error", description="lines that cannot be used")
    duplicates: Literal["keep", "error", "mean", "lowest"] = Option(
        "keep", description="lines of one composition; kept ones always share a split"
    )
    validation: float = Option(0.1, ge=0, lt=1, description="share of compositions")
    test: float = Option(0.1, ge=0, lt=1, description="share of compositions")
    seed: int = Option(0, ge=0)

    @model_validator(mode="after")
    def _some_left(self) -> CompositionImport:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation + test is {self.validation + self.test:g}, expected less than 1: the "
                "rest is for training"
            )
        return self


@dataclass(frozen=True)
class Place:
    """A line of a file; the header is line 1."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class BadLine:
    file: str
    line: int
    formula: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.formula!r}: {self.reason}"


@dataclass(frozen=True)
class DuplicateGroup:
    """Lines of one composition."""

    formula: str  # reduced
    lines: tuple[Place, ...]

    def __str__(self) -> str:
        return f"{self.formula}: {', '.join(map(str, self.lines))}"


@dataclass(frozen=True)
class ImportReport:
    read: int
    kept: int
    bad: tuple[BadLine, ...]
    duplicates: tuple[DuplicateGroup, ...]


@dataclass(frozen=True)
class _Row:
    place: Place
    file: int
    formula: str
    amounts: Mapping[str, float]
    key: str
    value: float


def import_compositions(
    files: Sequence[Path],
    target: Path,
    options: CompositionImport,
) -> tuple[Manifest, ImportReport]:
    """Tables (CSV; .xz, .gz, .bz2 too) -> shard set `target`, and what became of each line.

    Raises DataError: a column or file is missing, nothing is left, bad lines or duplicates where
    `options` do not allow them (naming file and line).
    """
    rows, bad = _read_rows(files, options)
    if bad and options.bad == "error":
        raise DataError(
            f"{len(bad)} lines cannot be used (mend them, or skip bad lines):" + _first(bad)
        )
    read = len(rows) + len(bad)
    rows, groups = _merge(rows, options)
    splits = [split_of(options.seed, r.key, options.validation, options.test) for r in rows]
    if not rows:
        raise DataError(f"{', '.join(map(str, files))}: no usable line in {read}")
    arrays = _arrays(rows, splits)
    plan = _plan(files, options, arrays)
    manifest = build(target, plan, _Rows(arrays), Alone(), 1, lambda _: None)
    return manifest, ImportReport(read, len(rows), tuple(bad), groups)


def _first(problems: Sequence[object]) -> str:
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    return shown + (f"\n  ... and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else "")


def _read_rows(
    files: Sequence[Path], options: CompositionImport
) -> tuple[list[_Row], list[BadLine]]:
    rows: list[_Row] = []
    bad: list[BadLine] = []
    for number, file in enumerate(files):
        for place, formula, value in _records(file, options, bad):
            try:
                amounts = parse_formula(formula)
                key = reduced_formula(amounts)
                rows.append(_Row(place, number, formula, amounts, key, _number(value)))
            except DataError as error:
                bad.append(BadLine(place.file, place.line, formula, str(error)))
    return rows, bad


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"expected a finite value, found {text!r}")
    return value


def _records(
    file: Path, options: CompositionImport, bad: list[BadLine]
) -> Iterator[tuple[Place, str, str]]:
    """(first line, formula, value) of each record; records of another width go to `bad`.

    The csv module rather than pandas: it tells lines of the file, and NaN stays sodium nitride.
    """
    try:
        # utf-8-sig: spreadsheets begin their files with a byte order mark
        with _OPEN.get(file.suffix, open)(file, "rt", encoding="utf-8-sig", newline="") as stream:
            table = csv.reader(stream)
            columns = [name.strip() for name in next(table, [])]
            for name in (options.formula, options.value):
                if name not in columns:
                    found = ", ".join(columns) or "none"
                    raise DataError(f"{file}: expected a column {name!r}, found columns: {found}")
            formula, value = columns.index(options.formula), columns.index(options.value)
            line = table.line_num + 1
            for cells in table:
                place, line = Place(str(file), line), table.line_num + 1
                if len(cells) == len(columns):
                    yield place, cells[formula], cells[value]
                elif cells:  # not an empty line
                    reason = f"expected {len(columns)} cells, found {len(cells)}"
                    bad.append(BadLine(place.file, place.line, ",".join(cells), reason))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, lzma.LZMAError) as error:
        raise DataError(f"{file}: not a readable table: {error}") from None


def _merge(
    rows: Sequence[_Row], options: CompositionImport
) -> tuple[list[_Row], tuple[DuplicateGroup, ...]]:
    """Apply `options.duplicates`; groups of more than one line in order of their first."""
    by_key: dict[str, list[_Row]] = {}
    for row in rows:
        by_key.setdefault(row.key, []).append(row)
    groups = tuple(
        DuplicateGroup(key, tuple(row.place for row in same))
        for key, same in by_key.items()
        if len(same) > 1
    )
    if options.duplicates == "error" and groups:
        raise DataError(
            f"{len(groups)} compositions occur more than once (choose keep, mean or lowest):"
            + _first(groups)
        )
    if options.duplicates == "lowest":
        return [min(same, key=lambda row: row.value) for same in by_key.values()], groups
    if options.duplicates == "mean":
        return [_mean(same) for same in by_key.values()], groups
    return list(rows), groups


def _mean(same: Sequence[_Row]) -> _Row:
    first = same[0]
    value = math.fsum(row.value for row in same) / len(same)
    return _Row(first.place, first.file, first.formula, first.amounts, first.key, value)


def _arrays(rows: Sequence[_Row], splits: Sequence[int]) -> dict[str, Array]:
    return {
        "fractions": np.stack([fractions_of(row.amounts) for row in rows]),
        "value": np.array([row.value for row in rows], dtype=np.float64),
        "formula": np.array([row.formula.encode() for row in rows]),
        "file": np.array([row.file for row in rows], dtype=np.uint16),
        "line": np.array([row.place.line for row in rows], dtype=np.int64),
        SPLIT.name: np.array(splits, dtype=np.uint8),
    }


def _plan(
    files: Sequence[Path], options: CompositionImport, arrays: Mapping[str, Array]
) -> BuildPlan:
    described = {
        "fractions": (
            "1",
            "atomic fractions of H Li Be ... Pu: Z <= 94, no He Ne Ar Po At Rn Fr Ra",
        ),
        "value": (options.unit, options.quantity),
        "formula": ("", "as written in the file"),
        "file": ("", "index into provenance.files"),
        "line": ("", "of the file; the header is line 1"),
    }
    fields = tuple(
        Field(
            name=name,
            dtype=arrays[name].dtype.str.lstrip("|<>="),
            shape=arrays[name].shape[1:],
            unit=unit,
            description=description,
        )
        for name, (unit, description) in described.items()
    )
    rule = SplitRule(
        seed=options.seed,
        validation=options.validation,
        test=options.test,
        key="reduced formula: smallest whole numbers, elements in order of Z, 1 not written",
    )
    return BuildPlan(
        task="composition",
        rows=len(arrays["value"]),
        rows_per_shard=ROWS_PER_SHARD,
        fields=fields,
        split_rule=rule,
        seed=options.seed,
        provenance={
            "source": "dmi data import",
            "files": [{"name": f.name, "xxh3": file_checksum(f)} for f in files],
            "options": options.model_dump(mode="json"),
        },
    )


@dataclass(frozen=True)
class _Rows:
    arrays: Mapping[str, Array]

    def __call__(self, ids: Array) -> dict[str, Array]:
        return {name: array[ids] for name, array in self.arrays.items()}
