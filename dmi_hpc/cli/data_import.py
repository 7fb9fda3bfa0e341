"""``dmi data import``: other people's files become a shard set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from dmi_hpc.cli.data_tools import compression_of
from dmi_hpc.cli.options import stops_tidily
from dmi_hpc.config import parse
from dmi_hpc.data.importing.options import ImportOptions, field_of_text, read_map
from dmi_hpc.data.importing.records import Advance, ImportReport
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.errors import DataError, counted
from dmi_hpc.watch import console, progress_bar, say

_SHOWN = 20  # bad records in the terminal; the report file has all
_CHOICES = {
    "--as": "kind",
    "--bad": "bad",
    "--duplicates": "duplicates",
    "--floats": "floats",
    "--processes": "processes",
}

Text = str | None


def import_(
    files: Annotated[list[Path], typer.Argument(help="files or one folder")],
    out: Annotated[Path, typer.Option(help="folder of the new shard set")],
    kind: Annotated[
        str,
        typer.Option(
            "--as", help="composition|table|array|hdf5|image|structure|molecule; auto: by the names"
        ),
    ] = "auto",
    format: Annotated[Text, typer.Option(help="csv, cif, ...: instead of the suffix")] = None,
    field: Annotated[
        list[str] | None,
        typer.Option(help="NAME[=DTYPE[:UNIT[:DESCRIPTION]]], repeatable; default: all"),
    ] = None,
    map: Annotated[
        Path | None, typer.Option(help="TOML file that describes fields and axes")
    ] = None,
    bad: Annotated[str, typer.Option(help="bad records: error | skip")] = "error",
    group: Annotated[
        Text, typer.Option(help="column, property, scaffold: equal values share a split")
    ] = None,
    split_column: Annotated[
        Text, typer.Option(help="column that says train, validation or test")
    ] = None,
    validation: Annotated[float, typer.Option(help="share of rows or groups")] = 0.1,
    test: Annotated[float, typer.Option(help="share of rows or groups")] = 0.1,
    seed: Annotated[int, typer.Option(help="of the split")] = 0,
    formula: Annotated[str, typer.Option(help="compositions: column of the formulas")] = "formula",
    smiles: Annotated[str, typer.Option(help="molecules: column of the SMILES")] = "smiles",
    value: Annotated[
        str, typer.Option(help="compositions, molecules: column of the target")
    ] = "target",
    quantity: Annotated[
        Text, typer.Option(help="compositions, molecules: name of the target; default: its column")
    ] = None,
    unit: Annotated[Text, typer.Option(help="compositions, molecules: unit of the target")] = None,
    duplicates: Annotated[
        str, typer.Option(help="lines of one composition: keep | error | mean | lowest")
    ] = "keep",
    hold_out: Annotated[
        Text, typer.Option(help="compositions: systems that are for testing alone, as Ti-O,Na-Fe-O")
    ] = None,
    delimiter: Annotated[str, typer.Option(help="between the cells of a CSV")] = ",",
    labels: Annotated[
        Path | None, typer.Option(help="images, structures: CSV of file name and properties")
    ] = None,
    masks: Annotated[
        Text, typer.Option(help="images: folder of masks, or the ending of folders (_annot)")
    ] = None,
    cutoff: Annotated[
        float | None, typer.Option(help="structures: neighbours within so many angstrom")
    ] = None,
    max_neighbours: Annotated[
        int | None, typer.Option(help="structures: the nearest ones of each atom")
    ] = None,
    floats: Annotated[str, typer.Option(help="numbers in text: float64 | float32")] = "float64",
    shuffle: Annotated[
        int | None, typer.Option(metavar="SEED", help="store rows in a random order")
    ] = None,
    compress: Annotated[
        Text, typer.Option(help="none | zstd | blosc2, with a level: zstd:9")
    ] = None,
    rows_per_shard: Annotated[
        int | None, typer.Option(help="default: as many as make 256 MiB")
    ] = None,
    processes: Annotated[str, typer.Option(help="that parse: auto, or how many")] = "auto",
    replace: Annotated[
        bool, typer.Option("--replace", help="another data set in the folder")
    ] = False,
) -> None:
    """Turn tables, arrays, images or structures into a shard set.

    CSV and Parquet tables, .npy, .npz and HDF5 arrays, PNG and TIFF images, CIF, POSCAR, extended XYZ
    and JSON structures. A CSV with a column of formulas is a table of compositions. Bad records are
    reported by file and line; see docs/importing.md.
    """
    from dmi_hpc.data.importing.run import REPORT, import_files

    compression = None if compress is None else compression_of(compress)
    raw: dict[str, Any] = {
        "kind": kind,
        "format": format,
        "bad": bad,
        "group": group,
        "split_column": split_column,
        "validation": validation,
        "test": test,
        "seed": seed,
        "formula": formula,
        "smiles": smiles,
        "value": value,
        "quantity": quantity,
        "unit": unit,
        "duplicates": duplicates,
        "hold_out": tuple(part.strip() for part in hold_out.split(",")) if hold_out else (),
        "delimiter": "\t" if delimiter == "\\t" else delimiter,
        "labels": labels,
        "masks": masks,
        "cutoff": cutoff,
        "max_neighbours": max_neighbours,
        "floats": floats,
        "shuffle": shuffle,
        "compression": None if compression == "none" else compression,
        "rows_per_shard": rows_per_shard,
        "processes": int(processes) if processes.isdecimal() else processes,
        "replace": replace,
        **_described(field or [], map),
    }
    _check_choices(raw)
    options = parse(ImportOptions, raw, where="dmi data import")
    then = f"{out} is as it was before. The same command begins anew"
    with stops_tidily(then), _shown_progress() as progress:
        manifest, report = import_files(files, out, options, progress)
    _show(report, out / REPORT)
    rows = ", ".join(f"{count} {name}" for name, count in manifest.split_rows.items())
    kept = f"{report.kept} of {counted(report.read, 'record')} kept"
    say(f"data set {out}: {manifest.plan.task}, {kept} ({rows}) in {_size(manifest)}")


def _check_choices(raw: dict[str, Any]) -> None:
    """Words that an option does not know, in the user's terms."""
    for option, name in _CHOICES.items():
        known = _words(ImportOptions.model_fields[name].annotation)
        count = isinstance(raw[name], int)  # --processes 4
        if raw[name] not in known and not count:
            more = ", or how many" if name == "processes" else ""
            raise DataError(f"{option}: found {raw[name]!r}, expected {', '.join(known)}{more}")


