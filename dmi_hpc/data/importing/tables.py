"""Generic tables: columns of CSV or Parquet files become fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dmi_hpc.data.importing.csvs import CsvFiles, Lines, by_line
from dmi_hpc.data.importing.optional import library, readable
from dmi_hpc.data.importing.options import ImportOptions, field_name
from dmi_hpc.data.importing.records import Batch, Chunk, PlainSource
from dmi_hpc.data.importing.rows import Splits, good_rows, with_split
from dmi_hpc.data.importing.values import Problems, Texts, from_array, from_texts
from dmi_hpc.data.manifest import SPLIT, Field
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]

_PARQUET_ROWS = 8192  # that are in memory at once


class Column:
    """A column that is wanted, and what is known of its field."""

    def __init__(
        self, name: str, source: str, dtype: str | None, unit: str, description: str
    ) -> None:
        self.name, self.source, self.dtype = name, source, dtype
        self.unit, self.description = unit, description or f"column {source!r}"
        self.shape: tuple[int, ...] = ()

    @property
    def field(self) -> Field:
        assert self.dtype is not None, "known after the first pass"
        return Field(
            name=self.name,
            dtype=self.dtype,
            shape=self.shape,
            unit=self.unit,
            description=self.description,
        )


def wanted_columns(found: Sequence[str], options: ImportOptions, where: str) -> list[Column]:
    """Those of options.fields, or all that are found; never the one that names the split."""
    if options.fields:
        for spec in options.fields:
            if spec.axis or spec.refers:
                raise DataError(f"field {spec.name}: a table has no ragged fields")
            _check_column(found, spec.origin, where)
        return [Column(s.name, s.origin, s.dtype, s.unit, s.description) for s in options.fields]
    columns = [
        Column(field_name(source), source, None, "", "")
        for source in found
        if source not in (SPLIT.name, split_column(found, options))
    ]
    names = [column.name for column in columns]
    for column in columns:
        if not column.name or names.count(column.name) > 1 or column.name == SPLIT.name:
            raise DataError(
                f"{where}: column {column.source!r} gives the field name {column.name!r}, which is "
                "empty, reserved or not the only one. Name the fields in a --map FILE "
                f'([fields.NAME] with source = "{column.source}"), or choose some with --field.'
            )
    if not columns:
        raise DataError(f"{where}: no columns in it")
    return columns


def _check_column(found: Sequence[str], name: str, where: str, use: str = "") -> None:
    """It is there, once."""
    if name not in found:
        raise DataError(
            f"{where}: expected a column {name!r}{use}, found columns: {', '.join(found)}"
        )
    if list(found).count(name) > 1:
        raise DataError(f"{where}: column {name!r} stands there more than once")


def split_column(found: Sequence[str], options: ImportOptions) -> str | None:
    """The column that says which split a row belongs to: as said, or called "split"."""
    if options.split_column is not None:
        return options.split_column
    return SPLIT.name if SPLIT.name in found and options.group is None else None


class _Table(PlainSource):
    """What CSV and Parquet have in common: columns, and the one that decides the split."""

    task = "table"

    def __init__(self, found: Sequence[str], options: ImportOptions, where: str) -> None:
        super().__init__()
        self.columns = wanted_columns(found, options, where)
        given = split_column(found, options)
        self.decides = given or options.group_column
        self.floats = options.floats
        self.splits = Splits(options, given)
        if self.decides is not None:
            _check_column(found, self.decides, where, " to decide the split")
            self.key = self.splits.rule.key or f"text of column {self.decides!r}"

    @property
    def fields(self) -> tuple[Field, ...]:
        return tuple(column.field for column in self.columns)

    @property
    def _unknown(self) -> list[Column]:
        return [column for column in self.columns if column.dtype is None]

    def learn(self, findings: Iterable[Mapping[str, Texts]]) -> None:
        totals: dict[str, Texts] = {}
        for finding in findings:
            for name, texts in finding.items():
                totals[name] = totals.get(name, Texts()) + texts
        for column in self._unknown:
            column.dtype = totals.get(column.source, Texts()).dtype(self.floats)


class CsvTable(_Table):
    """CSV files of one header; types and lengths of text come from a first pass over all lines."""

    unit = "bytes"

    def __init__(self, files: Sequence[Path], options: ImportOptions) -> None:
        self.csv = CsvFiles(files, options.delimiter)
        self.files = self.csv.files
        super().__init__(self.csv.columns, options, str(files[0]))
        self.places = {column.source: self.csv.index(column.source) for column in self.columns}
        if self.decides is not None:
            self.places[self.decides] = self.csv.index(self.decides)

    @property
    def total(self) -> int:
        return self.csv.total

    def chunks(self) -> Iterator[Chunk]:
        return self.csv.chunks()

    def scan(self) -> Iterator[Chunk] | None:
        return self.csv.chunks() if self._unknown else None

    def look(self, chunk: Chunk) -> dict[str, Texts]:
        rows, _, _ = self.csv.records(chunk.payload)
        sources = (column.source for column in self._unknown)
        return {source: Texts.of(self._cells(rows, source)) for source in sources}

    def _cells(self, rows: Sequence[Sequence[str]], source: str) -> list[str]:
        place = self.places[source]
        return [row[place] for row in rows]

    def parse(self, chunk: Chunk) -> Batch:
        lines: Lines = chunk.payload
        rows, numbers, bad = self.csv.records(lines)
        columns: dict[str, Array | Ragged] = {}
        problems: dict[str, Problems] = {}
        for column in self.columns:
            cells = self._cells(rows, column.source)
            values, wrong = from_texts(column.field, cells)
            columns[column.name] = values
            problems[column.source] = wrong
        if self.decides is not None:
            with_split(columns, problems, self.splits, self._cells(rows, self.decides))
        name = self.files[lines.file]
        batch = good_rows(columns, problems, lambda row: f"{name}:{numbers[row]}", bad)
        return replace(batch, bad=by_line(batch.bad))


class ParquetTable(_Table):
    """Parquet files of one schema; fixed-size lists become fields of that shape."""

    unit = "rows"
    heavy = False  # Arrow is faster than a pipe to another process

    def __init__(self, files: Sequence[Path], options: ImportOptions) -> None:
        self.files = tuple(files)
        parquet = _parquet()
        schemas, self.total = [], 0
        for file in files:
            with (
                readable(f"{file}: not a readable Parquet file"),
                parquet.ParquetFile(file) as table,
            ):
                schemas.append(table.schema_arrow)
                self.total += table.metadata.num_rows
            if not schemas[0].equals(schemas[-1]):
                raise DataError(f"{file}: other columns or types than {files[0]}; import it alone")
        super().__init__(schemas[0].names, options, str(files[0]))
        for column in self.columns:
            self._take_type(column, schemas[0].field(column.source).type)

    def _take_type(self, column: Column, kind: Any) -> None:
        pyarrow = _pyarrow()
        if pyarrow.types.is_fixed_size_list(kind):
            column.shape, kind = (kind.list_size,), kind.value_type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        if pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            if column.shape:
                raise DataError(f"column {column.source!r}: lists of text cannot be imported")
            return
        if pyarrow.types.is_boolean(kind):
            column.dtype = column.dtype or "uint8"
            return
        if not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)):
            raise DataError(
                f"{self.files[0]}: column {column.source!r} is of type {kind}: expected numbers, "
                "text or fixed-size lists of numbers. Choose other columns with --field."
            )
        column.dtype = column.dtype or np.dtype(kind.to_pandas_dtype()).name

    def _batches(self, columns: Sequence[str]) -> Iterator[Chunk]:
        done = 0
        for number, file in enumerate(self.files):
            row = 0
            problem = f"{file}: not a readable Parquet file"
            with readable(problem), _parquet().ParquetFile(file) as table:
                for batch in table.iter_batches(_PARQUET_ROWS, columns=list(columns)):
                    done += batch.num_rows
                    yield Chunk((number, row, batch), done)
                    row += batch.num_rows

    def scan(self) -> Iterator[Chunk] | None:
        unknown = [column.source for column in self._unknown]
        return self._batches(unknown) if unknown else None

    def look(self, chunk: Chunk) -> dict[str, Texts]:
        compute = library("pyarrow.compute", "Parquet files")
        longest = {}
        for name, values in zip(
            chunk.payload[2].schema.names, chunk.payload[2].columns, strict=True
        ):
            size = compute.max(compute.binary_length(values.cast("string"))).as_py()
            longest[name] = Texts(others=1, longest=size or 0)
        return longest

    def chunks(self) -> Iterator[Chunk]:
        sources = dict.fromkeys(column.source for column in self.columns)
        if self.decides is not None:
            sources[self.decides] = None
        return self._batches(list(sources))

    def parse(self, chunk: Chunk) -> Batch:
        number, first, batch = chunk.payload
        columns: dict[str, Array | Ragged] = {}
        problems: dict[str, Problems] = {}
        for column in self.columns:
            values = batch.column(batch.schema.get_field_index(column.source))
            with readable(f"{self.files[number]}: column {column.source!r} is damaged"):
                columns[column.name], problems[column.source] = _values(column.field, values)
        if self.decides is not None:
            keys = batch.column(batch.schema.get_field_index(self.decides)).to_pylist()
            texts = ["" if key is None or key != key else str(key) for key in keys]
            with_split(columns, problems, self.splits, texts)
        where = f"{self.files[number]}, row "
        return good_rows(columns, problems, lambda row: f"{where}{first + row}")


def _values(field: Field, found: Any) -> tuple[Array, Problems]:
    """Of an Arrow array; nulls are problems."""
    missing = np.flatnonzero(found.is_null().to_numpy(zero_copy_only=False))
    nulls = {int(row): "no value" for row in missing}
    if _pyarrow().types.is_dictionary(found.type):
        found = found.dictionary_decode()
    if field.shape:
        flat = found.fill_null([0] * field.shape[0]) if nulls else found
        inner = flat.flatten()
        gaps = inner.is_null().to_numpy(zero_copy_only=False).reshape(-1, *field.shape)
        nulls |= {int(row): "no value in it" for row in np.flatnonzero(gaps.any(axis=1))}
        # filled, as integers beside a null would come as floats
        inner = inner.fill_null(0) if gaps.any() else inner
        numbers = inner.to_numpy(zero_copy_only=False).reshape(-1, *field.shape)
    else:
        if not field.numeric or not _is_numeric(found):
            texts = ["" if item is None else str(item) for item in found.to_pylist()]
            values, wrong = from_texts(field, texts)
            return values, {**wrong, **nulls}
        zero = False if _pyarrow().types.is_boolean(found.type) else 0
        numbers = (found.fill_null(zero) if nulls else found).to_numpy(zero_copy_only=False)
    values, wrong = from_array(field, numbers)
    return values, {**wrong, **nulls}


def _is_numeric(found: Any) -> bool:
    kind, types = found.type, _pyarrow().types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind))


def _pyarrow() -> Any:
    return library("pyarrow", "Parquet files")


def _parquet() -> Any:
    return library("pyarrow.parquet", "Parquet files")
