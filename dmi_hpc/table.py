"""Tables written block by block to CSV, Parquet or HDF5: whole or absent, larger than memory."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from dmi_hpc.data.importing.optional import library
from dmi_hpc.errors import DataError
from dmi_hpc.files import atomic_file

Block = Mapping[str, Any]  # column -> list or (n,) array
Append = Callable[[Block], None]

_GROUP_ROWS = 2**16  # of a Parquet row group: small ones are slow to read
_CHUNK_ROWS = 2**14  # of an HDF5 chunk


@dataclass(frozen=True)
class Column:
    """One column. digits: significant ones in CSV; None writes all that there are."""

    name: str
    kind: Literal["text", "integer", "real"]
    unit: str = ""
    digits: int | None = None

    @property
    def title(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name


def check_suffix(path: Path) -> None:
    """Raises DataError, with the known ones, if it is none that `table_file` writes."""
    if path.suffix not in _WRITERS:
        raise DataError(f"{path}: found suffix '{path.suffix}', expected {', '.join(_WRITERS)}")
    if path.suffix == ".parquet":
        library("pyarrow.parquet", "Parquet files")


@contextmanager
def table_file(path: Path, columns: Sequence[Column]) -> Iterator[Append]:
    """Yield what appends blocks of rows; the file appears at the end of the block, or not at all.

    The suffix says what is written: CSV (RFC 4180, UTF-8), Parquet, or HDF5 with a dataset a column.
    Raises DataError for another suffix or without the library, OSError if it cannot be written.
    """
    check_suffix(path)
    with atomic_file(path) as temp, _WRITERS[path.suffix](temp, columns) as append:
        yield append


@contextmanager
def csv_rows(stream: IO[str], columns: Sequence[Column]) -> Iterator[Append]:
    """The same as CSV text on an open stream."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([column.title for column in columns])

    def append(block: Block) -> None:
        texts = (_texts(column, block[column.name]) for column in columns)
        writer.writerows(zip(*texts, strict=True))

    yield append


def _texts(column: Column, values: Any) -> list[Any]:
    plain = values.tolist() if isinstance(values, np.ndarray) else values
    if column.kind == "real" and column.digits is not None:
        return [f"{value:.{column.digits}g}" for value in plain]
    return list(plain)


@contextmanager
def _csv(path: Path, columns: Sequence[Column]) -> Iterator[Append]:
    with (
        path.open("w", encoding="utf-8", newline="") as stream,
        csv_rows(stream, columns) as append,
    ):
        yield append


@contextmanager
def _parquet(path: Path, columns: Sequence[Column]) -> Iterator[Append]:
    arrow, parquet = (
        library("pyarrow", "Parquet files"),
        library("pyarrow.parquet", "Parquet files"),
    )
    types = {"text": arrow.string(), "integer": arrow.int64(), "real": arrow.float64()}
    schema = arrow.schema(
        [arrow.field(c.name, types[c.kind], metadata={"unit": c.unit}) for c in columns]
    )
    with parquet.ParquetWriter(path, schema) as writer:
        held: list[Any] = []

        def flush() -> None:
            if held:
                writer.write_table(arrow.concat_tables(held), row_group_size=_GROUP_ROWS)
                held.clear()

        def append(block: Block) -> None:
            held.append(arrow.table({c.name: block[c.name] for c in columns}, schema=schema))
            if sum(table.num_rows for table in held) >= _GROUP_ROWS:
                flush()

        yield append
        flush()


@contextmanager
def _hdf5(path: Path, columns: Sequence[Column]) -> Iterator[Append]:
    import h5py

    types = {"text": h5py.string_dtype("utf-8"), "integer": np.int64, "real": np.float64}
    with h5py.File(path, "w") as file:
        for column in columns:
            data = file.create_dataset(
                column.name, (0,), types[column.kind], maxshape=(None,), chunks=(_CHUNK_ROWS,)
            )
            data.attrs["unit"] = column.unit

        def append(block: Block) -> None:
            for column in columns:
                data, values = file[column.name], block[column.name]
                before = len(data)
                data.resize(before + len(values), axis=0)
                data[before:] = values

        yield append


_WRITERS = {".csv": _csv, ".parquet": _parquet, ".h5": _hdf5, ".hdf5": _hdf5}