def _words(kind: Any) -> list[str]:
    """Of a Literal, or of those in a union."""
    found = (_words(part) if get_args(part) else [part] for part in get_args(kind))
    return [word for words in found for word in words if isinstance(word, str)]


def _described(texts: list[str], path: Path | None) -> dict[str, Any]:
    """Fields and axes of --map, then of --field."""
    mapped, axes = read_map(path) if path is not None else ((), ())
    fields = [*mapped, *map(field_of_text, texts)]
    names = [spec.name for spec in fields]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"fields that are described more than once: {', '.join(twice)}")
    return {"fields": tuple(fields), "axes": axes}


@contextmanager
def _shown_progress() -> Iterator[Advance]:
    with progress_bar(console()) as bar:
        lines: dict[str, Any] = {}

        def advance(phase: str, done: int, total: int, unit: str) -> None:
            scale = 2**20 if unit == "bytes" and total > 2**24 else 1
            if phase not in lines:
                note = "MiB" if scale > 1 else unit
                lines[phase] = bar.add_task(phase, total=max(1, total // scale), note=note)
            bar.update(lines[phase], completed=done // scale)

        yield advance


def _show(report: ImportReport, path: Path) -> None:
    out = console()
    for problem in report.bad[:_SHOWN]:
        out.print(f"skipped {problem}", markup=False)
    if report.skipped > _SHOWN:
        more = counted(report.skipped - _SHOWN, "more bad record")
        out.print(f"... and {more}: {path}", markup=False)
    for group in report.duplicates[:5]:
        out.print(f"one row of the lines of {group}", markup=False)
    if report.repeated > 5:
        more = counted(report.repeated - 5, "more compound")
        out.print(f"... and {more}: {path}", markup=False)
    for remark in report.remarks[:_SHOWN]:
        out.print(f"kept {remark}", markup=False)
    if report.remarked > _SHOWN:
        out.print(f"... and {report.remarked - _SHOWN} more of such: {path}", markup=False)
    for group in report.across[:5]:
        out.print(f"in several splits: {group}", markup=False)
    if report.crossing > 5:
        more = counted(report.crossing - 5, "more compound")
        out.print(f"... and {more}: {path}", markup=False)
    for note in report.notes:
        out.print(f"note: {note}", markup=False)


def _size(manifest: Manifest) -> str:
    return f"{counted(len(manifest.shards), 'shard')}, {manifest.bytes / 1e6:,.1f} MB"
