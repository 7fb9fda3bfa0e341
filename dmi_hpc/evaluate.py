"""Predictions and scores in field units; every row counts once at any number of ranks.

Rows are read ahead in batches and let go again: a split may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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
from dmi_hpc.models.graphs import Inputs, inputs_of, tensors_of
from dmi_hpc.problem import Problem, TargetScale
from dmi_hpc.tasks.base import Array, Fields, Task
from dmi_hpc.world import World

if TYPE_CHECKING:
    from torchmetrics import Metric

READ_AHEAD = 2  # threads
_HELD_ROWS = 2**16  # that the metrics take at once: each call of theirs costs as much as a batch


@dataclass(frozen=True)
class Scores:
    """mae, rmse: the quantity's unit; r2: 1 is perfect; mae_percent: of the mean |truth|.

    r2 is nan for a single row, mae_percent None where every truth is zero.
    """

    mae: float
    rmse: float
    r2: float
    mae_percent: float | None


class Scorer:
    """Sums of what was predicted so far, from which scores follow; sums of ranks add up.

    centre, spread: typical truth and deviation, the same on all ranks. R2 does not depend on them,
    but what torchmetrics takes for a constant truth does, and so do its rounding errors.
    """

    def __init__(self, centre: float = 0.0, spread: float = 1.0) -> None:
        # imports matplotlib and scipy.signal, 1.4 s: a training need not wait for it to begin
        from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score

        self._centre, self._spread = centre, spread
        # `scores` adds all sums up in one collective, or in none
        alone: dict[str, Any] = {"sync_on_compute": False}
        self._mae, self._mse = MeanAbsoluteError(**alone), MeanSquaredError(**alone)
        self._size = MeanAbsoluteError(**alone)  # mean |truth| is the error of predicting zero
        self._r2 = R2Score(**alone)
        for metric in self._metrics:
            metric.set_dtype(torch.float64)
        # a rank without rows has sums, too: zeros
        self._held, self._rows = [(np.empty(0), np.empty(0))], 0

    @property
    def _metrics(self) -> tuple[Metric, ...]:
        return self._mae, self._mse, self._size, self._r2

    def update(self, predicted: Array, truth: Array) -> None:
        """Count (n,) predictions of (n,) truths."""
        self._held.append((predicted, truth))
        self._rows += len(truth)
        if self._rows >= _HELD_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        p, t = (
            torch.from_numpy(np.concatenate(part).astype(np.float64, copy=False))
            for part in zip(*self._held, strict=True)
        )
        self._mae.update(p, t)
        self._mse.update(p, t)
        self._size.update(torch.zeros_like(t), t)
        self._r2.update((p - self._centre) / self._spread, (t - self._centre) / self._spread)
        self._held, self._rows = [], 0

    def scores(self, add_up: Callable[[Tensor], Tensor] = lambda sums: sums) -> Scores:
        """Scores of all rows counted, at least one. add_up: of the ranks, (k,) float64 on the CPU."""
        self._flush()
        places = [(metric, name) for metric in self._metrics for name in metric.metric_state]
        states = [getattr(metric, name) for metric, name in places]  # one number each
        totals = add_up(torch.cat([state.double().reshape(1) for state in states]))
        for (metric, name), state, total in zip(places, states, totals, strict=True):
            setattr(metric, name, total.reshape(state.shape))
        assert self._mae.total > 0, "scores of no rows"
        r2 = float(self._r2.compute()) if self._mae.total > 1 else float("nan")
        mae, size = float(self._mae.compute()), float(self._size.compute())
        rmse = float(self._mse.compute()) ** 0.5
        return Scores(mae, rmse, r2, 100 * mae / size if size > 0 else None)


def score(predicted: Array, truth: Array) -> Scores:
    """Scores of (n,) predictions against (n,) truths, n >= 1, by this process alone."""
    scorer = Scorer(float(np.mean(truth)), float(np.std(truth)) or 1.0)
    scorer.update(np.asarray(predicted), np.asarray(truth))
    return scorer.scores()


class Predicted(NamedTuple):
    """Some rows of a set, predicted."""

    positions: Array  # (n,) among the rows asked for
    rows: Array  # (n,) in the set
    fields: Fields  # those asked for, (n, ...) each
    values: Array  # (n,) float64, the quantity's unit


@dataclass(frozen=True)
class Predictor:
    """A network with what stands before it (the task) and behind it (the scale)."""

    task: Task
    scale: TargetScale
    module: nn.Module
    batch_size: int  # rows of one forward pass

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @torch.no_grad()
    def of_fields(self, fields: Fields) -> Array:
        """(n,) float64 for fields of n rows. Leaves the network in evaluation mode."""
        self.module.eval()
        n = len(next(iter(fields.values())))
        outputs = [np.empty(0, dtype=np.float32)]
        # what refers to other fields is numbered over a batch by the loader, else over its row
        size = 1 if any(isinstance(each, Ragged) for each in fields.values()) else self.batch_size
        for start in range(0, n, size):
            part = {name: _part(each, start, start + size) for name, each in fields.items()}
            inputs = inputs_of(self._inputs(part)).to(self.device)
            outputs.append(self._output(inputs).cpu().numpy())
        return self.scale.unscale(np.concatenate(outputs))

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
            yield self._predicted(batch, self._output(inputs_of(tensors)), carry)

    def _prepare(self, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        return batch, self._inputs(batch.fields)

    def _inputs(self, fields: Fields) -> dict[str, Tensor]:
        made = self.task.network_inputs(fields)
        return tensors_of(
            made.astype(np.float32, copy=False) if isinstance(made, np.ndarray) else made
        )

    def _output(self, inputs: Inputs) -> Tensor:
        output: Tensor = self.module(inputs)
        return output.squeeze(1).float()

    def _predicted(self, batch: Batch, output: Tensor, carry: Sequence[str]) -> Predicted:
        real = int(np.count_nonzero(batch.weights))  # padding is at the end
        fields = {name: batch.fields[name][:real] for name in carry}
        values = self.scale.unscale(output[:real].cpu().numpy())
        return Predicted(batch.positions[:real], batch.rows[:real], fields, values)


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
    predictor = Predictor(problem.task, problem.scale, module, batch_size)
    centre, above = problem.scale.unscale(np.array([0.0, 1.0])).tolist()
    scorer = Scorer(centre, above - centre)
    target = problem.task.target_field
    for part in predictor.of_rows(problem.shards, rows, world, carry=(target,), threads=threads):
        scorer.update(part.values, problem.target(part.fields))
    return scorer.scores(lambda sums: collectives.sum_(sums.to(predictor.device)).cpu())


def _part(values: Any, start: int, stop: int) -> Any:
    """Some of the rows."""
    return values.take(np.arange(start, stop)) if isinstance(values, Ragged) else values[start:stop]
