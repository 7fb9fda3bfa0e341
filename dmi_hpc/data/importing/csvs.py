"""CSV text, plain or compressed, cut into records with the numbers of their lines."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import lzma
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from dmi_hpc.data.importing.optional import readable
from dmi_hpc.data.importing.records import BadRecord, Chunk
from dmi_hpc.errors import DataError

_OPEN: Mapping[str, Callable[..., Any]] = {
    ".xz": lzma.open,
    ".gz": gzip.open,
    ".bz2": bz2.open,
}
COMPRESSED = tuple(_OPEN)
_CHUNK_BYTES = 2**18  # of text that a worker takes at once


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], BinaryIO]]:
    """(the content, the file as it lies on disk: its position tells how far the reading is)."""
    with path.open("rb") as raw, _OPEN.get(path.suffix, _as_it_is)(raw) as content:
        yield content, raw


@contextmanager
def _as_it_is(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    yield raw


@dataclass(frozen=True)
class Lines:
    """Whole records of a file. first: the number of the first line, the header being line 1."""

    file: int
    first: int
    lines: tuple[str, ...]


class CsvFiles:
    """CSV files with the same header, read one after the other."""

    def __init__(self, files: Sequence[Path], delimiter: str) -> None:
        self.files, self.delimiter = tuple(files), delimiter
        self.columns = self._header(self.files[0])
        for file in self.files[1:]:
            if (found := self._header(file)) != self.columns:
                raise DataError(
                    f"{file}: columns {', '.join(found)}; {self.files[0]} has "
                    f"{', '.join(self.columns)}. Import them one by one."
                )

    @property
    def total(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    def _header(self, file: Path) -> tuple[str, ...]:
        with self._reading(file) as (stream, _):
            rows = csv.reader(stream, delimiter=self.delimiter)
            return tuple(name.strip() for name in next(rows, []))

    @contextmanager
    def _reading(self, file: Path) -> Iterator[tuple[Iterator[str], BinaryIO]]:
        with readable(f"{file}: not a readable table"), opened(file) as (content, raw):
            # utf-8-sig: spreadsheets begin their files with a byte order mark
            yield io.TextIOWrapper(content, encoding="utf-8-sig", newline=""), raw

    def index(self, column: str, hint: str = "") -> int:
        """Raises DataError that lists the columns there are. hint: what else the user may do."""
        if column not in self.columns:
            found = ", ".join(self.columns) or "none"
            raise DataError(
                f"{self.files[0]}: expected a column {column!r}, found columns: {found}{hint}"
            )
        if self.columns.count(column) > 1:
            raise DataError(f"{self.files[0]}: column {column!r} stands there more than once")
        return self.columns.index(column)

    def chunks(self) -> Iterator[Chunk]:
        before = 0
        for number, file in enumerate(self.files):
            with self._reading(file) as (stream, raw):
                records = _whole_records(stream, self.delimiter)
                line = 1 + len(next(records, ()))
                while lines := _some(records):
                    yield Chunk(Lines(number, line, lines), before + raw.tell())
                    line += len(lines)
            before += file.stat().st_size

    def records(self, lines: Lines) -> tuple[list[list[str]], list[int], list[BadRecord]]:
        """Cells and line of each record as wide as the header; others are bad, empty lines nothing."""
        table = csv.reader(lines.lines, delimiter=self.delimiter)
        name, line, width = self.files[lines.file], lines.first, len(self.columns)
        rows: list[list[str]] = []
        numbers: list[int] = []
        bad: list[BadRecord] = []
        try:
            for cells in table:
                if len(cells) == width:
                    rows.append(cells)
                    numbers.append(line)
                elif cells:
                    reason = f"expected {width} cells, found {len(cells)}"
                    bad.append(BadRecord(f"{name}:{line}", reason))
                line = lines.first + table.line_num
        except csv.Error as error:
            raise DataError(f"{name}:{line}: not a readable table: {error}") from None
        return rows, numbers, bad


def by_line(bad: Iterable[BadRecord]) -> tuple[BadRecord, ...]:
    """In the order of the file."""
    return tuple(sorted(bad, key=lambda record: int(record.where.rpartition(":")[2])))


def _some(records: Iterator[list[str]]) -> tuple[str, ...]:
    lines: list[str] = []
    size = 0
    for record in records:
        lines += record
        size += sum(map(len, record))
        if size >= _CHUNK_BYTES:
            break
    return tuple(lines)


def _whole_records(stream: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    """Lines, joined where a quoted cell holds line ends: only the csv module knows which do."""
    for line in stream:
        if '"' not in line:
            yield [line]
            continue
        taken: list[str] = []

        def note(lines: Iterable[str], taken: list[str] = taken) -> Iterator[str]:
            for text in lines:
                taken.append(text)
                yield text

        lines = itertools.chain([line], stream, [""])  # "" is read only if the record is not ended
        next(csv.reader(note(lines), delimiter=delimiter))
        if taken[-1] == "":
            raise csv.Error(f"a quote that is never closed, in the record {line[:40]!r}")
        yield taken
