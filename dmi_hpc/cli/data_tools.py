"""The sub-commands of ``dmi data`` that work on a set that is there."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from dmi_hpc.cli.options import stops_tidily
from dmi_hpc.errors import CorruptShardError, DataError, counted
from dmi_hpc.watch import console, progress_bar, say

if TYPE_CHECKING:
    from dmi_hpc.data.check import Damage
    from dmi_hpc.data.manifest import Compression, Manifest, SplitName

SetFolder = Annotated[Path, typer.Argument(metavar="SET", help="folder of a shard set")]

_SHOWN = 40  # lines of damage


@contextmanager
def _progress(what: str, total: float, unit: str = "MB") -> Iterator[Callable[[int], None]]:
    """A bar, advanced in bytes (unit "MB") or rows."""
    scale = 1e-6 if unit == "MB" else 1.0
    with progress_bar(console()) as bar:
        line = bar.add_task(what, total=total * scale, note=unit)
        yield lambda count: bar.update(line, advance=count * scale)
        bar.update(line, completed=total * scale)


def info(
    path: SetFolder,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Show what a set holds: fields, units, splits, histograms."""
    from dmi_hpc.cli.data_show import info_json, info_lines
    from dmi_hpc.data.committed import check_size
    from dmi_hpc.data.manifest import read_manifest
    from dmi_hpc.data.storage import stored_bytes

    manifest = read_manifest(path)
    for shard in manifest.shards:
        check_size(path / shard.file, shard)
    stored = stored_bytes(path, manifest)
    if as_json:
        say(info_json(path, manifest, stored))
        return
    plain = not (sys.stdout.encoding or "").lower().startswith("utf")
    say("\n".join(info_lines(path, manifest, stored, width=_width(), plain=plain)))


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 120) if sys.stdout.isatty() else 80


def head(
    path: SetFolder,
    rows: Annotated[int, typer.Option("-n", min=1, help="how many rows")] = 5,
    split: Annotated[str, typer.Option(help="all | train | validation | test")] = "all",
    fields: Annotated[str, typer.Option(help="names, joined by commas; default: all")] = "",
) -> None:
    """Show the first rows of a set; long arrays by their range."""
    import numpy as np

    from dmi_hpc.cli.data_show import head_lines
    from dmi_hpc.data.manifest import SPLIT
    from dmi_hpc.data.reader import ShardSet

    with ShardSet.open(path, verify="read", backend="pread") as shards:
        chosen = shards.rows(cast("SplitName | Literal['all']", split))
        numbers = chosen[np.arange(min(rows, len(chosen)))]
        names = _names(fields) or [field.name for field in shards.manifest.fields]
        found = shards.fields([*(n for n in names if n != SPLIT.name), SPLIT.name], numbers)
        lines = head_lines(shards.manifest, numbers, found, _width())
    say("\n".join(lines) if lines else f"{path}: the split {split} has no rows")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def verify(
    path: SetFolder,
    repair_from: Annotated[
        Path | None, typer.Option(metavar="COPY", help="mend what is damaged from this copy")
    ] = None,
) -> None:
    """Read every byte of a set; with a copy, mend it.

    All damage is listed. Exit code 2: damage is left.
    """
    from dmi_hpc.data.check import find_damage, manifest_of

    with stops_tidily():
        manifest, _ = manifest_of(path, repair_from)
        with _progress("verifying", manifest.bytes) as progress:
            damage = find_damage(path, progress, copy=repair_from)
        _list(damage)
        files = {place.file for place in damage}
        if damage and repair_from is None:
            raise CorruptShardError(
                f"{path}: {counted(len(damage), 'place')} damaged in {counted(len(files), 'file')}. "
                f"Mend from a copy: dmi data verify {path} --repair-from COPY; or delete damaged "
                "files and repeat the command that made the set"
            )
        if damage and repair_from is not None:
            total = sum(shard.bytes for shard in manifest.shards if path / shard.file in files)
            _mend(path, repair_from, damage, total)
    rows, shards = counted(manifest.rows, "row"), counted(len(manifest.shards), "shard")
    say(f"{path}: {rows}, {shards}, {manifest.bytes:,} bytes: all whole{' now' if damage else ''}")


def _list(damage: Sequence[Damage]) -> None:
    show = console()
    for place in damage[:_SHOWN]:
        show.print(str(place), markup=False)
    if len(damage) > _SHOWN:
        show.print(f"... and {counted(len(damage) - _SHOWN, 'more place')}")


