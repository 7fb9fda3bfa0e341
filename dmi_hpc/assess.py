"""A trained run against its baselines: scores, predictions and pictures, as files of the run."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from dmi_hpc import checkpoint, collectives
from dmi_hpc.data.manifest import SplitName, require_identity
from dmi_hpc.errors import DataError
from dmi_hpc.evaluate import Scores, predict_fields, score
from dmi_hpc.files import atomic_folder, write_json, write_text
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import BYTES, cost
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.problem import Problem, TargetScale
from dmi_hpc.run import Run
from dmi_hpc.table import csv_text
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import Array, Fields, Task
from dmi_hpc.watch import console
from dmi_hpc.world import World

BATCH_BYTES = 1e9  # activations of one batch of predictions


@dataclass(frozen=True)
class Model:
    """A trained network ready to predict."""

    task: Task
    scale: TargetScale
    module: nn.Module
    batch_size: int
    checkpoint: str
    data: str  # identity of the shard set it was trained on; "" if not recorded

    def predict(self, fields: Fields) -> Array:
        """(n,) predictions in the quantity's unit for fields of n rows."""
        return predict_fields(self.task, self.scale, self.module, fields, self.batch_size)


def batch_size_of(network: NetworkSpec) -> int:
    """Rows whose activations fill `BATCH_BYTES`; at least one."""
    return max(1, int(BATCH_BYTES / (BYTES * cost(network).activations)))


def load_model(run: Run) -> Model:
    """The run's best checkpoint, on the GPU if there is one. CheckpointError if none is whole."""
    path, meta = checkpoint.best(run.checkpoints, console().print)
    module = build(meta.network)
    checkpoint.load_weights(path, module)
    module.to(collectives.device_of(World())).eval()
    batch_size, task = batch_size_of(meta.network), make_task(meta.task)
    return Model(task, meta.scale, module, batch_size, path.name, meta.data)


def assess(run: Run, split: SplitName) -> dict[str, Any]:
    """Write evaluation.json, predictions.csv and gallery/ of `run`; returns the evaluation.

    Another split than the test split goes to evaluation-SPLIT.json and predictions-SPLIT.csv. Raises
    DataError if the data set is not the one of the training, or a prediction is not finite.
    """
    model = load_model(run)
    problem = Problem.open(model.task, run.data)
    found = problem.shards.manifest.identity
    require_identity(model.data, found, maker=f"{run.checkpoints / model.checkpoint}")
    fields, truth = problem.split(split)
    if len(truth) < 2:
        raise DataError(f"{run.data}: {len(truth)} rows in split '{split}', at least 2 are needed")
    predictions, seconds = _all_predictions(model, problem, fields)
    labels = {b.name: b.label for b in model.task.baselines()} | {"network": "Network"}
    evaluation = {
        "split": split,
        "data": found,
        "rows": len(truth),
        "quantity": model.task.quantity.name,
        "unit": model.task.quantity.unit,
        "checkpoint": model.checkpoint,
        "methods": [
            {"name": n, "label": labels[n], "seconds": seconds[n], **_plain(score(p, truth))}
            for n, p in predictions.items()
        ],
        "published": [asdict(figure) for figure in model.task.published()],
    }
    rows = np.asarray(problem.train_rows if split == "train" else problem.shards.rows(split))
    columns = (p.tolist() for p in predictions.values())
    table = zip(rows.tolist(), _labels(problem, rows), truth.tolist(), *columns, strict=True)
    text = csv_text(("row", "label", "truth", *predictions), table)
    suffix = "" if split == "test" else f"-{split}"
    write_text(run.folder / f"predictions{suffix}.csv", text)
    if split == "test":
        _gallery(run, model.task, fields, truth, predictions["network"])
    write_json(run.folder / f"evaluation{suffix}.json", evaluation)
    return evaluation


def _plain(scores: Scores) -> dict[str, float | None]:
    """For JSON, which knows no nan."""
    return {k: v if v is not None and math.isfinite(v) else None for k, v in asdict(scores).items()}


def _labels(problem: Problem, rows: Array) -> list[str]:
    name = problem.task.label_field
    if name is None:
        return [str(row) for row in rows]
    return [bytes(text).decode() for text in problem.shards.gather(name, rows)]


def _all_predictions(
    model: Model, problem: Problem, fields: Fields
) -> tuple[dict[str, Array], dict[str, float]]:
    """Predictions of the network and each baseline, and the seconds each took (fit included)."""
    train_fields, train_target = problem.split("train")
    started = time.perf_counter()
    predictions = {"network": model.predict(fields)}
    seconds = {"network": time.perf_counter() - started}
    for baseline in model.task.baselines():
        started = time.perf_counter()
        predictions[baseline.name] = np.asarray(
            baseline.predict(train_fields, train_target, fields)
        )
        seconds[baseline.name] = time.perf_counter() - started
    for name, values in predictions.items():
        if bad := int((~np.isfinite(values)).sum()):
            raise DataError(f"{name}: {bad} of {len(values)} predictions are not finite")
    return predictions, seconds


def _gallery(run: Run, task: Task, fields: Fields, truth: Array, prediction: Array) -> None:
    pictures = task.pictures(fields, truth, prediction)
    if not pictures:
        return
    with atomic_folder(run.folder / "gallery") as folder:
        for picture in pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        index = [{"file": f"{p.name}.png", "caption": p.caption} for p in pictures]
        write_json(folder / "gallery.json", index)
