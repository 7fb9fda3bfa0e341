"""Finished shards on their way into a manifest: what a build remembers of each, and the commit."""

from __future__ import annotations

import errno
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xxhash
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

import dmi_hpc
from dmi_hpc.data.hdf5 import is_shard
from dmi_hpc.data.manifest import (
    MANIFEST,
    SPLIT,
    SPLITS,
    BuildPlan,
    Manifest,
    ShardRecord,
    read_manifest,
)
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.shard import Rows, group_by_split, write_shard
from dmi_hpc.data.statistics import Moments
from dmi_hpc.errors import DataError
from dmi_hpc.files import remove_stale, write_text

_SUFFIX = ".part.json"
_SHARD = re.compile(r"shard\d*-\d{5,}\.h5(\.part\.json)?", re.ASCII)


class Part(BaseModel):
    """What the manifest needs to know of one finished shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    record: ShardRecord
    moments: Mapping[str, Moments]  # of training rows, by numeric field


def make_part(path: Path, plan: BuildPlan, rows: Rows) -> Part:
    """Write checked rows as the shard `path`."""
    grouped = group_by_split(rows)
    record = write_shard(path, plan, grouped)
    train, moments = record.split_rows[0], {}
    for field in plan.fields:
        if not field.numeric or field == SPLIT:
            continue
        found = grouped[field.name]
        values = (
            found.values[: found.offsets[train]] if isinstance(found, Ragged) else found[:train]
        )
        if field.optional:
            values = values[~np.isnan(values)]
        if values.size:
            moments[field.name] = Moments.of(values)
    return Part(fingerprint=plan.fingerprint(), record=record, moments=moments)


def note_part(path: Path, part: Part) -> None:
    """Remember beside the shard that it is whole; an interrupted build continues from this."""
    write_text(path.with_name(path.name + _SUFFIX), part.model_dump_json())


def noted_part(path: Path, fingerprint: str) -> Part | None:
    """What is remembered of a shard whose bytes are still those; None if it must be made.

    Raises DataError if the shard belongs to another plan.
    """
    try:
        part = Part.model_validate_json(path.with_name(path.name + _SUFFIX).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    if part.fingerprint != fingerprint:
        raise DataError(
            f"{path}: a shard of another, unfinished data set (plan {part.fingerprint}, expected "
            f"{fingerprint}). Choose another folder, or delete this one."
        )
    return part if is_whole(path, part.record) else None


def is_whole(path: Path, record: ShardRecord) -> bool:
    """Whether the bytes of a shard are still those."""
    if not path.is_file() or path.stat().st_size != record.bytes:
        return False
    return file_checksum(path) == record.xxh3


def unfinished(folder: Path) -> int:
    """Shards of an interrupted build in a folder."""
    return len(list(folder.glob(f"*{_SUFFIX}")))


def remove_strays(folder: Path, *, notes: bool) -> None:
    """Remove shards that the folder's manifest does not name: of writers that failed or were killed.

    notes: also what an interrupted build has finished and noted; else that stays. The caller holds
    the folder's lock. What is on disk decides: a writer may be interrupted just behind its commit.
    Other people's files stay, whatever their names.
    """
    named: set[str] = set()
    if (folder / MANIFEST).exists():
        named = {shard.file for shard in read_manifest(folder).shards}
    found, noted = _named_as_shards(folder)
    for path in found:
        kept = named if notes else named | noted | {name + _SUFFIX for name in noted}
        if path.name not in kept and _is_ours(path, noted):
            path.unlink()


def take_over(folder: Path) -> None:
    """Make the folder ready for a writer that holds its lock: what killed ones left goes.

    Raises DataError if there is no set but files of others that are named as shards are.
    """
    remove_stale(folder)
    remove_strays(folder, notes=False)
    if (folder / MANIFEST).exists():
        return
    found, noted = _named_as_shards(folder)
    others = sorted(path.name for path in found if not _is_ours(path, noted))
    if others:
        raise DataError(
            f"{folder}: expected a folder for a data set, found {len(others)} files named as its "
            f"shards are but not written by this program ({others[0]}). Choose another folder, or "
            "move these files away"
        )


def _named_as_shards(folder: Path) -> tuple[list[Path], set[str]]:
    """(files with names of shards or of their notes, shards that have a note)."""
    found = [path for path in folder.iterdir() if _SHARD.fullmatch(path.name)]
    return found, {p.name.removesuffix(_SUFFIX) for p in found if p.name.endswith(_SUFFIX)}


def _is_ours(path: Path, noted: Set[str]) -> bool:
    """By what it is: anybody may have files of such names."""
    if not path.is_file():
        return False
    return path.name.endswith(_SUFFIX) or path.name in noted or is_shard(path)


def file_checksum(path: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """xxh3_64 of a file, 16 hexadecimal digits; `xxhsum -H3` prints the same.

    progress: called with the bytes read since the last call.
    """
    checksum, buffer = xxhash.xxh3_64(), bytearray(1 << 22)
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            checksum.update(memoryview(buffer)[:count])
            progress(count)
    return checksum.hexdigest()


def manifest_of(plan: BuildPlan, parts: Sequence[Part]) -> Manifest:
    """Merged in the order of shards: the same floats for any number of ranks."""
    statistics: dict[str, Moments] = {}
    for part in parts:
        for name, moments in part.moments.items():
            merged = statistics.get(name)
            statistics[name] = merged.merge(moments) if merged else moments
    totals = [sum(column) for column in zip(*(p.record.split_rows for p in parts), strict=True)]
    return Manifest(
        plan=plan,
        rows=sum(totals),
        split_rows=dict(zip(SPLITS, totals, strict=True)),
        statistics={name: moments.statistics() for name, moments in statistics.items()},
        made_with=_made_with(),
        shards=tuple(part.record for part in parts),
    )


@cache
def _made_with() -> dict[str, JsonValue]:
    """Command, versions and source of this process: for people, not part of a set's identity."""
    home = Path(dmi_hpc.__file__).parent
    source = xxhash.xxh3_64()
    for path in sorted(home.rglob("*.py")):
        source.update(path.relative_to(home).as_posix().encode() + path.read_bytes())
    versions: dict[str, JsonValue] = {
        "dmi-hpc": dmi_hpc.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "h5py")},
    }
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "command": command.encode(errors="backslashreplace").decode(),  # any bytes name a file
        "versions": versions,
        "source": source.hexdigest(),
    }


def explain(problem: OSError, target: Path, needed: int | None) -> DataError:
    """A failed write in the user's terms. needed: bytes of the whole set, if known."""
    if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"{target}: cannot write the data set: {problem}")
    free = shutil.disk_usage(target if target.exists() else target.parent).free
    size = f"The whole set needs about {needed / 1e6:.1f} MB; " if needed else ""
    return DataError(
        f"{target}: no space left. {size}{free / 1e6:.1f} MB are free here (or your quota is spent). "
        "Make room and repeat the command."
    )
