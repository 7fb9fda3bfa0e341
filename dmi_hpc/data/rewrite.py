"""A new set from an old one: other splits, shuffled rows, compression, another size of shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import JsonValue

from dmi_hpc.data.build import ROWS_PER_CALL, Alone, build
from dmi_hpc.data.manifest import (
    SPLIT,
    BuildPlan,
    Compression,
    Manifest,
    SplitRule,
    split_of,
)
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.reader import Backend, ShardSet
from dmi_hpc.data.storage import decoded_bytes
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]

ROW = "row number"  # the key of rows that are split each by itself; no field can have this name
_CALL_BYTES = 1 << 22  # asked of the source at once


@dataclass(frozen=True)
class Changes:
    """What the new set shall have of its own; None: as in the source.

    validation, test: shares of new splits, both or none. group: dense field whose equal values share
    a split, or ROW. shuffle_seed: rows come in the pseudo-random order of this seed.
    """

    validation: float | None = None
    test: float | None = None
    split_seed: int = 0
    group: str | None = None
    shuffle_seed: int | None = None
    compression: Compression | Literal["none"] | None = None
    rows_per_shard: int | None = None
    block_bytes: int | None = None


def _silent(rows: int) -> None:
    pass


def rewrite(
    source: ShardSet,
    target: Path,
    changes: Changes,
    *,
    processes: int = 1,
    progress: Callable[[int], None] = _silent,
) -> Manifest:
    """Make `target` from the rows of `source`; every block read is checked on the way.

    progress: called with the number of rows finished since the last call. The provenance of the new
    set names the source's identity and the changes. Interrupted, the same call continues. Raises
    DataError: the target is the source's folder or holds another set, the group field is unknown or
    ragged, new splits would tear apart rows that share one in the source; CorruptShardError.
    """
    if target.resolve() == source.path.resolve():
        raise DataError(f"{target}: a set cannot be rewritten in its own folder; choose a new one")
    plan = new_plan(source.manifest, changes)
    compressed = source.manifest.plan.compression is not None
    maker = _SourceRows(
        path=source.path.resolve(),
        names=tuple(field.name for field in plan.fields),
        rule=None if changes.validation is None else plan.split_rule,
        group=changes.group,
        # in order each block is decoded once; scattered rows need it again and again
        backend="auto" if plan.shuffled else "pread" if compressed else "mmap",
        processes=processes,
    )
    row_bytes = max(1, decoded_bytes(source.manifest) // len(source))
    rows_per_call = max(ROWS_PER_CALL, _CALL_BYTES // row_bytes)
    if plan.shuffled and compressed:
        rows_per_call = max(rows_per_call, plan.rows_per_shard)
    try:
        return build(target, plan, maker, Alone(), processes, progress, rows_per_call)
    finally:
        _close()


def new_plan(source: Manifest, changes: Changes) -> BuildPlan:
    """The plan of the new set. Raises DataError."""
    old = source.plan
    if changes.validation is not None and changes.test is not None:
        rule = _rule(source, changes, changes.validation, changes.test)
    elif changes.validation is None and changes.test is None and changes.group is None:
        rule = old.split_rule
    else:
        raise DataError("new splits need both shares: validation and test")
    compression = old.compression if changes.compression is None else changes.compression
    return BuildPlan(
        task=old.task,
        rows=source.rows,
        rows_per_shard=changes.rows_per_shard or old.rows_per_shard,
        fields=old.fields,
        split_rule=rule,
        seed=old.seed if changes.shuffle_seed is None else changes.shuffle_seed,
        shuffled=changes.shuffle_seed is not None,
        block_bytes=changes.block_bytes or old.block_bytes,
        compression=None if compression == "none" else compression,
        provenance={**old.provenance, "rewritten": [*_history(source), _entry(source, changes)]},
    )


def _history(source: Manifest) -> Sequence[JsonValue]:
    """Rewrites that the source itself has behind it."""
    before = source.plan.provenance.get("rewritten", [])
    return before if isinstance(before, list) else [before]


def _entry(source: Manifest, changes: Changes) -> dict[str, JsonValue]:
    options: dict[str, JsonValue] = {
        "validation": changes.validation,
        "test": changes.test,
        "group": changes.group,
        "shuffle_seed": changes.shuffle_seed,
    }
    kept = {name: value for name, value in options.items() if value is not None}
    return {"source": source.identity, **kept}


def _rule(source: Manifest, changes: Changes, validation: float, test: float) -> SplitRule:
    key, group = source.plan.split_rule.key, changes.group
    if group is None and key != ROW:
        raise DataError(
            f"rows of this set share a split by their {key!r}. --group FIELD keeps rows of equal "
            f'values of a field together; --group "{ROW}" splits each row by itself'
        )
    if group is not None and group != ROW:
        field = source.field(group)
        if field.axis is not None:
            raise DataError(f"field {group!r} is ragged; a group needs one value a row")
        key = f"value of field {group}"
    else:
        key = ROW
    if not (validation >= 0 <= test and validation + test <= 1):
        raise DataError(
            f"shares: found validation {validation:g} and test {test:g}, expected at least 0 and "
            "at most 1 together"
        )
    return SplitRule(seed=changes.split_seed, validation=validation, test=test, key=key)


def group_keys(values: Array) -> list[str]:
    """A text for each row, equal for equal values. values: (n, *shape)."""
    if values.dtype.kind == "S" and values.ndim == 1:
        return [text.decode(errors="backslashreplace") for text in values.tolist()]
    if values.dtype.kind in "iu" and values.ndim == 1:
        return [str(number) for number in values.tolist()]
    if values.dtype.kind == "f":
        values = values + values.dtype.type(0)  # -0.0 equals 0.0
    return [row.tobytes().hex() for row in values]


_open_sets: dict[_SourceRows, ShardSet] = {}  # of this process: each worker opens the source once


def _close() -> None:
    while _open_sets:
        _open_sets.popitem()[1].close()


@dataclass(frozen=True)
class _SourceRows:
    """Makes rows of the new set; sent to worker processes."""

    path: Path
    names: tuple[str, ...]
    rule: SplitRule | None  # None: each row keeps its split
    group: str | None
    backend: Backend
    processes: int

    def __call__(self, ids: Array) -> Mapping[str, Array | Ragged]:
        if self not in _open_sets:
            _open_sets[self] = ShardSet.open(
                self.path,
                verify="read",
                backend=self.backend,
                processes_on_node=self.processes,
            )
        rows: dict[str, Array | Ragged] = _open_sets[self].fields(self.names, ids)
        if self.rule is not None:
            rule = self.rule
            keys = group_keys(ids if self.group in (None, ROW) else np.asarray(rows[self.group]))
            splits = [split_of(rule.seed, key, rule.validation, rule.test) for key in keys]
            rows[SPLIT.name] = np.array(splits, dtype=np.uint8)
        return rows
