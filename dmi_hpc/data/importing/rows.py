"""Columns of values -> the good rows of a batch, the bad ones, and each row's split."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dmi_hpc.data.importing.options import ImportOptions
from dmi_hpc.data.importing.records import BadRecord, Batch
from dmi_hpc.data.importing.values import Problems, splits_from
from dmi_hpc.data.manifest import SPLIT, SPLITS, SplitRule, split_of
from dmi_hpc.data.ragged import Ragged

Array = np.ndarray[Any, np.dtype[Any]]
Columns = Mapping[str, "Array | Ragged"]


class Splits:
    """Which split each row belongs to, as the options say; picklable."""

    def __init__(self, options: ImportOptions, column: str | None = None) -> None:
        """column: names each row's split; else options.group, else the row number decides."""
        self.rule = SplitRule(
            seed=options.seed,
            validation=0.0 if column else options.validation,
            test=0.0 if column else options.test,
            key=f"given by {column!r}" if column else "",
        )
        self.given = column is not None
        self.group = options.group
        self.held_out = tuple(frozenset(system.split("-")) for system in options.hold_out)

    def of(self, keys: Sequence[str]) -> tuple[Array, Problems]:
        """(n,) uint8 of group keys, or of the names of splits."""
        if self.given:
            return splits_from(keys)
        rule = self.rule
        found = [split_of(rule.seed, key, rule.validation, rule.test) for key in keys]
        for i, key in enumerate(keys if self.held_out else ()):
            if self._is_held_out(key):
                found[i] = SPLITS.index("test")
        reason = f"no value of {self.group!r}, which decides it"
        empty = {i: reason for i, key in enumerate(keys) if not key.strip()}
        return np.array(found, dtype=np.uint8), empty

    def _is_held_out(self, formula: str) -> bool:
        """Whether all elements, two or more, are of one of the systems held out."""
        elements = set(re.findall("[A-Z][a-z]?", formula))
        return len(elements) > 1 and any(elements <= system for system in self.held_out)


def good_rows(
    columns: Columns,
    problems: Mapping[str, Problems],
    where: Callable[[int], str],
    bad: Sequence[BadRecord] = (),
    remarks: Mapping[int, str] | None = None,
) -> Batch:
    """Rows without any problem; one bad record for each of the others, naming the first column.

    remarks: on rows, kept where the row is.
    """
    reasons: dict[int, str] = {}
    for name, some in problems.items():
        for row, reason in some.items():
            reasons.setdefault(row, f"{name}: {reason}")
    named = [BadRecord(where(row), reason) for row, reason in sorted(reasons.items())]
    if reasons:
        count = max(len(values) for values in columns.values())
        keep = np.setdiff1d(np.arange(count), np.fromiter(reasons, np.int64))
        columns = {name: _take(values, keep) for name, values in columns.items()}
    said = [
        BadRecord(where(row), text) for row, text in (remarks or {}).items() if row not in reasons
    ]
    return Batch(columns, (*bad, *named), remarks=tuple(said))


def _take(values: Array | Ragged, rows: Array) -> Array | Ragged:
    return values.take(rows) if isinstance(values, Ragged) else values.take(rows, axis=0)


def with_split(
    columns: dict[str, Array | Ragged],
    problems: dict[str, Problems],
    splits: Splits,
    keys: Sequence[str],
) -> None:
    """Add the rows' split, and what is wrong with it."""
    columns[SPLIT.name], problems[SPLIT.name] = splits.of(keys)
