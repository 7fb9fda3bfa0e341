"""Crystal structures: CIF, POSCAR, extended XYZ and JSON files become rows of graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmi_hpc.data.importing.crossing import Crossing
from dmi_hpc.data.importing.crystals import (
    CLOSEST,
    Crystal,
    Neighbours,
    from_cif,
    from_extxyz,
    from_json,
    from_poscar,
    neighbours_of,
    require_apart,
)
from dmi_hpc.data.importing.csvs import opened
from dmi_hpc.data.importing.files import Inputs, inputs_of
from dmi_hpc.data.importing.labels import labels_of, names_of
from dmi_hpc.data.importing.optional import readable
from dmi_hpc.data.importing.options import ROW, ImportOptions
from dmi_hpc.data.importing.properties import Found, Properties, cells_of
from dmi_hpc.data.importing.records import BadRecord, Batch, Chunk, PlainSource, listed
from dmi_hpc.data.importing.rows import Splits, good_rows, with_split
from dmi_hpc.data.importing.structure_files import Record, json_records, xyz_frames
from dmi_hpc.data.importing.values import Problems
from dmi_hpc.data.manifest import SPLIT, Field
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import DataError, counted

Array = np.ndarray[Any, np.dtype[Any]]

_PER_CHUNK = 32
_FORMULA = 128  # bytes


class Structures(PlainSource):
    """Atoms on axis "atom", neighbours on axis "edge", what is known of the whole beside them."""

    task = "structure"

    def __init__(self, inputs: Inputs, options: ImportOptions, *, labelled: bool = True) -> None:
        super().__init__()
        self.files, self.formats, self.root = inputs.files, inputs.formats, inputs.root
        self.cutoff, self.nearest = options.cutoff, options.max_neighbours
        self.labels = labels_of(inputs.root, options) if labelled else None
        self.properties = Properties(options, self.labels.fields if self.labels else ())
        self.decides = options.split_column or options.group_column
        self.by_row = options.group == ROW
        self.splits = Splits(options, options.split_column)
        self.key = "reduced formula: smallest whole numbers, elements in order of Z, 1 not written"
        if self.by_row:
            self.key = ROW
        if self.decides:
            self.key = self.splits.rule.key or f"text of {self.decides!r}"
        self.one_each = all(name in ("cif", "poscar") for name in self.formats)
        self.single = self.properties.floats
        self.longest = max(len(self._name(f).encode()) for f in self.files) if self.one_each else 1
        if self.one_each:
            self.properties.settle()
            if self.labels is not None:
                self.labels.check(self.files, self.root)

    @property
    def unit(self) -> str:
        return "files" if self.one_each else "bytes"

    @property
    def total(self) -> int:
        sizes = (1 if self.one_each else file.stat().st_size for file in self.files)
        return sum(sizes)

    @property
    def fields(self) -> tuple[Field, ...]:
        found = self.atom_fields
        taken = {field.name for field in found}
        for field in self.properties.fields:
            if field.name in taken:
                raise DataError(
                    f"property {field.name!r} has the name of a field that structures have anyway: "
                    "give it another one in a --map FILE"
                )
        return (*found, *self.properties.fields)

    @property
    def atom_fields(self) -> tuple[Field, ...]:
        """All but the properties."""
        single, a = self.single, "angstrom"
        found = [
            _field("name", f"S{self.longest}", "", "file, or identifier in it"),
            _field("formula", f"S{_FORMULA}", "", "reduced, elements in order of Z"),
            _field("cell", single, a, "rows are the cell vectors, 0 where there is none", (3, 3)),
            _field("pbc", "uint8", "1", "periodic along each cell vector", (3,)),
            _field("atomic_number", "uint8", "1", "Z", (), "atom"),
            _field("position", single, a, "Cartesian", (3,), "atom"),
        ]
        if self.cutoff is not None:
            about = "the cell that the neighbour is in, in cell vectors"
            found += [
                Field(
                    name="edge_index",
                    dtype="int32",
                    shape=(2,),
                    unit="",
                    description="an atom and its neighbour, nearest first",
                    axis="edge",
                    refers="atom",
                ),
                _field("edge_image", "int8", "1", about, (3,), "edge"),
                _field("distance", "float32", a, "between them", (), "edge"),
            ]
        return tuple(found)

    def notes(self) -> list[str]:
        unused = self.labels.notes(self.files, self.root) if self.labels and self.one_each else []
        return [*self.properties.notes, *unused]

    def beside(self) -> Sequence[Path]:
        return (self.labels.path,) if self.labels else ()

    def _name(self, file: Path) -> str:
        return names_of(file, self.root)[1]

    def records(self) -> Iterator[tuple[Record | BadRecord, int]]:
        """Each with how far the source is after it."""
        done = 0
        for file, name in zip(self.files, self.formats, strict=True):
            if name in ("cif", "poscar"):
                done += 1 if self.one_each else file.stat().st_size
                yield Record(str(file), self._name(file), name, None, file), done
                continue
            with readable(f"{file}: cannot be read"):
                read = json_records if name == "json" else xyz_frames
                for record, at in read(file, self._name(file)):
                    yield record, done + at
            done += file.stat().st_size

    def chunks(self) -> Iterator[Chunk]:
        waiting: list[Record | BadRecord] = []
        at = 0
        for record, at in self.records():
            waiting.append(record)
            if len(waiting) == _PER_CHUNK:
                yield Chunk(tuple(waiting), at)
                waiting = []
        if waiting:
            yield Chunk(tuple(waiting), at)

    # the first pass: names and properties; files of one structure have theirs in the labels alone

    def scan(self) -> Iterator[Chunk] | None:
        return None if self.one_each else self.chunks()

    def look(self, chunk: Chunk) -> tuple[list[Found], int]:
        found, longest = [], 1
        for record in chunk.payload:
            if isinstance(record, BadRecord):
                continue
            longest = max(longest, len(record.name.encode()))
            try:
                found.append(Found.of(self._crystal(record)))
            except DataError:
                continue  # reported when it is parsed for good
        return [Found.merged(found)] if found else [], longest

    def learn(self, findings: Iterable[tuple[list[Found], int]]) -> None:
        for found, longest in findings:
            self.longest = max(self.longest, longest)
            for some in found:
                self.properties.add(some)
        self.properties.settle()

    # rows

    def parse(self, chunk: Chunk) -> Batch:
        bad: list[BadRecord] = []
        good: list[tuple[Record, Crystal, dict[str, Any]]] = []
        for record in chunk.payload:
            if isinstance(record, BadRecord):
                bad.append(record)
                continue
            try:
                good.append((record, *self.row(record)))
            except DataError as error:
                bad.append(BadRecord(record.where, str(error)))
        if not good:
            return Batch({}, tuple(bad))
        columns: dict[str, Array | Ragged] = {}
        problems: dict[str, Problems] = {}
        remarks = {i: text for i, (_, _, row) in enumerate(good) if (text := row["remark"])}
        crystals = [crystal for _, crystal, _ in good]
        for field in self.atom_fields:
            columns[field.name] = _column(field, [row for _, _, row in good])
        labels = [row["labels"] for _, _, row in good]
        self.properties.fill(columns, problems, crystals, labels)
        if self.decides is None:
            keys = [row["formula"].decode() for _, _, row in good]
        else:
            source = self.decides
            keys = [
                cells_of(c, lab).get(source, "") for c, lab in zip(crystals, labels, strict=True)
            ]
        if not self.by_row:
            with_split(columns, problems, self.splits, keys)
        return good_rows(columns, problems, lambda row: good[row][0].where, bad, remarks)

    def collect(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Note compositions in several splits, which a given split does not keep apart."""
        crossing = Crossing()
        for batch in batches:
            if self.decides and batch.count:
                columns = (np.asarray(batch.rows[n]) for n in ("name", "formula", SPLIT.name))
                for name, formula, split in zip(*columns, strict=True):
                    crossing.add(bytes(formula).decode(), int(split), bytes(name).decode())
            yield batch
        self.crossing, self.across = crossing.found()

    def row(self, record: Record) -> tuple[Crystal, dict[str, Any]]:
        """What is stored of it, by field, with its labels and a remark. Raises DataError."""
        crystal = self._crystal(record)
        formula = crystal.formula.encode()
        if len(formula) > _FORMULA:
            raise DataError(f"a reduced formula of {len(formula)} bytes, the field has {_FORMULA}")
        row: dict[str, Any] = {
            "name": record.name.encode(),
            "formula": formula,
            "cell": crystal.cell,
            "pbc": crystal.periodic,
            "atomic_number": crystal.numbers,
            "position": crystal.positions,
            "labels": None,
            "remark": "",
        }
        if self.labels is not None:
            names = [record.name, *names_of(record.file, self.root)]
            row["labels"] = self.labels.of(names if self.one_each else names[:1])
            if row["labels"] is None:
                raise DataError(f"not in {self.labels.path}")
        found = neighbours_of(crystal, self.cutoff or CLOSEST, self.nearest)
        require_apart(found)
        if self.cutoff is not None:
            row |= {
                "edge_index": found.pairs,
                "edge_image": found.images,
                "distance": found.distances,
                "remark": _isolated(crystal, found, self.cutoff),
            }
        return crystal, row

    def _crystal(self, record: Record) -> Crystal:
        content = record.content
        if content is None:
            with readable("cannot be read"), opened(record.file) as (stream, _):
                content = stream.read().decode(errors="replace")
        return _PARSERS[record.format](content)


