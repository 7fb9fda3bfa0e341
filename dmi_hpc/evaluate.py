"""Predictions and scores in field units; every row counts once at any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection, R2Score

from dmi_hpc import collectives
from dmi_hpc.problem import Problem, TargetScale
from dmi_hpc.tasks.base import Array, Fields, Task
from dmi_hpc.world import World


@dataclass(frozen=True)
class Scores:
    """mae, rmse: the quantity's unit; r2: 1 is perfect; mae_percent: of the mean |truth|.

    r2 is nan for a single row, mae_percent None where every truth is zero.
    """

    mae: float
    rmse: float
    r2: float
    mae_percent: float | None


def score(predicted: Array, truth: Array) -> Scores:
    """Scores of (n,) predictions against (n,) truths, n >= 1."""
    p = torch.from_numpy(np.asarray(predicted, dtype=np.float64))
    t = torch.from_numpy(np.asarray(truth, dtype=np.float64))
    metrics = MetricCollection(
        {"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False)},
        compute_groups=False,
    ).set_dtype(torch.float64)
    # every rank holds all predictions already: nothing to reduce
    for metric in metrics.values():
        metric.sync_on_compute = False
    found = metrics(p, t)
    r2 = float("nan")
    if len(t) > 1:
        r2_metric = R2Score(sync_on_compute=False).set_dtype(torch.float64)
        r2 = float(r2_metric(p, t))
    mae, size = float(found["mae"]), float(t.abs().mean())
    return Scores(mae, float(found["rmse"]), r2, 100 * mae / size if size > 0 else None)


@torch.no_grad()
def predict_fields(
    task: Task, scale: TargetScale, module: nn.Module, fields: Fields, batch_size: int
) -> Array:
    """(n,) predictions in the quantity's unit for fields of n rows. Leaves `module` in eval mode."""
    device = next(module.parameters()).device
    module.eval()
    n = len(next(iter(fields.values())))
    outputs = []
    for start in range(0, n, batch_size):
        part = {name: values[start : start + batch_size] for name, values in fields.items()}
        inputs = torch.from_numpy(np.ascontiguousarray(task.inputs(part)))
        outputs.append(module(inputs.to(device)).squeeze(1).float().cpu().numpy())
    return scale.unscale(np.concatenate(outputs)) if outputs else np.empty(0)


def predict_rows(
    problem: Problem,
    module: nn.Module,
    rows: Array,
    batch_size: int,
    world: World,
) -> tuple[Array, Array]:
    """(predictions, truths) of `rows`, whole and in order on every rank; each rank computes a part."""
    mine = np.array_split(rows, world.size)[world.rank]
    fields = problem.shards.fields(problem.fields, mine)
    predicted = predict_fields(problem.task, problem.scale, module, fields, batch_size)
    parts = collectives.gather_objects((predicted, problem.target(fields)))
    return np.concatenate([p for p, _ in parts]), np.concatenate([t for _, t in parts])
