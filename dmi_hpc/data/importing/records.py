"""What every kind of source gives the import: batches of rows, bad records, their report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import JsonValue

from dmi_hpc.data.manifest import Field
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import DataError, counted

Array = np.ndarray[Any, np.dtype[Any]]
Advance = Callable[[str, int, int, str], None]  # phase, done, of how many, of what

LISTED = 10_000  # bad records that a report names
_SHOWN = 10  # in an error
_GIVE_UP = 1_000  # bad records after which no more are counted


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used. where: file and line, file, or file and index."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Chunk:
    """Some records in a row, not yet parsed. payload: any picklable data of its source."""

    payload: Any
    done: int  # how far the source is after it, in its own units


@dataclass(frozen=True)
class Batch:
    """A parsed chunk: its good rows (with "split" unless the row number decides) and its bad ones."""

    rows: Mapping[str, Array | Ragged]
    bad: tuple[BadRecord, ...] = ()
    keys: tuple[str, ...] = ()  # of the rows, where the source asks for them in `collect`
    remarks: tuple[BadRecord, ...] = ()  # on rows that are good, but strange

    @property
    def count(self) -> int:
        return max((len(values) for values in self.rows.values()), default=0)


class Source(Protocol):
    """One kind of input. Sent to worker processes once `prepare` is done, so it must be picklable."""

    task: str
    key: str  # what decides a row's split, in words
    heavy: bool  # parsing is worth other processes
    files: tuple[Path, ...]
    duplicates: list[str]  # that `collect` met, for people: the first LISTED
    repeated: int  # how many there are
    across: list[str]  # compositions in several splits: the first LISTED
    crossing: int  # how many there are

    @property
    def fields(self) -> tuple[Field, ...]: ...
    @property
    def total(self) -> int:
        """Units of `Chunk.done` in all."""

    @property
    def unit(self) -> str:
        """What `total` counts, for people."""

    def scan(self) -> Iterator[Chunk] | None:
        """Chunks to look through for what `fields` needs; None if nothing is to be found out."""

    def look(self, chunk: Chunk) -> Any:
        """What a chunk of `scan` tells; in any process."""

    def learn(self, findings: Iterable[Any]) -> None:
        """Take what `look` told, in order."""

    def chunks(self) -> Iterator[Chunk]: ...
    def parse(self, chunk: Chunk) -> Batch:
        """In any process; a function of the chunk alone."""

    def collect(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Last word on the rows, in this process: usually the batches as they are."""

    def notes(self) -> Sequence[str]:
        """What the user should know: left out columns and the like."""

    def beside(self) -> Sequence[Path]:
        """Files that are read besides `files`: labels, masks."""

    def provenance(self) -> Mapping[str, JsonValue]:
        """Of this kind alone."""


class PlainSource:
    """What most sources have in common."""

    heavy = True
    key = "row number"

    def __init__(self) -> None:
        self.duplicates: list[str] = []
        self.repeated = 0
        self.across: list[str] = []
        self.crossing = 0

    def scan(self) -> Iterator[Chunk] | None:
        return None

    def look(self, chunk: Chunk) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has nothing to look for")

    def learn(self, findings: Iterable[Any]) -> None:
        raise NotImplementedError(f"{type(self).__name__} has nothing to learn")

    def collect(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        return batches

    def notes(self) -> Sequence[str]:
        return ()

    def beside(self) -> Sequence[Path]:
        return ()

    def provenance(self) -> Mapping[str, JsonValue]:
        return {}


@dataclass
class ImportReport:
    """What became of every record."""

    read: int = 0
    kept: int = 0
    skipped: int = 0
    bad: list[BadRecord] = field(default_factory=list)  # the first LISTED of the skipped
    merged: int = 0  # records that became part of another's row
    repeated: int = 0  # groups of them
    duplicates: list[str] = field(default_factory=list)  # the first LISTED groups
    notes: list[str] = field(default_factory=list)
    remarked: int = 0  # kept, but strange
    remarks: list[BadRecord] = field(default_factory=list)  # the first LISTED of these
    crossing: int = 0  # compositions in several splits
    across: list[str] = field(default_factory=list)  # the first LISTED of these

    def add_remarks(self, remarks: Sequence[BadRecord]) -> None:
        self.remarked += len(remarks)
        self.remarks.extend(remarks[: LISTED - len(self.remarks)])

    def add_bad(self, bad: Sequence[BadRecord]) -> None:
        self.skipped += len(bad)
        self.bad.extend(bad[: LISTED - len(self.bad)])

    def refuse_bad(self) -> None:
        """The error of an import that must not skip."""
        more = " or more" if self.gave_up else ""
        raise DataError(
            f"{counted(self.skipped, 'record')}{more} cannot be used (mend them, or leave them out "
            "with --bad skip):" + listed(self.bad, self.skipped)
        )

    @property
    def gave_up(self) -> bool:
        """More bad records than anyone reads: an import that must not skip need not go on."""
        return self.skipped >= _GIVE_UP

    def as_json(self) -> dict[str, JsonValue]:
        return {
            "read": self.read,
            "kept": self.kept,
            "merged": self.merged,
            "repeated": self.repeated,
            "skipped": self.skipped,
            "notes": list(self.notes),
            "duplicates": list(self.duplicates),
            "remarked": self.remarked,
            "remarks": [{"where": b.where, "reason": b.reason} for b in self.remarks],
            "crossing": self.crossing,
            "across": list(self.across),
            "bad": [{"where": b.where, "reason": b.reason} for b in self.bad],
        }


def listed(problems: Sequence[object], count: int | None = None) -> str:
    """The first ones, a line each, and how many more there are."""
    total = len(problems) if count is None else count
    shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    return shown + (f"\n  ... and {total - _SHOWN} more" if total > _SHOWN else "")
