"""What a training is given and what it gives back: plain data, shared by those who start, watch,
save and search.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from dmi_hpc.config import TrainConfig
from dmi_hpc.meters import Step
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.world import World

if TYPE_CHECKING:
    from dmi_hpc.problem import Problem


@dataclass(frozen=True)
class Job:
    """One network to train on one problem."""

    problem: Problem
    network: NetworkSpec
    config: TrainConfig
    seed: int
    world: World = field(default_factory=World)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    checkpoints: Path | None = None
    recipe: str = ""  # fingerprint of the recipe, for its checkpoints
    saves_epochs: bool = True  # else only every `checkpoint_s`, and when it is asked to stop


@dataclass(frozen=True)
class Epoch:
    """What one epoch brought; losses in scaled units, errors in the task's unit.

    validation_error: the one that is made small, `Task.measure`.
    """

    epoch: int
    step: int
    samples: int
    train_loss: float
    validation_error: float
    validation_rmse: float
    validation_r2: float
    learning_rate: float
    seconds: float
    samples_per_s: float
    data_wait: float  # share of `seconds` that rank 0 waited for data
    validation_mae: float | None = None  # where it is only a part of the error, or none
    validation_auc: float | None = None
    validation_accuracy: float | None = None
    validation_force_mae: float | None = None


@dataclass
class Counters:
    """Progress of a training: with weights, optimiser and random states, all there is to resume."""

    epoch: int = 0  # the epoch in work
    step: int = 0  # steps done in all epochs
    loss_sum: float = 0.0  # this rank's, of the epoch in work, when it was saved
    best_error: float = math.inf
    best_epoch: int = -1
    best_step: int = -1
    averaged: int = 0  # steps in the running mean of the weights
    skipped: int = 0  # steps that were not applied, in all epochs
    skipped_rows: int = 0  # this rank's, of the epoch in work: their loss is not in loss_sum
    validation: list[float] = field(default_factory=list)  # error after each epoch


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    best_error: float
    best_epoch: int
    epochs: int
    steps: int
    reason: str  # "all epochs" or "early stop"
    parameters: int
    history: tuple[Epoch, ...]


class Observer(Protocol):
    """Who watches a training: a terminal, a metrics file, a search."""

    def on_step(self, step: Step) -> None: ...
    def on_epoch(self, epoch: Epoch) -> None: ...
    def on_event(self, event: str, values: Mapping[str, Any]) -> None:
        """Something that happened once: a decision of the engine, a checkpoint. A "message" is said."""

    def must_stop(self) -> str | None:
        """Why to write a checkpoint now and end in order: a signal, a deadline; None to go on."""
