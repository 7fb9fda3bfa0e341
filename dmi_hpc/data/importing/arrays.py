"""Whole arrays as rows: .npy files, .npz archives, datasets of HDF5 files; ragged ones too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from dmi_hpc.data.importing.options import AxisSpec, FieldSpec, ImportOptions, field_name
from dmi_hpc.data.importing.records import Batch, Chunk, PlainSource
from dmi_hpc.data.importing.rows import Splits, good_rows, with_split
from dmi_hpc.data.importing.stores import Shapes, Store, located, overview, stores_of
from dmi_hpc.data.importing.values import Problems, from_array
from dmi_hpc.data.manifest import SPLIT, Field
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK_BYTES = 2**23


class ArraySource(PlainSource):
    """Rows are the entries along the first axis; ragged fields are cut by the rows' lengths."""

    heavy = False  # there is nothing to parse: a pipe to another process would be the slow part
    unit = "rows"

    def __init__(self, files: Sequence[Path], suffix: str, options: ImportOptions) -> None:
        super().__init__()
        self.task = "hdf5" if suffix == "h5" else "array"
        self.files = tuple(files)
        self.stores = stores_of(files, suffix)
        self.names = [str(files[0])] if suffix == "npy" else [str(file) for file in files]
        shapes = self.stores[0].shapes()
        self.axes = {axis.name: _located(self.names[0], axis, shapes) for axis in options.axes}
        self.sources = _wanted(self.names[0], shapes, options)
        for name, store in zip(self.names, self.stores, strict=True):
            self._check(name, store.shapes())
        decides = options.split_column or options.group_column
        self.decides = located(self.names[0], decides, shapes) if decides else None
        self.splits = Splits(options, options.split_column)
        if decides:
            self.key = self.splits.rule.key or f"text of {decides!r}"
        self.rows = [self._rows_of(n, s) for n, s in zip(self.names, self.stores, strict=True)]
        self.total = sum(self.rows)
        self.described = [self._field(spec) for spec in self.sources]
        self.reached: dict[tuple[str, int], tuple[int, int]] = {}  # axis, file -> row, its entry

    @property
    def fields(self) -> tuple[Field, ...]:
        return tuple(self.described)

    def _check(self, name: str, shapes: Shapes) -> None:
        """Every file has the same arrays, of types that can be stored."""
        first = self.stores[0].shapes()
        for spec in self.sources:
            if spec.origin not in shapes:
                raise DataError(f"{name}: no array {spec.origin!r}{overview(shapes)}")
            shape, dtype = shapes[spec.origin]
            if not shape or dtype.kind not in "biufSUO" or dtype.itemsize > 2**20:
                raise DataError(
                    f"{name}: {spec.origin} ({dtype}, {shape}) cannot be imported: expected numbers "
                    "or text along at least one axis"
                )
            if 0 in shape[1:]:
                raise DataError(f"{name}: {spec.origin} {shape}: its entries hold no values")
            if dtype.kind == "f" and dtype.itemsize > 8 and spec.dtype is None:
                raise DataError(
                    f"{name}: {spec.origin} is of type {dtype}, the widest that is stored is float64: "
                    f"say that it is to be rounded with --field {spec.name}=float64"
                )
            if shape[1:] != first[spec.origin][0][1:]:
                raise DataError(
                    f"{name}: {spec.origin} has entries of shape {shape[1:]}, in {self.names[0]} "
                    f"{first[spec.origin][0][1:]}"
                )
            if spec.axis is not None and spec.dtype is None and dtype.kind in "UO":
                raise DataError(f"field {spec.name}: ragged text needs a dtype, such as S16")
            if spec.axis is not None and spec.axis not in self.axes:
                raise DataError(
                    f"field {spec.name}: axis {spec.axis!r} is not described: add [axes."
                    f'{spec.axis}] with lengths = "DATASET" or offsets = "DATASET" to the map'
                )

    def _rows_of(self, name: str, store: Store) -> int:
        shapes = store.shapes()
        lengths = {s.origin: shapes[s.origin][0][0] for s in self.sources if s.axis is None}
        for axis in self.axes.values():
            source = axis.lengths or axis.offsets or ""
            if source not in shapes:
                raise DataError(f"{name}: axis {axis.name}: no array {source!r}{overview(shapes)}")
            shape, dtype = shapes[source]
            if dtype.kind not in "iu" or len(shape) != 1:
                raise DataError(
                    f"{name}: axis {axis.name}: expected integers along one axis in {source!r}, found "
                    f"{dtype} {shape}"
                )
            lengths[source] = shapes[source][0][0] - (axis.offsets is not None)
        if self.decides is not None:
            lengths[self.decides] = shapes[self.decides][0][0]
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{source} {count}" for source, count in lengths.items())
            raise DataError(
                f"{name}: arrays of different numbers of rows ({shown}). Choose those that belong "
                "together with --field NAME, or describe ragged ones in a --map FILE."
            )
        return next(iter(lengths.values()))

    def _field(self, spec: FieldSpec) -> Field:
        shape, dtype = self.stores[0].shapes()[spec.origin]
        name = spec.dtype
        if name is None and dtype.kind in "UO":
            name = "S1"  # until the first pass has found the longest text
        if name is None:
            name = "uint8" if dtype.kind == "b" else dtype.newbyteorder("=").name
            name = f"S{dtype.itemsize}" if dtype.kind == "S" else name
        return Field(
            name=spec.name,
            dtype=name,
            shape=shape[1:],
            unit=spec.unit,
            description=spec.description or f"array {spec.origin!r}",
            axis=spec.axis,
            refers=spec.refers,
        )

    def _texts(self) -> list[FieldSpec]:
        shapes = self.stores[0].shapes()
        return [s for s in self.sources if s.dtype is None and shapes[s.origin][1].kind in "UO"]

    def scan(self) -> Iterator[Chunk] | None:
        return self._ranges() if self._texts() else None

    def look(self, chunk: Chunk) -> dict[str, int]:
        store, start, stop = chunk.payload
        found = {}
        for spec in self._texts():
            values = self.stores[store].read(spec.origin, start, stop)
            found[spec.name] = max((len(_encoded(v)) for v in values.reshape(-1)), default=1)
        return found

    def learn(self, findings: Iterable[Mapping[str, int]]) -> None:
        longest: dict[str, int] = {}
        for finding in findings:
            for name, size in finding.items():
                longest[name] = max(1, size, longest.get(name, 1))
        self.described = [
            f.model_copy(update={"dtype": f"S{longest[f.name]}"}) if f.name in longest else f
            for f in self.described
        ]

    def _ranges(self) -> Iterator[Chunk]:
        shapes = self.stores[0].shapes()
        entries = {s.name: shapes[s.origin][0][0] for s in self.sources}
        size = sum(field.entry_bytes * entries[field.name] for field in self.fields)
        step = max(1, _CHUNK_BYTES * self.rows[0] // max(size, 1))
        done = 0
        for number, rows in enumerate(self.rows):
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                yield Chunk((number, start, stop), done + stop)
            done += rows

    def chunks(self) -> Iterator[Chunk]:
        return self._ranges()

    def parse(self, chunk: Chunk) -> Batch:
        number, start, stop = chunk.payload
        store = self.stores[number]
        columns: dict[str, Array | Ragged] = {}
        problems: dict[str, Problems] = {}
        offsets = {
            name: self._offsets(number, axis, start, stop) for name, axis in self.axes.items()
        }
        for spec, field in zip(self.sources, self.fields, strict=True):
            where = f"{self.names[number]}: {spec.origin}"
            low, high = start, stop
            if spec.axis is not None:
                low, high = int(offsets[spec.axis][0]), int(offsets[spec.axis][-1])
                length = store.shapes()[spec.origin][0][0]
                last = stop == self.rows[number]
                if (start == 0 and low) or high > length or (last and high < length):
                    first = low if start == 0 else 0
                    raise DataError(
                        f"{where}: has {length} entries, the rows of its axis those from {first} to "
                        f"{high}: expected all of them, from 0 to {length}"
                    )
            values, wrong = _converted(field, store.read(spec.origin, low, high), where)
            columns[spec.name] = values
            if spec.axis is not None:
                bounds = offsets[spec.axis] - low
                columns[spec.name] = Ragged(values, bounds)
                wrong = _by_row(wrong, bounds)
            problems[spec.origin] = wrong
        if self.decides is not None:
            keys = store.read(self.decides, start, stop)
            texts = [_encoded(key).decode(errors="replace") for key in keys]
            with_split(columns, problems, self.splits, texts)
        where = self.names[number]
        return good_rows(columns, problems, lambda row: f"{where}, row {start + row}")

    def _offsets(self, number: int, axis: AxisSpec, start: int, stop: int) -> Array:
        """(rows + 1,) int64, in entries of the file. Lengths are summed up as the rows come."""
        store, where = self.stores[number], f"{self.names[number]}: axis {axis.name}"
        if axis.offsets is not None:
            found = store.read(axis.offsets, start, stop + 1).astype(np.int64)
        else:
            row, base = self.reached.get((axis.name, number), (0, 0))
            if row != start:
                row, base = 0, 0
            lengths = store.read(axis.lengths or "", row, stop).astype(np.int64)
            found = (base + np.concatenate([[0], np.cumsum(lengths)]))[start - row :]
            self.reached[axis.name, number] = stop, int(found[-1])
        if (np.diff(found) < 0).any() or found[0] < 0:
            raise DataError(f"{where}: expected lengths of at least 0, found negative ones")
        return found


def _wanted(file: str, shapes: Shapes, options: ImportOptions) -> list[FieldSpec]:
    """The arrays that are asked for, by their names in the file; all, if none is."""
    if not shapes:
        raise DataError(f"{file}: no arrays in it")
    if options.fields:
        specs = []
        for spec in options.fields:
            found = located(file, spec.origin, shapes)
            specs.append(spec.model_copy(update={"source": found}))
        return specs
    names = [field_name(PurePosixPath(source).name) for source in shapes]
    if len({shape[:1] for shape, _ in shapes.values()}) > 1 or len(set(names)) < len(names):
        raise DataError(
            f"{file}: which arrays are fields? Say --field NAME for each, or describe them in a "
            f"--map FILE (docs/importing.md){overview(shapes)}"
        )
    for name in names:
        if not name or name == SPLIT.name:
            raise DataError(f"{file}: an array needs another field name than {name!r}: use --map")
    return [FieldSpec(name=name, source=source) for name, source in zip(names, shapes, strict=True)]


def _located(file: str, axis: AxisSpec, shapes: Shapes) -> AxisSpec:
    key = "lengths" if axis.lengths is not None else "offsets"
    source = axis.lengths or axis.offsets or ""
    return axis.model_copy(update={key: located(file, source, shapes)})


def _encoded(item: Any) -> bytes:
    if isinstance(item, bytes):
        return item
    return str(item).encode()


def _converted(field: Field, found: Array, where: str) -> tuple[Array, Problems]:
    if found.dtype.kind == "O" and not all(isinstance(item, str | bytes) for item in found.flat):
        raise DataError(f"{where}: holds objects that are neither numbers nor text")
    if not field.numeric and field.shape:
        raise DataError(f"{where}: text of more than one axis cannot be imported")
    if field.numeric and found.dtype.kind in "SUO":
        raise DataError(f"{where}: expected numbers for {field.dtype}, found text")
    return from_array(field, found)


def _by_row(problems: Problems, offsets: Array) -> Problems:
    """Problems of entries as problems of their rows; the first counts."""
    rows: Problems = {}
    for entry, reason in problems.items():
        rows.setdefault(int(np.searchsorted(offsets, entry, side="right")) - 1, reason)
    return rows
