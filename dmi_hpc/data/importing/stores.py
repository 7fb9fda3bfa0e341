"""Files of named arrays: .npy, .npz, HDF5, read a few entries at a time."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from dmi_hpc.data.hdf5 import describe_datasets, read_dataset
from dmi_hpc.data.importing.optional import readable
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]

_STEP = 2**23  # bytes that are skipped at once


class Store(Protocol):
    """Named arrays of one file (or, for .npy, of several)."""

    def shapes(self) -> Shapes: ...
    def read(self, name: str, start: int, stop: int) -> Array:
        """Entries start to stop along the first axis."""


class NpyStore:
    """One array a file, mapped into memory, named as the file."""

    def __init__(self, files: Sequence[Path]) -> None:
        names = [file.stem for file in files]
        if len(set(names)) < len(names):
            raise DataError(f"expected .npy files of different names, found {', '.join(names)}")
        self.arrays = {name: _mapped(file) for name, file in zip(names, files, strict=True)}

    def shapes(self) -> Shapes:
        return {name: (array.shape, array.dtype) for name, array in self.arrays.items()}

    def read(self, name: str, start: int, stop: int) -> Array:
        return np.array(self.arrays[name][start:stop])


def _mapped(file: Path) -> Array:
    with readable(f"{file}: not a readable .npy file"):
        return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))


class NpzStore:
    """Arrays of an archive, read as streams: compressed ones are never whole in memory."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with readable(f"{file}: not a readable .npz file"):
            self.archive = zipfile.ZipFile(file)
        names = [n.removesuffix(".npy") for n in self.archive.namelist() if n.endswith(".npy")]
        self.streams: dict[str, tuple[IO[bytes], int]] = {}  # array -> (stream, next entry)
        self.heads = {name: self._open(name) for name in names}

    def _open(self, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        """Shape, whether in Fortran order, dtype; the stream then stands at the first entry."""
        with readable(f"{self.file}: array {name!r} is not readable"):
            stream = self.archive.open(f"{name}.npy")
            version = np.lib.format.read_magic(stream)
            reader = {1: np.lib.format.read_array_header_1_0}.get(
                version[0], np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = reader(stream)
        if dtype.hasobject:
            raise DataError(
                f"{self.file}: array {name!r} holds Python objects, not numbers or text"
            )
        self.streams[name] = stream, 0
        return shape, fortran, dtype

    def shapes(self) -> Shapes:
        return {name: (shape, dtype) for name, (shape, _, dtype) in self.heads.items()}

    def read(self, name: str, start: int, stop: int) -> Array:
        shape, fortran, dtype = self.heads[name]
        if fortran and len(shape) > 1:
            raise DataError(
                f"{self.file}: array {name!r} is in Fortran order, which cannot be read row by row. "
                "Save it with numpy.ascontiguousarray."
            )
        if self.streams[name][1] > start:
            self._open(name)
        stream, at = self.streams[name]
        size = dtype.itemsize * math.prod(shape[1:])
        with readable(f"{self.file}: array {name!r} is damaged"):
            _skip(stream, (start - at) * size)
            raw = stream.read((stop - start) * size)
        if len(raw) != (stop - start) * size:
            raise DataError(f"{self.file}: array {name!r} ends before its shape says")
        self.streams[name] = stream, stop
        return np.frombuffer(raw, dtype).reshape(stop - start, *shape[1:])


def _skip(stream: IO[bytes], count: int) -> None:
    while count > 0:
        count -= len(stream.read(min(count, _STEP))) or count


class H5Store:
    """Datasets of an HDF5 file, by their paths."""

    def __init__(self, file: Path) -> None:
        self.file = file
        with readable(f"{file}: not readable as HDF5"):
            self.found = describe_datasets(file)

    def shapes(self) -> Shapes:
        return self.found

    def read(self, name: str, start: int, stop: int) -> Array:
        with readable(f"{self.file}: {name}: cannot be read"):
            return read_dataset(self.file, name, start, stop)


def stores_of(files: Sequence[Path], suffix: str) -> list[Store]:
    """.npy files are columns of one table; .npz and HDF5 files hold rows one after the other."""
    if suffix == "npy":
        return [NpyStore(files)]
    return [NpzStore(file) if suffix == "npz" else H5Store(file) for file in files]


def located(file: str, name: str, shapes: Shapes) -> str:
    found = find(name, shapes)
    if found is None:
        raise DataError(f"{file}: no array {name!r}{overview(shapes)}")
    return found


def find(name: str, shapes: Shapes) -> str | None:
    """A dataset by its path, or by its last part where only one ends so."""
    if name in shapes:
        return name
    ends = [path for path in shapes if path == f"/{name}" or path.endswith(f"/{name}")]
    return f"/{name}" if f"/{name}" in ends else ends[0] if len(ends) == 1 else None


def overview(shapes: Shapes) -> str:
    lines = [f"\n  {name}: {dtype} {shape}" for name, (shape, dtype) in shapes.items()]
    more = f"\n  ... and {len(lines) - 30} more" if len(lines) > 30 else ""
    return "; found:" + "".join(lines[:30]) + more