def _mend(path: Path, copy: Path, damage: Sequence[Damage], total: int) -> None:
    """total: bytes of the damaged shards."""
    from dmi_hpc.data.check import find_damage
    from dmi_hpc.data.hdf5 import MASTER
    from dmi_hpc.data.repair import repair

    with _progress("mending", 2 * total) as progress:
        mended = repair(path, copy, damage, progress)
    for done in mended:
        say(f"mended {done.file}: {done.what}, {counted(done.bytes, 'byte')} from {copy}")
    files = {place.file for place in damage}
    if path / MASTER in files:
        say(f"removed {path / MASTER}: dmi data master writes it again")
    with _progress("checking", total) as progress:
        left = find_damage(path, progress, only=files)
    if left:
        raise CorruptShardError(
            f"{left[0]}. Damaged again since it was mended: is the disk failing?"
        )


def split(
    path: SetFolder,
    out: Annotated[Path, typer.Option(help="folder of the new set")],
    validation: Annotated[
        float | None, typer.Option(min=0, max=1, help="new splits: this share [0.1]")
    ] = None,
    test: Annotated[
        float | None, typer.Option(min=0, max=1, help="new splits: this share [0.1]")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="new splits: their seed [0]")] = None,
    group: Annotated[
        str | None,
        typer.Option(help="new splits: rows with equal values of this field stay together"),
    ] = None,
    shuffle: Annotated[
        int | None, typer.Option(metavar="SEED", min=0, help="rows in a random order")
    ] = None,
    compress: Annotated[
        str | None, typer.Option(help="none | zstd | blosc2, with a level: zstd:9")
    ] = None,
    rows_per_shard: Annotated[int | None, typer.Option(min=1, help="size of the shards")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="default: the cores")] = None,
) -> None:
    """Make a new set from an old one: splits, order, compression.

    Size of the shards, too. What is not given stays as it is. Interrupted, the same command continues.
    """
    from dmi_hpc.config import cores_per_rank
    from dmi_hpc.data.reader import ShardSet
    from dmi_hpc.data.rewrite import Changes, rewrite

    new_splits = any(option is not None for option in (validation, test, seed, group))
    changes = Changes(
        validation=(0.1 if validation is None else validation) if new_splits else None,
        test=(0.1 if test is None else test) if new_splits else None,
        split_seed=seed or 0,
        group=group,
        shuffle_seed=shuffle,
        compression=None if compress is None else compression_of(compress),
        rows_per_shard=rows_per_shard,
    )
    workers = processes or cores_per_rank(1)
    with (
        stops_tidily("the same command continues"),
        ShardSet.open(path, verify="none") as old,
        _progress("rows", len(old), "rows") as progress,
    ):
        new = rewrite(old, out, changes, processes=workers, progress=progress)
    say(made_text(out, new))


def made_text(folder: Path, manifest: Manifest) -> str:
    """What a command that made a set says at its end."""
    rows = ", ".join(f"{count:,} {name}" for name, count in manifest.split_rows.items())
    shards = counted(len(manifest.shards), "shard")
    return f"data set {folder}: {counted(manifest.rows, 'row')} ({rows}) in {shards}"


def compression_of(text: str) -> Compression | Literal["none"]:
    """From "none", "zstd" or "blosc2:5". Raises DataError."""
    from pydantic import ValidationError

    from dmi_hpc.data.manifest import Compression

    if text == "none":
        return "none"
    codec, _, level = text.partition(":")
    try:
        return Compression.model_validate({"codec": codec, **({"level": level} if level else {})})
    except ValidationError as error:
        raise DataError(
            f"--compress: found {text!r}, expected none, zstd, blosc2, or with a level zstd:1 to "
            "zstd:22, blosc2:1 to blosc2:9"
        ) from error


