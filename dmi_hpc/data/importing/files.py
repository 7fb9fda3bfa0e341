"""Which files an import reads: folders listed, formats told from names, kinds from formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

import xxhash
from pydantic import JsonValue

from dmi_hpc.data.importing.csvs import COMPRESSED, CsvFiles
from dmi_hpc.data.importing.optional import readable
from dmi_hpc.data.importing.options import ImportOptions, Kind
from dmi_hpc.data.importing.records import Advance
from dmi_hpc.errors import DataError, counted

_HASHED = 2**22  # bytes at once
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
    "csv": ("table", "composition", "molecule"),
    "tsv": ("table", "composition", "molecule"),
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
    left_out: tuple[Path, ...] = ()  # of a folder: of unknown format, of another kind, broken links

    def notes(self, used: Sequence[Path]) -> list[str]:
        """What was left out, but for what is `used` in another way (labels, masks)."""
        known = {path.resolve() for path in used} if self.left_out else set()
        left = [path for path in self.left_out if path.resolve() not in known]
        shown = ", ".join(map(str, left[:3])) + (", ..." if len(left) > 3 else "")
        return [f"left out: {counted(len(left), 'file')} ({shown})"] if left else []


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
    left: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: not a readable table or folder: No such file or directory")
        if path.is_dir():
            found, others = _in_folder(path, options)
            files += found
            left += others
        else:
            files.append((path, _format(path, options)))
    kinds = Counter(_KINDS[name][0] for _, name in files)
    if options.kind != "auto":
        left += [p for p, f in files if options.kind not in _KINDS[f]]
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
    for path, _ in files:
        _check_name(path)
    inputs = Inputs(kind, formats, tuple(p for p, _ in files), root, tuple(left))
    return _by_columns(inputs, options) if options.kind == "auto" else inputs


def _check_name(path: Path) -> None:
    """Names of files are stored as UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise DataError(f"{str(path)!a}: the name is not UTF-8: rename the file") from None


def _format(path: Path, options: ImportOptions) -> str:
    found = options.format or format_of(path)
    if found is None:
        raise DataError(
            f"{path}: unknown format. Say which with --format: {', '.join(_KINDS)}; of compressed "
            f"files (.xz .gz .bz2) only {', '.join(_COMPRESSIBLE)} are read"
        )
    return found


def _in_folder(folder: Path, options: ImportOptions) -> tuple[list[tuple[Path, str]], list[Path]]:
    """Files of known formats, by name; and the others. Tables beside other files are their labels."""
    found: list[tuple[Path, str]] = []
    paths, left = _below(folder)
    for path in sorted(paths, key=lambda p: p.relative_to(folder).as_posix()):
        name = format_of(path)
        if options.format is not None and name is None:
            name = options.format  # said of files whose names say nothing
        if name is None or not path.is_file() or options.format not in (None, name):
            left.append(path)
        else:
            found.append((path, name))
    if not found:
        raise DataError(f"{folder}: no files of a known format in it: {', '.join(_KINDS)}")
    tables = [item for item in found if item[1] in ("csv", "tsv")]
    if 0 < len(tables) < len(found):
        left += [path for path, _ in tables]
        found = [item for item in found if item not in tables]
    return found, left


def _below(folder: Path) -> tuple[list[Path], list[Path]]:
    """All that are no folders and not hidden; and links to folders that are read anyway.

    Links are followed, after all else, so that no folder is read twice and no circle without end.
    """
    files: list[Path] = []
    again: list[Path] = []
    folders, links, seen = [folder], list[Path](), set[tuple[int, int]]()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        with readable(f"{here}: cannot be read"):
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                again.append(here)
                continue
            seen.add((status.st_dev, status.st_ino))
            inside = sorted(path for path in here.iterdir() if not path.name.startswith("."))
        for path in inside:
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            else:
                files.append(path)
    return files, again


def _by_columns(found: Inputs, options: ImportOptions) -> Inputs:
    """A CSV with the column of formulas is a table of compositions, one with SMILES of molecules."""
    if found.kind != "table" or found.formats[0] == "parquet":
        return found
    defaults = ImportOptions()

    def said(*names: str) -> bool:
        return any(getattr(options, name) != getattr(defaults, name) for name in names)

    of_formulas, of_values = said("formula", "duplicates"), said("value", "quantity", "unit")
    delimiter = "\t" if found.formats[0] == "tsv" else options.delimiter
    columns = CsvFiles(found.files[:1], delimiter).columns
    plain = bool(options.fields or options.group)
    if not of_formulas and options.formula not in columns and options.smiles in columns:
        molecules = of_values or (not plain and options.value in columns)
        return replace(found, kind="molecule" if molecules or said("smiles") else "table")
    if said("smiles"):
        return replace(found, kind="molecule")
    if of_formulas or of_values or (not plain and (options.formula in columns or not columns)):
        return replace(found, kind="composition")
    return found


def checksums(files: Sequence[Path], progress: Advance) -> dict[Path, str]:
    """xxh3_64 of each file, 16 hexadecimal digits."""
    total, done, lock = sum(file.stat().st_size for file in files), 0, Lock()

    def of(file: Path) -> str:
        nonlocal done
        found = xxhash.xxh3_64()
        with readable(f"{file}: cannot be read"), file.open("rb", buffering=0) as stream:
            while block := stream.read(_HASHED):
                found.update(block)
                with lock:
                    done += len(block)
                    progress("checksums", done, total, "bytes")
        return found.hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(files, pool.map(of, files), strict=True))


def provenance_of(
    files: Sequence[Path], sums: Mapping[Path, str], root: Path | None
) -> list[JsonValue]:
    """Names and checksums; of many files one checksum over all names and checksums."""
    inside = [root is not None and f.is_relative_to(root) for f in files]
    names = [
        f.relative_to(root or "").as_posix() if within else f.name
        for f, within in zip(files, inside, strict=True)
    ]
    if len(files) <= _NAMED:
        return [{"name": n, "xxh3": sums[f]} for n, f in zip(names, files, strict=True)]
    lines = sorted(f"{name} {sums[file]}\n" for name, file in zip(names, files, strict=True))
    digest = xxhash.xxh3_64_hexdigest("".join(lines).encode())
    name = root.name if root else names[0]
    return [{"name": name, "files": len(files), "xxh3": digest}]
