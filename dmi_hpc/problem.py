"""A task bound to its data: scaled targets, augmentation, and a check that both belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from dmi_hpc.data.sampler import mix
from dmi_hpc.data.shards import ShardSet
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
    train_rows: Array  # (n,) int64
    scale: TargetScale

    @classmethod
    def open(cls, task: Task, path: Path, *, verify: bool = True) -> Problem:
        """Open the shard set at `path`; raises DataError if it is another task's or misses fields."""
        shards = ShardSet.open(path, verify=verify)
        have = {field.name for field in shards.manifest.fields}
        missing = [n for n in (*task.input_fields, task.target_field) if n not in have]
        if missing:
            raise DataError(
                f"{path}: the task needs fields {', '.join(missing)}; found {', '.join(sorted(have))}"
            )
        rows = shards.rows("train")
        target = shards.gather(task.target_field, rows).astype(np.float64)
        rows, target = rows[keep := task.in_training(target)], target[keep]
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
        return cls(task, shards, rows, TargetScale.of(target, task.quantity.transform))

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


def random_bits(seed: int, epoch: int, positions: Array) -> Array:
    """(n,) uint64, uniform: a pure function of seed, epoch and position (SplitMix64)."""
    words = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    words += np.uint64((seed * 0xD1342543DE82EF95 + epoch * 0x2545F4914F6CDD1D) & (2**64 - 1))
    return mix(words)