def _column(field: Field, rows: Sequence[Mapping[str, Any]]) -> Array | Ragged:
    values = [np.asarray(row[field.name], dtype=field.numpy) for row in rows]
    return Ragged.from_rows(values) if field.axis else np.stack(values)


def read_structures(
    path: Path, cutoff: float, nearest: int | None
) -> tuple[list[str], dict[str, Array | Ragged]]:
    """Structures of a file or folder, not stored: the name of each, and fields as an import has them.

    Raises DataError naming every record that cannot be used.
    """
    options = ImportOptions(kind="structure", cutoff=cutoff, max_neighbours=nearest, group=ROW)
    source = Structures(inputs_of([path], options), options, labelled=False)
    rows, bad = list[dict[str, Any]](), list[BadRecord]()
    for record, _ in source.records():
        if isinstance(record, BadRecord):
            bad.append(record)
            continue
        try:
            rows.append(source.row(record)[1])
        except DataError as error:
            bad.append(BadRecord(record.where, str(error)))
    if bad or not rows:
        raise DataError(f"{path}: {counted(len(bad), 'structure')} cannot be used:{listed(bad)}")
    source.longest = max(len(row["name"]) for row in rows)
    columns = {field.name: _column(field, rows) for field in source.atom_fields}
    return [row["name"].decode() for row in rows], columns


def _isolated(crystal: Crystal, found: Neighbours, cutoff: float) -> str:
    """What to say of atoms without any neighbour; "" if there are none."""
    counts = np.bincount(found.pairs[:, 0], minlength=len(crystal.numbers))
    alone = np.flatnonzero(counts == 0).tolist()
    if not alone:
        return ""
    shown = ", ".join(map(str, alone[:5])) + (", ..." if len(alone) > 5 else "")
    one = len(alone) == 1
    atoms, have = f"atom{'' if one else 's'} {shown}", "has" if one else "have"
    return f"{atoms} {have} no neighbour within {cutoff:g} angstrom"


_PARSERS: Mapping[str, Callable[[Any], Crystal]] = {
    "cif": from_cif,
    "poscar": from_poscar,
    "extxyz": from_extxyz,
    "json": from_json,
}


def _field(
    name: str,
    dtype: str,
    unit: str,
    description: str,
    shape: tuple[int, ...] = (),
    axis: str | None = None,
) -> Field:
    return Field(name=name, dtype=dtype, unit=unit, description=description, shape=shape, axis=axis)
