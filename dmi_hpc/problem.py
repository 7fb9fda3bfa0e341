"""A task bound to its data: scaled targets, augmentation, and a check that both belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dmi_hpc.config import DataConfig
from dmi_hpc.data.manifest import Field
from dmi_hpc.data.ranges import Rows
from dmi_hpc.data.reader import ShardSet, Verify
from dmi_hpc.data.sampler import Shuffle
from dmi_hpc.data.stage import find_staged
from dmi_hpc.errors import DataError
from dmi_hpc.targets import Scale, scale_of
from dmi_hpc.tasks.base import Array, Fields, Task


@dataclass(frozen=True)
class Problem:
    """What the trainer needs: rows of each split, network inputs, scaled targets."""

    task: Task
    shards: ShardSet
    train_rows: Rows | Array  # (n,) int64
    scale: Scale
    shuffle: Shuffle | None = None  # of training; None: what suits the storage

    @classmethod
    def open(
        cls,
        task: Task,
        path: Path,
        *,
        verify: Verify = "open",
        reading: DataConfig | None = None,
        processes_on_node: int = 1,
    ) -> Problem:
        """Open the shard set at `path`, or its staged copy.

        reading: back end and shuffle, if not what suits the storage. processes_on_node: that read
        it. Raises DataError if it is another task's: fields are missing, or of a shape or type that
        the task cannot use. One row goes through `task.inputs` for that.
        """
        reading = reading or DataConfig()
        shards = ShardSet.open(
            find_staged(path),
            verify=verify,
            backend=reading.backend,
            processes_on_node=processes_on_node,
        )
        _check_fields(task, shards)
        rows, targets = _to_learn_from(task, shards, reading.train_rows)
        for name in ("validation", "test"):
            if not shards.manifest.split_rows.get(name):
                raise DataError(
                    f"{path}: the {name} split is empty, of {len(shards)} rows in all. Make the set "
                    f"again with more rows or a larger share '{name}'"
                )
        _check_inputs(task, shards, rows[:1])
        try:
            scale = scale_of(targets, [q.transform for q in task.quantities], task.target_fields)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        shuffle = None if reading.shuffle == "auto" else reading.shuffle
        return cls(task, shards, rows, scale, shuffle)

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.task.input_fields, *self.task.label_fields)

    def target(self, fields: Fields) -> Array:
        """(n,) float64, field units; (n, k) of several targets."""
        columns = [np.asarray(fields[name], dtype=np.float64) for name in self.task.target_fields]
        return columns[0] if len(columns) == 1 else np.stack(columns, axis=1)

    def split(self, name: Literal["train", "validation", "test"]) -> tuple[Fields, Array]:
        """All fields and the target of one split, in memory (for baselines and reports)."""
        rows = self.train_rows if name == "train" else self.shards.rows(name)
        fields = self.shards.fields(self.fields, rows)
        return fields, self.target(fields)


def _to_learn_from(
    task: Task, shards: ShardSet, most: int | None
) -> tuple[Rows | Array, list[Array]]:
    """Training rows, at most so many, and each target (n,) of them. Smaller choices are part of larger
    ones. Raises DataError if too few are left."""
    rows: Rows | Array = shards.rows("train")
    targets = [shards.gather(name, rows).astype(np.float64) for name in task.target_fields]
    keep = task.in_training(targets[0]) & ~np.all(np.isnan(targets), axis=0)
    if most is not None and most < keep.sum():
        chosen = np.flatnonzero(keep)
        order = np.random.default_rng(0).permutation(len(chosen))
        keep = np.zeros(len(keep), dtype=bool)
        keep[chosen[order[:most]]] = True
    if not keep.all():
        rows, targets = np.asarray(rows)[keep], [target[keep] for target in targets]
    if len(rows) < 2:
        raise DataError(
            f"{shards.path}: {len(rows)} training rows ({len(keep)} before the task's own choice among "
            "them), a network needs at least 2. Make a larger set, smaller shares of the other "
            "splits, or a wider train_range"
        )
    return rows, targets


def _check_fields(task: Task, shards: ShardSet) -> None:
    """Raise DataError unless the task's fields are there and each target is one number a row."""
    have = {field.name: field for field in shards.manifest.fields}
    missing = [name for name in (*task.input_fields, *task.label_fields) if name not in have]
    if missing:
        raise DataError(
            f"{shards.path}: task '{task.name}' needs fields {', '.join(missing)}; found "
            f"{', '.join(sorted(have))}, as made for task '{shards.manifest.plan.task}'. Choose another "
            "set, or that task"
        )
    for target in (have[name] for name in task.target_fields):
        if not target.numeric or target.axis is not None or target.shape:
            raise DataError(
                f"{shards.path}: field {target.name}, the target of task '{task.name}': found "
                f"{_kind(target)}, expected one number a row. Make the set again with one column as "
                "the target, or choose another set"
            )


def _check_inputs(task: Task, shards: ShardSet, row: Array) -> None:
    """Raise DataError unless `task.inputs` makes of this row, (1,), what the network takes."""
    try:
        made = task.network_inputs(shards.fields(task.input_fields, row))
    except DataError as error:
        raise DataError(f"{shards.path}: {error}") from error
    if isinstance(made, np.ndarray) and made.dtype != np.float32:
        names = ", ".join(task.input_fields)
        raise DataError(
            f"{shards.path}: inputs of task {task.name}: expected float32, found {made.dtype} from "
            f"{names}. Store {names} as float32, or convert in the task's `inputs`"
        )


def _kind(field: Field) -> str:
    """For messages: "float32, shape (8,)"."""
    kind = field.dtype if field.numeric else f"text {field.dtype}"
    shape = f", shape {field.shape}" if field.shape else ""
    return kind + shape + ("" if field.axis is None else ", of varying length")
