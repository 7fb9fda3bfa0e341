"""Random shard sets with the fields of a task, and trainings of its published network on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from loading.cases import Array, field_of

from dmi_hpc.config import TrainConfig
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import Task

HELD_OUT = 64  # rows of the validation and of the test split
ELEMNET = {"name": "elemnet", "dropout": False}
CNN = {"name": "homogenization", "voxels": 51}
LEARNING_RATE = 1e-4


def write_set(folder: Path, options: Mapping[str, Any], rows: int) -> Path:
    """A set of `rows` random training rows for the task of these options."""
    from dmi_hpc.data import BuildPlan, ShardWriter, SplitRule

    task = make_task(options)
    values = _rows(task, rows + 2 * HELD_OUT)
    plan = BuildPlan(
        task=task.name,
        fields=tuple(field_of(name, array) for name, array in values.items()),
        rows_per_shard=rows + 2 * HELD_OUT,
        split_rule=SplitRule(seed=1, validation=0.0, test=0.0, key="row number"),
        seed=1,
    )
    split = np.repeat(np.array([0, 1, 2], dtype=np.uint8), [rows, HELD_OUT, HELD_OUT])
    with ShardWriter(folder, plan) as writer:
        writer.append({**values, "split": split})
    return folder


def _rows(task: Task, rows: int) -> dict[str, Array]:
    rng, (name,) = np.random.default_rng(1), task.input_fields
    if name == "fractions":
        inputs: Array = rng.dirichlet(np.full(task.input_shape[0], 0.05), rows).astype(np.float32)
    else:
        inputs = rng.integers(0, 2, (rows, *task.input_shape[1:]), dtype=np.uint8)
    return {name: inputs, task.target_field: rng.uniform(1.0, 2.0, rows)}


def network_of(task: Task, *, small: bool) -> NetworkSpec:
    """small: two layers of 64 units, nearly all of whose step is overhead, not the published one."""
    if not small:
        return task.published_network()
    layers = (Dense(units=64), Activation()) * 2
    return NetworkSpec(input_shape=task.input_shape, layers=layers)


@dataclass(frozen=True)
class Setting:
    """What all contenders of a comparison train. device: "cpu" or "cuda"; small: see network_of."""

    data: Path
    task: Mapping[str, Any]
    batch: int  # global
    small: bool = False
    device: str = "cpu"
    precision: str = "fp32"

    def problem(self) -> Problem:
        return Problem.open(make_task(self.task), self.data, verify="none")

    @property
    def network(self) -> NetworkSpec:
        return network_of(make_task(self.task), small=self.small)

    def config(self, **changes: Any) -> TrainConfig:
        """Without what the rivals leave out as well: clipping, augmentation."""
        common = {
            "epochs": 1_000_000,
            "batch_size": self.batch,
            "optimizer": "adam",
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup": 0.0,
            "loss": "mae",
            "augment": False,
            "precision": self.precision,
            "threads": 1,
        }
        return TrainConfig.model_validate({**common, **changes})
