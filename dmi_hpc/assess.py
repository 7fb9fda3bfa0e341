"""A trained run against its baselines: scores, predictions and pictures, as files of the run."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import psutil
import torch

from dmi_hpc import collectives
from dmi_hpc.data.manifest import SplitName, require_identity
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.ranges import Rows
from dmi_hpc.errors import DataError, together
from dmi_hpc.evaluate import evaluate_rows
from dmi_hpc.files import atomic_folder, write_json, writing
from dmi_hpc.groups import Groups
from dmi_hpc.predict import Model, load_model
from dmi_hpc.problem import Problem
from dmi_hpc.run import Run
from dmi_hpc.scores import Scores, score
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
        problem = Problem.open(
            model.task,
            run.data,
            verify="open" if world.is_first else "none",
            reading=run.recipe.data,  # baselines learn from the rows that the network learnt from
        )
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
    forces = None
    if model.task.force_field is not None:
        forces = evaluate_rows(problem, model.module, rows, model.batch_size, world)
    seconds = time.perf_counter() - started
    evaluation: dict[str, Any] = {}
    with together(share), writing(run.folder), collectives.busy("baselines"):
        if world.is_first:
            numbers = np.asarray(rows)
            at = _Evaluating(
                run, split, model, problem, numbers, network, seconds, network_only, forces
            )
            evaluation = _write(at)
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
    """(n,) float64 of all rows, (n, k) of k outputs: this rank's predictions, and zeros where other
    ranks have theirs."""
    outputs = model.network.outputs
    shape = (len(rows),) if outputs == 1 else (len(rows), outputs)
    found = torch.zeros(shape, dtype=torch.float64)
    for part in model.of_rows(problem.shards, rows, world):
        found[torch.from_numpy(part.positions)] = torch.from_numpy(part.values)
    return found


@dataclass(frozen=True)
class _Evaluating:
    """What is evaluated: rows of a split, and what the network made of them."""

    run: Run
    split: SplitName
    model: Model
    problem: Problem
    rows: Array  # (n,)
    network: Array  # (n,), or (n, k)
    seconds: float
    network_only: bool
    forces: Scores | None

    def values(self, number: int) -> Array:
        """Predictions of one quantity."""
        return self.network[:, number] if len(self.model.task.quantities) > 1 else self.network


def _write(at: _Evaluating) -> dict[str, Any]:
    """All files of the evaluation; what it found."""
    task, problem = at.model.task, at.problem
    fields: Fields = {}
    if not at.network_only:
        fields = problem.shards.fields(task.input_fields, at.rows)
    truths = problem.target(problem.shards.fields(task.target_fields, at.rows))
    found = []
    columns = truths.reshape(len(at.rows), -1).T
    for number, (name, truth) in enumerate(zip(task.target_fields, columns, strict=True)):
        known = ~np.isnan(truth)
        if not known.any():
            raise DataError(f"{problem.shards.path}: {name} is known of no row of '{at.split}'")
        found.append(_of_quantity(at, number, fields, truth, known))
        if number == 0 and at.split == "test" and not at.network_only and known.all():
            _gallery(at.run, task, fields, truth, at.values(0))
    evaluation = {
        "split": at.split,
        "data": problem.shards.manifest.identity,
        "checkpoint": at.model.checkpoint,
        **found[0],
        "published": [asdict(figure) for figure in task.published()],
        **({"others": found[1:]} if len(found) > 1 else {}),
    }
    write_json(at.run.folder / f"evaluation{_suffix(at.split)}.json", evaluation)
    return evaluation


def _of_quantity(
    at: _Evaluating, number: int, fields: Fields, truth: Array, known: Array
) -> dict[str, Any]:
    """Write the predictions of one quantity, of the rows whose truth is known, and score them."""
    task, quantity = at.model.task, at.model.task.quantities[number]
    predictions, took = {"network": at.values(number)[known]}, {"network": at.seconds}
    if not at.network_only:
        _add_baselines(at, number, _some(fields, known), predictions, took)
    for name, values in predictions.items():
        if bad := int((~np.isfinite(values)).sum()):
            raise DataError(f"{name}: {bad} of {values.size} predictions are not finite")
    labels = {b.name: b.label for b in task.baselines()} | {"network": "Network"}
    scale, truth, rows = at.model.scale.heads[number], truth[known], at.rows[known]
    if task.group_field is not None:
        groups = Groups(at.problem.shards.gather(task.group_field, rows))
        predictions = {name: groups.least(values) for name, values in predictions.items()}
        truth, rows = groups.least(truth), rows[groups.first]
    scores = {name: score(values, truth, scale) for name, values in predictions.items()}
    if at.forces is not None:
        scores["network"] = at.forces
    methods = [
        {"name": n, "label": labels[n], "seconds": took[n], **_plain(found)}
        for n, found in scores.items()
    ]
    suffix = _suffix(at.split) + (f"-{quantity.name}" if number else "")
    columns = (Column("row", "integer"), Column("label", "text"), Column("truth", "real"))
    shown = {name: _shown(values) for name, values in predictions.items()}
    with table_file(
        at.run.folder / f"predictions{suffix}.csv",
        (*columns, *(Column(name, "real") for name in shown)),
    ) as append:
        append({"row": rows, "label": _labels(at.problem, rows), "truth": truth, **shown})
    return {
        "quantity": quantity.name,
        "unit": quantity.unit,
        "transform": scale.transform,
        "rows": len(truth),
        "methods": methods,
    }


def _suffix(split: SplitName) -> str:
    return "" if split == "test" else f"-{split}"


def _shown(values: Array) -> Array:
    """One number a row: of classes, the most probable."""
    return values if values.ndim == 1 else values.argmax(axis=1).astype(np.float64)


def _some(fields: Fields, chosen: Array) -> Fields:
    """Fields of some rows; chosen: (n,) bool."""
    if chosen.all():
        return fields
    rows = np.flatnonzero(chosen)
    return {name: _rows_of(values, rows) for name, values in fields.items()}


def _rows_of(values: Any, rows: Array) -> Any:
    return values.take(rows) if isinstance(values, Ragged) else values[rows]


def _plain(scores: Scores) -> dict[str, float | None]:
    """For JSON, which knows no nan; without what this kind of target does not have."""
    found = asdict(scores)
    always = ("mae", "rmse", "r2", "mae_percent")
    return {
        name: value if value is not None and math.isfinite(value) else None
        for name, value in found.items()
        if name in always or value is not None
    }


def _labels(problem: Problem, rows: Array) -> list[str]:
    name = problem.task.label_field
    if name is None:
        return [str(row) for row in rows]
    return [bytes(text).decode() for text in problem.shards.gather(name, rows)]


def _add_baselines(
    at: _Evaluating,
    number: int,
    fields: Fields,
    predictions: dict[str, Array],
    seconds: dict[str, float],
) -> None:
    """Predictions of each baseline for `fields`, and the seconds each took (fit included)."""
    train_fields, train_targets = at.problem.split("train")
    target = train_targets if train_targets.ndim == 1 else train_targets[:, number]
    known = ~np.isnan(target)
    train_fields, target = _some(train_fields, known), target[known]
    for baseline in at.model.task.baselines():
        started = time.perf_counter()
        found = baseline.predict(train_fields, target, fields)
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
