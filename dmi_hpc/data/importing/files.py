"""Which files an import reads: folders listed, formats told from names, kinds from formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import xxhash
from pydantic import JsonValue

from dmi_hpc.data.importing.csvs import COMPRESSED, CsvFiles
from dmi_hpc.data.importing.options import ImportOptions, Kind
from dmi_hpc.data.parts import file_checksum
from dmi_hpc.errors import DataError

_NAMED = 100  # files that provenance names one by one
_SUFFIXES: dict[str, str] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".npy": "npy",
    ".npz": "npz",
    ".h5": "h5",
    ".hdf5": "h5",
    ".png": "png",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".cif": "cif",
    ".vasp": "poscar",
    ".poscar": "poscar",
    ".extxyz": "extxyz",
    ".xyz": "extxyz",
    ".json": "json",
    ".jsonl": "json",
}
_KINDS: dict[str, tuple[Kind, ...]] = {  # the first is meant unless --as says another
    "csv": ("table", "composition"),
    "tsv": ("table", "composition"),
    "parquet": ("table",),
    "npy": ("array",),
    "npz": ("array",),
    "h5": ("hdf5",),
    "png": ("image",),
    "tiff": ("image",),
    "cif": ("structure",),
    "poscar": ("structure",),
    "extxyz": ("structure",),
    "json": ("structure",),
}
_COMPRESSIBLE = ("csv", "tsv", "extxyz", "json", "cif")


@dataclass(frozen=True)
class Inputs:
    """Files of one kind, in the order of their rows. root: names are told relative to it."""

    kind: Kind
    formats: tuple[str, ...]  # of each file
    files: tuple[Path, ...]
    root: Path | None


def format_of(path: Path) -> str | None:
    """By its name; None if that says nothing."""
    if path.name.upper().startswith(("POSCAR", "CONTCAR")):
        return "poscar"
    if path.suffix in COMPRESSED:
        inner = _SUFFIXES.get(Path(path.stem).suffix.lower())
        return inner if inner in _COMPRESSIBLE else None
    return _SUFFIXES.get(path.suffix.lower())


def bare_name(name: str) -> str:
    """Without the suffixes that tell its format."""
    for suffixes in (COMPRESSED, tuple(_SUFFIXES)):
        if name.lower().endswith(suffixes):
            name = name[: name.rindex(".")]
    return name


def inputs_of(paths: Sequence[Path], options: ImportOptions) -> Inputs:
    """What is to be imported. Raises DataError if that is missing, mixed or unknown."""
    if options.format is not None and options.format not in _KINDS:
        raise DataError(f"--format: found {options.format!r}, expected {', '.join(_KINDS)}")
    files: list[tuple[Path, str]] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: not a readable table or folder: No such file or directory")
        files += _in_folder(path, options) if path.is_dir() else [(path, _format(path, options))]
    kinds = Counter(_KINDS[name][0] for _, name in files)
    if options.kind != "auto":
        files = [(p, f) for p, f in files if options.kind in _KINDS[f]]
        if not files:
            shown = ", ".join(f"{count} of kind {kind}" for kind, count in kinds.items())
            raise DataError(f"{paths[0]}: no files of kind {options.kind}; found {shown or 'none'}")
        kind: Kind = options.kind
    else:
        if len(kinds) > 1:
            shown = ", ".join(f"{count} of kind {kind}" for kind, count in kinds.items())
            raise DataError(f"{paths[0]}: found files of several kinds ({shown}): choose with --as")
        kind = next(iter(kinds))
    formats = tuple(name for _, name in files)
    if kind not in ("image", "structure") and len(set(formats)) > 1:
        raise DataError(f"expected files of one format, found {', '.join(sorted(set(formats)))}")
    root = paths[0] if len(paths) == 1 and paths[0].is_dir() else None
    found = Inputs(kind, formats, tuple(p for p, _ in files), root)
    return _as_composition(found, options) if options.kind == "auto" else found


def _format(path: Path, options: ImportOptions) -> str:
    found = options.format or format_of(path)
    if found is None:
        raise DataError(
            f"{path}: unknown format. Say which with --format: {', '.join(_KINDS)}; of compressed "
            f"files (.xz .gz .bz2) only {', '.join(_COMPRESSIBLE)} are read"
        )
    return found


def _in_folder(folder: Path, options: ImportOptions) -> list[tuple[Path, str]]:
    """Files of known formats, by name; tables beside structures or images are their labels."""
    found = []
    for path in sorted(folder.rglob("*"), key=lambda p: p.relative_to(folder).as_posix()):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        name = format_of(path)
        if options.format is not None and name is None:
            name = options.format  # said of files whose names say nothing
        if name is None or hidden or not path.is_file() or options.format not in (None, name):
            continue
        found.append((path, name))
    others = [item for item in found if item[1] not in ("csv", "tsv")]
    if not found:
        raise DataError(f"{folder}: no files of a known format in it: {', '.join(_KINDS)}")
    return others or found


def _as_composition(found: Inputs, options: ImportOptions) -> Inputs:
    """A CSV with the column of formulas is a table of compositions."""
    if found.kind != "table" or found.formats[0] == "parquet":
        return found
    defaults = ImportOptions()
    asked = any(
        getattr(options, name) != getattr(defaults, name)
        for name in ("formula", "value", "quantity", "unit", "duplicates")
    )
    delimiter = "\t" if found.formats[0] == "tsv" else options.delimiter
    columns = CsvFiles(found.files[:1], delimiter).columns
    plain = bool(options.fields or options.group)
    if asked or (not plain and (options.formula in columns or not columns)):
        return Inputs("composition", found.formats, found.files, found.root)
    return found


def provenance_of(files: Sequence[Path], root: Path | None) -> list[JsonValue]:
    """Names and checksums; of many files one checksum over all names and checksums."""
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(file_checksum, files))
    inside = [root is not None and f.is_relative_to(root) for f in files]
    names = [
        f.relative_to(root or "").as_posix() if within else f.name
        for f, within in zip(files, inside, strict=True)
    ]
    if len(files) <= _NAMED:
        return [{"name": n, "xxh3": s} for n, s in zip(names, sums, strict=True)]
    lines = sorted(f"{name} {checksum}\n" for name, checksum in zip(names, sums, strict=True))
    digest = xxhash.xxh3_64_hexdigest("".join(lines).encode())
    name = root.name if root else names[0]
    return [{"name": name, "files": len(files), "xxh3": digest}]
