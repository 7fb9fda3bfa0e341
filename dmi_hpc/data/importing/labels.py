"""A CSV beside images or structures: the name of a file, then its properties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dmi_hpc.data.importing.csvs import CsvFiles
from dmi_hpc.data.importing.files import bare_name
from dmi_hpc.data.importing.options import ImportOptions
from dmi_hpc.data.importing.records import Chunk
from dmi_hpc.data.importing.tables import wanted_columns
from dmi_hpc.data.importing.values import Texts
from dmi_hpc.errors import DataError, counted

CGCNN = "id_prop.csv"  # no header: name, target


class Labels:
    """Cells by the name of a file: its path, its path without suffix, or its stem.

    All of the table is in memory: about 200 bytes a row and column.
    """

    def __init__(self, path: Path, options: ImportOptions) -> None:
        table = CsvFiles([path], ",")
        self.path = path
        if path.name == CGCNN:
            more = [f"target_{i}" for i in range(2, len(table.columns))]
            self.columns: tuple[str, ...] = ("id", "target", *more)
            first = [list(table.columns)]
        else:
            self.columns, first = table.columns, []
        if len(self.columns) < 2:
            raise DataError(f"{path}: expected a column of file names and at least one more")
        self.cells: dict[str, list[str]] = {}
        for cells in self._rows(table, first):
            if cells[0] in self.cells:
                raise DataError(f"{path}: {cells[0]!r} stands there more than once")
            self.cells[cells[0]] = cells[1:]
        found = self.columns[1:]
        wanted = set(found)
        chosen = [spec for spec in options.fields if spec.origin in wanted]
        alone = options.model_copy(update={"fields": tuple(chosen)})
        self.fields = (
            wanted_columns(found, alone, str(path)) if chosen or not options.fields else []
        )
        for column in self.fields:
            if column.dtype is None:
                place = found.index(column.source)
                texts = Texts.of([cells[place] for cells in self.cells.values()])
                column.dtype = texts.dtype(options.floats)

    def _rows(self, table: CsvFiles, first: list[list[str]]) -> Iterator[list[str]]:
        yield from ([cell.strip() for cell in cells] for cells in first)
        for chunk in table.chunks():
            yield from self._of(table, chunk)

    def _of(self, table: CsvFiles, chunk: Chunk) -> Iterator[list[str]]:
        rows, _, bad = table.records(chunk.payload)
        if bad:
            raise DataError(str(bad[0]))
        yield from ([cell.strip() for cell in cells] for cells in rows)

    def check(self, files: Sequence[Path], root: Path | None) -> None:
        """Raises DataError where several files would take the same row."""
        takers: dict[str, Path] = {}
        for file in files:
            key = next((name for name in names_of(file, root) if name in self.cells), None)
            if key is not None and (other := takers.setdefault(key, file)) != file:
                raise DataError(
                    f"{self.path}: the row {key!r} names several files: {other}, {file}. Name them "
                    "by their paths in the folder"
                )

    def of(self, names: Sequence[str]) -> Mapping[str, str] | None:
        """Column -> cell of the first of these names that the table has."""
        for name in names:
            if name in self.cells:
                return dict(zip(self.columns[1:], self.cells[name], strict=True))
        return None

    def notes(self, files: Sequence[Path], root: Path | None) -> list[str]:
        """How many rows name no file."""
        names = {name for file in files for name in names_of(file, root)}
        unused = [name for name in self.cells if name not in names]
        if not unused:
            return []
        shown = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        return [f"{self.path}: {counted(len(unused), 'row')} without a file of that name ({shown})"]


def labels_of(root: Path | None, options: ImportOptions) -> Labels | None:
    """As said, or the id_prop.csv of the folder."""
    if options.labels is not None:
        return Labels(options.labels, options)
    if root is not None and (root / CGCNN).is_file():
        return Labels(root / CGCNN, options)
    return None


def names_of(path: Path, root: Path | None) -> list[str]:
    """What a table may call a file."""
    relative = path.relative_to(root).as_posix() if root is not None else path.name
    return [relative, bare_name(relative), path.name, bare_name(path.name)]
