"""Predictions and scores in field units; every row counts once at any number of ranks.

Rows are read ahead in batches and let go again: a split may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dmi_hpc import collectives
from dmi_hpc.data.device import to_device
from dmi_hpc.data.loader import Batch, Loader
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.ranges import Rows
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.sampler import Order
from dmi_hpc.models.graphs import (
    EnergyForces,
    Graphs,
    Inputs,
    Output,
    inputs_of,
    tensors_of,
    values_of,
)
from dmi_hpc.problem import Problem
from dmi_hpc.scores import Scorers, Scores
from dmi_hpc.targets import Scale, TargetScale
from dmi_hpc.tasks.base import Array, Fields, Task
from dmi_hpc.world import World

READ_AHEAD = 2  # threads


class Predicted(NamedTuple):
    """Some rows of a set, predicted."""

    positions: Array  # (n,) among the rows asked for
    rows: Array  # (n,) in the set
    fields: Fields  # those asked for, (n, ...) each
    values: Array  # (n,) float64, the quantity's unit; (n, k) of several, or of k classes
    forces: Array | None = None  # (atoms, 3) float64, eV/angstrom
    force_errors: Array | None = None  # the same, where the true ones came along


@dataclass(frozen=True)
class Predictor:
    """A network with what stands before it (the task) and behind it (the scale)."""

    task: Task
    scale: Scale
    module: nn.Module
    batch_size: int  # rows of one forward pass

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.no_grad()
    def of_fields(self, fields: Fields) -> Array:
        """(n,) float64 for fields of n rows; (n, k) of several quantities, or classes. Leaves the
        network in evaluation mode."""
        self.module.eval()
        n = len(next(iter(fields.values())))
        outputs = [np.empty(0, dtype=np.float32)]
        # what refers to other fields is numbered over a batch by the loader, else over its row
        size = 1 if any(isinstance(each, Ragged) for each in fields.values()) else self.batch_size
        for start in range(0, n, size):
            part = {name: part_of(each, start, start + size) for name, each in fields.items()}
            inputs = inputs_of(self._inputs(part)).to(self.device)
            outputs.append(values_of(self.module(inputs)).float().cpu().numpy())
        return self.scale.unscale(np.concatenate(outputs[1:] or outputs))

    @torch.no_grad()
    def of_rows(
        self,
        shards: ShardSet,
        rows: Rows | Array,
        world: World,
        *,
        carry: Sequence[str] = (),
        threads: int = READ_AHEAD,
    ) -> Iterator[Predicted]:
        """This rank's share of `rows`, batch by batch in their order; each row on one rank.

        carry: fields that come along. threads: that read ahead. Leaves the network in evaluation mode.
        """
        if not len(rows):
            return
        loader = Loader(
            shards,
            rows,
            tuple(dict.fromkeys((*self.task.input_fields, *carry))),
            Order(seed=0, rows=len(rows), shuffle="none"),
            batch_size=self.batch_size * world.size,
            prepare=self._prepare,
            rank=world.rank,
            size=world.size,
            threads=threads,
            pin=self.device.type == "cuda",
        )
        self.module.eval()
        for batch, tensors in to_device(loader.epoch(0), self.device):
            inputs = inputs_of(tensors)
            yield self._predicted(batch, self.module(inputs), inputs, carry)

    def _prepare(self, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        return batch, self._inputs(batch.fields)

    def _inputs(self, fields: Fields) -> dict[str, Tensor]:
        made = self.task.network_inputs(fields)
        return tensors_of(
            made.astype(np.float32, copy=False) if isinstance(made, np.ndarray) else made
        )

    def _predicted(
        self, batch: Batch, output: Output, inputs: Inputs, carry: Sequence[str]
    ) -> Predicted:
        real = int(np.count_nonzero(batch.weights))  # padding is at the end
        fields = {name: batch.fields[name][:real] for name in carry if name in self._rowwise(batch)}
        values = self.scale.unscale(values_of(output)[:real].float().cpu().numpy())
        found = Predicted(batch.positions[:real], batch.rows[:real], fields, values)
        if not isinstance(output, EnergyForces):
            return found
        assert isinstance(inputs, Graphs) and isinstance(self.scale, TargetScale)
        atoms = int(inputs.node_offsets[real])
        forces = self.scale.std * output.forces[:atoms].double().cpu().numpy()
        if inputs.forces is None:
            return found._replace(forces=forces)
        errors = forces - inputs.forces[:atoms].double().cpu().numpy()
        return found._replace(forces=forces, force_errors=errors)

    @staticmethod
    def _rowwise(batch: Batch) -> list[str]:
        return [name for name, values in batch.fields.items() if not isinstance(values, Ragged)]


def evaluate_rows(
    problem: Problem,
    module: nn.Module,
    rows: Rows | Array,
    batch_size: int,
    world: World,
    *,
    threads: int = READ_AHEAD,
) -> Scores:
    """Scores of `rows`, at least one, the same on every rank; each rank computes a part of them.

    Collective. batch_size: of a rank's forward passes. threads: of a rank, that read ahead.
    """
    task = problem.task
    predictor = Predictor(task, problem.scale, module, batch_size)
    scorers = Scorers(problem.scale, forces=task.force_field is not None)
    fields = task.label_fields
    for part in predictor.of_rows(problem.shards, rows, world, carry=fields, threads=threads):
        scorers.update(part.values, problem.target(part.fields), part.force_errors)
    return scorers.scores(lambda sums: collectives.sum_(sums.to(predictor.device)).cpu())


def part_of(values: Any, start: int, stop: int) -> Any:
    """Some of the rows."""
    return values.take(np.arange(start, stop)) if isinstance(values, Ragged) else values[start:stop]
