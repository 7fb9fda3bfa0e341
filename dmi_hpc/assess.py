"""A trained run against its baselines: scores, predictions and pictures, as files of the run."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import psutil
import torch

from dmi_hpc import collectives
from dmi_hpc.data.manifest import SplitName, require_identity
from dmi_hpc.data.ranges import Rows
from dmi_hpc.errors import DataError, together
from dmi_hpc.evaluate import Scores, score
from dmi_hpc.files import atomic_folder, write_json, writing
from dmi_hpc.predict import Model, load_model
from dmi_hpc.problem import Problem
from dmi_hpc.run import Run
from dmi_hpc.table import Column, table_file
from dmi_hpc.tasks.base import Array, Fields, Task
from dmi_hpc.world import World


def assess(
    run: Run, split: SplitName, world: World | None = None, *, network_only: bool = False
) -> dict[str, Any]:
    """Write evaluation.json, predictions.csv and gallery/ of `run`; returns the evaluation.

    Collective: each rank predicts a part of the rows, rank 0 does all else. Another split than the
    test split goes to evaluation-SPLIT.json and predictions-SPLIT.csv. network_only: no baselines and
    no pictures, which need the rows in memory. Raises DataError if the data set is not the one of the
    training, a prediction is not finite, or memory is too small for the baselines.
    """
    world = world or World()
    device, share = collectives.device_of(world), collectives.gather_objects
    with together(share):
        model = load_model(run, device)
        problem = Problem.open(model.task, run.data, verify="open" if world.is_first else "none")
        require_identity(
            model.data,
            problem.shards.manifest.identity,
            maker=f"{run.checkpoints / model.checkpoint}",
        )
        rows = problem.train_rows if split == "train" else problem.shards.rows(split)
        if len(rows) < 2:
            raise DataError(
                f"{run.data}: {len(rows)} rows in split '{split}', at least 2 are needed"
            )
        if not network_only and world.is_first:
            _require_memory(problem, len(problem.train_rows) + len(rows))
        started = time.perf_counter()
        share_of_rank = _predictions(model, problem, rows, world)
    network = collectives.sum_(share_of_rank.to(device)).cpu().numpy()
    seconds = time.perf_counter() - started
    evaluation: dict[str, Any] = {}
    with together(share), writing(run.folder), collectives.busy("baselines"):
        if world.is_first:
            evaluation = _write(run, split, (model, problem, rows), network, seconds, network_only)
    return dict(share(evaluation)[0])


def _require_memory(problem: Problem, rows: int) -> None:
    """Raises DataError if so many rows, which the baselines need at once, are too many."""
    needed = problem.shards.row_bytes(problem.fields) * rows
    free = psutil.virtual_memory().available
    if needed > free:
        raise DataError(
            f"{problem.shards.path}: baselines need {rows:,} rows in memory, {needed / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free. --network-only scores the network alone"
        )


def _predictions(model: Model, problem: Problem, rows: Rows | Array, world: World) -> torch.Tensor:
    """(n,) float64 of all rows: this rank's predictions, and zeros where other ranks have theirs."""
    found = torch.zeros(len(rows), dtype=torch.float64)
    for part in model.of_rows(problem.shards, rows, world):
        found[torch.from_numpy(part.positions)] = torch.from_numpy(part.values)
    return found


def _write(
    run: Run,
    split: SplitName,
    of: tuple[Model, Problem, Rows | Array],
    network: Array,
    seconds: float,
    network_only: bool,
) -> dict[str, Any]:
    """All files of the evaluation; what it found."""
    model, problem, rows = of
    task, numbers = model.task, np.asarray(rows)
    truth = problem.target(problem.shards.fields((task.target_field,), numbers))
    predictions, took = {"network": network}, {"network": seconds}
    fields: Fields = {}
    if not network_only:
        fields = problem.shards.fields(task.input_fields, numbers)
        _add_baselines(problem, fields, predictions, took)
    for name, values in predictions.items():
        if bad := int((~np.isfinite(values)).sum()):
            raise DataError(f"{name}: {bad} of {len(values)} predictions are not finite")
    labels = {b.name: b.label for b in task.baselines()} | {"network": "Network"}
    evaluation = {
        "split": split,
        "data": problem.shards.manifest.identity,
        "rows": len(truth),
        "quantity": task.quantity.name,
        "unit": task.quantity.unit,
        "checkpoint": model.checkpoint,
        "methods": [
            {"name": n, "label": labels[n], "seconds": took[n], **_plain(score(p, truth))}
            for n, p in predictions.items()
        ],
        "published": [asdict(figure) for figure in task.published()],
    }
    suffix = "" if split == "test" else f"-{split}"
    columns = (Column("row", "integer"), Column("label", "text"), Column("truth", "real"))
    methods = tuple(Column(name, "real") for name in predictions)
    with table_file(run.folder / f"predictions{suffix}.csv", (*columns, *methods)) as append:
        names = _labels(problem, numbers)
        append({"row": numbers, "label": names, "truth": truth, **predictions})
    if split == "test" and not network_only:
        _gallery(run, task, fields, truth, network)
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


def _add_baselines(
    problem: Problem, fields: Fields, predictions: dict[str, Array], seconds: dict[str, float]
) -> None:
    """Predictions of each baseline for `fields`, and the seconds each took (fit included)."""
    train_fields, train_target = problem.split("train")
    for baseline in problem.task.baselines():
        started = time.perf_counter()
        found = baseline.predict(train_fields, train_target, fields)
        predictions[baseline.name] = np.asarray(found)
        seconds[baseline.name] = time.perf_counter() - started


def _gallery(run: Run, task: Task, fields: Fields, truth: Array, prediction: Array) -> None:
    pictures = task.pictures(fields, truth, prediction)
    if not pictures:
        return
    with atomic_folder(run.folder / "gallery") as folder:
        for picture in pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        index = [{"file": f"{p.name}.png", "caption": p.caption} for p in pictures]
        write_json(folder / "gallery.json", index)
