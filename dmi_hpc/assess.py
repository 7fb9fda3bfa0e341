"""A trained run against its baselines: scores, predictions and pictures, as files of the run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import nn

from dmi_hpc import checkpoint
from dmi_hpc.errors import DataError
from dmi_hpc.evaluate import Scores, predict_fields, score
from dmi_hpc.files import atomic_folder, write_json, write_text
from dmi_hpc.models.build import build
from dmi_hpc.problem import Problem, TargetScale
from dmi_hpc.run import Run
from dmi_hpc.table import csv_text
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import Array, Fields, Task

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class Model:
    """A trained network ready to predict."""

    task: Task
    scale: TargetScale
    module: nn.Module
    checkpoint: str


def load_model(run: Run) -> Model:
    """The run's best checkpoint. Raises CheckpointError if there is none or it is torn."""
    path, meta = checkpoint.best(run.checkpoints)
    module = build(meta.network)
    checkpoint.load_weights(path, module)
    module.eval()
    return Model(make_task(meta.task), meta.scale, module, path.name)


def assess(run: Run, split: Literal["train", "validation", "test"]) -> dict[str, Any]:
    """Write evaluation.json, predictions.csv and gallery/ of `run`; returns the evaluation."""
    model = load_model(run)
    problem = Problem.open(model.task, run.data)
    fields, truth = problem.split(split)
    if len(truth) < 2:
        raise DataError(f"{run.data}: {len(truth)} rows in split '{split}', at least 2 are needed")
    predictions, seconds = _all_predictions(model, problem, fields)
    labels = {b.name: b.label for b in model.task.baselines()} | {"network": "Network"}
    scores: Mapping[str, Scores] = {n: score(p, truth) for n, p in predictions.items()}
    evaluation = {
        "split": split,
        "rows": len(truth),
        "quantity": model.task.quantity.name,
        "unit": model.task.quantity.unit,
        "checkpoint": model.checkpoint,
        "methods": [
            {"name": n, "label": labels[n], "seconds": seconds[n], **asdict(s)}
            for n, s in scores.items()
        ],
        "published": [asdict(figure) for figure in model.task.published()],
    }
    rows = problem.train_rows if split == "train" else problem.shards.rows(split)
    columns = (p.tolist() for p in predictions.values())
    table = zip(rows.tolist(), _labels(problem, rows), truth.tolist(), *columns, strict=True)
    text = csv_text(("row", "label", "truth", *predictions), table)
    write_text(run.folder / "predictions.csv", text)
    _gallery(run, model.task, fields, truth, predictions["network"])
    write_json(run.folder / "evaluation.json", evaluation)
    return evaluation


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
    predictions = {
        "network": predict_fields(model.task, model.scale, model.module, fields, EVALUATION_BATCH)
    }
    seconds = {"network": time.perf_counter() - started}
    for baseline in model.task.baselines():
        started = time.perf_counter()
        predictions[baseline.name] = np.asarray(
            baseline.predict(train_fields, train_target, fields)
        )
        seconds[baseline.name] = time.perf_counter() - started
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
