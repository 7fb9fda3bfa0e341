"""A task bound to its data: scaled targets, augmentation, and a check that both belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from dmi_hpc.config import DataConfig
from dmi_hpc.data.manifest import Field
from dmi_hpc.data.ranges import Rows
from dmi_hpc.data.reader import ShardSet, Verify
from dmi_hpc.data.sampler import Shuffle
from dmi_hpc.data.stage import find_staged
from dmi_hpc.errors import DataError
from dmi_hpc.tasks.base import Array, Fields, Task


class TargetScale(BaseModel):
    """Target to network units: (transform(y) - mean) / std, from the training rows only."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transform: Literal["identity", "log"]
    mean: float
    std: float

    @classmethod
    def of(cls, target: Array, transform: Literal["identity", "log"]) -> TargetScale:
        if transform == "log" and (target <= 0).any():
            raise DataError(f"a log-scaled target must be positive, found {target.min():.4g}")
        values = np.log(target) if transform == "log" else target
        std = float(values.std())
        if not std > 0:
            raise DataError(f"the target is constant ({values[0]:.4g}) over the training rows")
        return cls(transform=transform, mean=float(values.mean()), std=std)

    def scale(self, target: Array) -> Array:
        values = np.log(target) if self.transform == "log" else target
        return np.asarray((values - self.mean) / self.std, dtype=np.float32)

    def unscale(self, output: Array) -> Array:
        values = np.asarray(output, dtype=np.float64) * self.std + self.mean
        return np.exp(values) if self.transform == "log" else values


@dataclass(frozen=True)
class Problem:
    """What the trainer needs: rows of each split, network inputs, scaled targets."""

    task: Task
    shards: ShardSet
    train_rows: Rows | Array  # (n,) int64
    scale: TargetScale
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
        rows: Rows | Array = shards.rows("train")
        target = shards.gather(task.target_field, rows).astype(np.float64)
        keep = task.in_training(target)
        if not keep.all():
            rows, target = np.asarray(rows)[keep], target[keep]
        if len(rows) < 2:
            raise DataError(
                f"{path}: {len(rows)} training rows ({len(keep)} before the task's own choice among "
                "them), a network needs at least 2. Make a larger set, smaller shares of the other "
                "splits, or a wider train_range"
            )
        for name in ("validation", "test"):
            if not shards.manifest.split_rows.get(name):
                raise DataError(
                    f"{path}: the {name} split is empty, of {len(shards)} rows in all. Make the set "
                    f"again with more rows or a larger share '{name}'"
                )
        _check_inputs(task, shards, rows[:1])
        try:
            scale = TargetScale.of(target, task.quantity.transform)
        except DataError as error:
            raise DataError(f"{path}: field {task.target_field}: {error}") from None
        shuffle = None if reading.shuffle == "auto" else reading.shuffle
        return cls(task, shards, rows, scale, shuffle)

    @property
    def fields(self) -> tuple[str, ...]:
        return (*self.task.input_fields, self.task.target_field)

    def target(self, fields: Fields) -> Array:
        """(n,) float64, field units."""
        return np.asarray(fields[self.task.target_field], dtype=np.float64)

    def split(self, name: Literal["train", "validation", "test"]) -> tuple[Fields, Array]:
        """All fields and the target of one split, in memory (for baselines and reports)."""
        rows = self.train_rows if name == "train" else self.shards.rows(name)
        fields = self.shards.fields(self.fields, rows)
        return fields, self.target(fields)


def _check_fields(task: Task, shards: ShardSet) -> None:
    """Raise DataError unless the task's fields are there and its target is one number a row."""
    have = {field.name: field for field in shards.manifest.fields}
    missing = [name for name in (*task.input_fields, task.target_field) if name not in have]
    if missing:
        raise DataError(
            f"{shards.path}: task '{task.name}' needs fields {', '.join(missing)}; found "
            f"{', '.join(sorted(have))}, as made for task '{shards.manifest.plan.task}'. Choose another "
            "set, or that task"
        )
    target = have[task.target_field]
    if not target.numeric or target.axis is not None or target.shape:
        raise DataError(
            f"{shards.path}: field {target.name}, the target of task '{task.name}': found "
            f"{_kind(target)}, expected one number a row. Make the set again with one column as the "
            "target, or choose another set"
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