def stage(
    to: Annotated[Path, typer.Option(help="node-local folder: /dev/shm, a local NVMe")],
    path: Annotated[
        Path | None, typer.Argument(metavar="SET", help="shard set; with --remove: default all")
    ] = None,
    part: Annotated[
        str | None, typer.Option(metavar="K/N", help="share of node K of N, counted from 0")
    ] = None,
    lock_timeout: Annotated[
        float, typer.Option(metavar="S", min=0, help="seconds to wait for another process")
    ] = 1800,
    remove: Annotated[bool, typer.Option("--remove", help="remove the copy again")] = False,
    force: Annotated[bool, typer.Option("--force", help="remove it even if it is in use")] = False,
) -> None:
    """Copy a set to fast storage of this node, for a job.

    Checked while copied, and once a node however many processes ask at once. Trainings and searches
    find the copy by DMI_STAGE=FOLDER. It stays until --remove.
    """
    if remove:
        _unstage(to, path, force=force)
        return
    if path is None or force:
        raise DataError(
            "stage needs SET, and --force goes with --remove: see dmi data stage --help"
        )
    from dmi_hpc import knobs
    from dmi_hpc.data import stage as staging
    from dmi_hpc.data.manifest import read_manifest
    from dmi_hpc.data.storage import size_text

    folders = [folder.resolve() for folder in knobs.stage_folders()]
    share = None if part is None else part_of(part)
    total = sum(shard.bytes for shard in staging.part_shards(read_manifest(path), share))
    copied: list[int] = []
    with stops_tidily(), _progress("staging", total) as progress:

        def advance(count: int) -> None:
            copied.append(count)
            progress(count)

        how = staging.Staging(to, share, lock_timeout, console().print, advance, progress)
        copy = staging.stage(path, how)
    say(f"{path}: {size_text(total)} in {copy}{'' if copied else ', there already'}")
    if to.resolve() not in folders:
        value = os.pathsep.join(map(str, [*folders, to.resolve()]))
        console().print(f"to use it: export {knobs.STAGE}={shlex.quote(value)}", markup=False)


def part_of(text: str) -> tuple[int, int]:
    """From "K/N". Raises DataError."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise DataError(
            f"--part: found {text!r}, expected K/N with K from 0 to N - 1, for example "
            "$SLURM_NODEID/$SLURM_NNODES"
        )
    return int(first), int(second)


def _unstage(to: Path, path: Path | None, *, force: bool) -> None:
    from dmi_hpc.data.stage import remove

    count, used = remove(to, path, force=force)
    say(f"{to}: {count} {'copy' if count == 1 else 'copies'} removed")
    if used:
        raise DataError(
            f"{len(used)} in use by running processes: {', '.join(map(str, used))}. Repeat the command "
            "when they have ended, or with --force"
        )


def master(path: SetFolder) -> None:
    """Write SET/master.h5: all shards as one file of HDF5.

    For h5py, MATLAB, HDFView. It holds no data, only where they are: keep it in the folder.
    """
    from dmi_hpc.data.hdf5 import write_master
    from dmi_hpc.data.reader import ShardSet
    from dmi_hpc.files import writing

    with ShardSet.open(path, verify="none") as shards, writing(path):
        offsets = {axis: shards.offsets(axis) for axis in shards.manifest.plan.axes}
        say(
            f"{write_master(path, shards.manifest, offsets)}: {counted(len(shards), 'row')} as one file"
        )


def bench(
    path: SetFolder,
    batch_size: Annotated[int, typer.Option(min=1, help="rows of a batch")] = 256,
    threads: Annotated[int, typer.Option(min=0, help="of the loader")] = 2,
    fields: Annotated[
        str, typer.Option(help="names, joined by commas; default: all of numbers")
    ] = "",
    split: Annotated[str, typer.Option(help="all | train | validation | test")] = "train",
    seconds: Annotated[float, typer.Option(min=0.01, help="of each measurement, about")] = 0.5,
) -> None:
    """Measure how fast this machine reads a set.

    The same work on arrays in memory is measured beside it. Empties the page cache of the set's
    files to measure it cold, where the system allows it.
    """
    from dmi_hpc.cli.data_show import columns
    from dmi_hpc.data.bench import BenchOptions
    from dmi_hpc.data.bench import bench as measure
    from dmi_hpc.data.storage import size_text

    names = _names(fields)
    chosen = cast("SplitName | Literal['all']", split)
    options = BenchOptions(tuple(names), chosen, batch_size, threads, seconds)
    show = console()
    with show.status("measuring") as status:
        result = measure(path, options, lambda what: status.update(what))
    size = f"{counted(batch_size, 'row')}, {size_text(batch_size * result.row_bytes)}"
    say(f"{path}: {', '.join(result.fields)}")
    rows, workers = counted(result.rows, "row"), counted(threads, "loader thread")
    say(f"{rows} of {split}; batches of {size}; {workers}\n")
    table = [("", "samples/s", "MB/s", "of memory")]
    for figure in result.figures:
        share = "" if figure.share is None else f"{figure.share:.0%}"
        rates = f"{figure.samples_per_s:,.0f}", f"{figure.bytes_per_s / 1e6:,.1f}"
        table.append((figure.what, *rates, share))
    say("\n".join(columns(table, right={1, 2, 3})))
    about = (
        "memory: arrays of the same rows, one thread",
        "first epoch: opened anew, every block checked, loaded if ram; the others are warm",
    )
    for note in (*about, *result.notes):
        say("\n".join(textwrap.wrap(f"- {note}", 80, subsequent_indent="  ")))
