"""Trained networks ready to predict: loaded from a run, a checkpoint or an exported folder.

from dmi_hpc import load
model = load("runs/elemnet")
model.predict({"fractions": fractions})
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike

from dmi_hpc import checkpoint, collectives
from dmi_hpc.data.manifest import MANIFEST, SPLITS, SplitName
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.stage import find_staged
from dmi_hpc.errors import DataError, RunError
from dmi_hpc.evaluate import Predictor, part_of
from dmi_hpc.export import SPEC, load_export
from dmi_hpc.groups import Groups
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import BYTES, cost
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.run import Run, open_run
from dmi_hpc.table import Column
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import Array
from dmi_hpc.watch import console
from dmi_hpc.world import World

ENSEMBLE = "ensemble.json"  # of a folder with several
BATCH_BYTES = 1e9  # activations of one batch of predictions
_DIGITS = 7  # what float32 holds


@dataclass(frozen=True)
class Model(Predictor):
    """A trained network ready to predict."""

    network: NetworkSpec
    checkpoint: str  # its name
    data: str  # identity of the shard set it was trained on; "" if not recorded
    metrics: Mapping[str, float]  # of the training, on the validation split

    def predict(self, fields: Mapping[str, ArrayLike | Ragged]) -> Array:
        """(n,) float64 predictions, in `task.quantity.unit`, for n rows; (n, k) of k quantities, or of
        the probabilities of k classes.

        fields: `task.input_fields`, (n, ...) each, as a shard set stores them. Raises DataError if
        one is missing or they do not fit the network.
        """
        wanted = self.task.input_fields
        if missing := [name for name in wanted if name not in fields]:
            raise DataError(
                f"task {self.task.name}: expected fields {', '.join(wanted)}; missing "
                f"{', '.join(missing)}, found {', '.join(fields) or 'none'}"
            )
        arrays: dict[str, Any] = {
            name: given if isinstance(given := fields[name], Ragged) else np.asarray(given)
            for name in wanted
        }
        lengths = {
            name: len(array) if isinstance(array, Ragged) or array.ndim else 0
            for name, array in arrays.items()
        }
        if len(set(lengths.values())) > 1:
            raise DataError(f"fields: expected as many rows in each, found {lengths}")
        return self.of_fields(arrays)


def load(path: Path | str, *, device: torch.device | str | None = None) -> Model:
    """The network of a run folder (its best checkpoint), a checkpoint folder, or an exported one.

    device: by default the GPU if there is one. Raises RunError if nothing of these is in `path`,
    CheckpointError if it is damaged.
    """
    folder = Path(path).resolve()
    where = collectives.device_of(World()) if device is None else torch.device(device)
    if (folder / SPEC).exists():
        spec, module = load_export(folder)
        module.to(where).eval()
        task, rows = make_task(spec.task), batch_size_of(spec.network)
        return Model(
            task, spec.scale, module, rows, spec.network, spec.checkpoint, spec.data, spec.metrics
        )
    if (folder / ENSEMBLE).exists():
        from dmi_hpc.ensemble import load_ensemble  # which loads its members by this function

        return load_ensemble(folder, where)
    if (folder / checkpoint.META).exists():
        return _of_checkpoint(folder, checkpoint.read_meta(folder), where)
    if not (folder / "run.json").exists():
        raise RunError(
            f"{folder}: expected a run folder (run.json), a checkpoint ({checkpoint.META}) or an "
            f"exported network ({SPEC}); found none of these"
        )
    return load_model(open_run(folder), where)


def load_model(run: Run, device: torch.device) -> Model:
    """The run's best checkpoint. Raises CheckpointError if none is whole."""
    return _of_checkpoint(*checkpoint.best(run.checkpoints, console().print), device)


def _of_checkpoint(path: Path, meta: checkpoint.Meta, device: torch.device) -> Model:
    module = build(meta.network)
    checkpoint.load_weights(path, module)
    module.to(device).eval()
    task, rows = make_task(meta.task), batch_size_of(meta.network)
    return Model(task, meta.scale, module, rows, meta.network, path.name, meta.data, meta.metrics)


def batch_size_of(network: NetworkSpec) -> int:
    """Rows whose activations fill `BATCH_BYTES`; at least one."""
    return max(1, int(BATCH_BYTES / (BYTES * cost(network).activations)))


@dataclass(frozen=True)
class Table:
    """Predictions as they come: what the columns are, how many rows, and the rows in blocks."""

    columns: tuple[Column, ...]
    rows: int
    blocks: Iterator[Mapping[str, Any]]


def predict_inputs(model: Model, path: Path, split: SplitName | Literal["all"] = "all") -> Table:
    """Predictions of a user's file, or of a shard set: row by row, in order, each once.

    A set may be larger than memory; files are read whole, by the task. A TOML file names elements,
    all compositions of which are made as they are predicted (`dmi_hpc.screening.options`). split: of
    a set. Raises DataError if the task cannot read it, or the set misses fields.
    """
    if (path / MANIFEST).exists():
        return _of_set(model, path, split)
    if split != "all":
        raise DataError(f"{path}: --split {split} is of shard sets (a folder with {MANIFEST})")
    if path.suffix == ".toml":
        return _of_compositions(model, path)
    return _of_file(model, path)


def _results(model: Model) -> tuple[Column, ...]:
    """Columns of what is predicted; the last one is a number in every row."""
    task = model.task
    if task.quantity.transform == "category":
        return Column(task.quantity.name, "text"), Column("probability", "real", digits=_DIGITS)
    return tuple(Column(q.name, "real", q.unit, digits=_DIGITS) for q in task.quantities)


def _as_columns(model: Model, values: Array) -> dict[str, Any]:
    """Predictions as those columns; of classes, the most probable one and how probable it is."""
    quantity, names = model.task.quantity, [column.name for column in _results(model)]
    if quantity.transform == "category":
        best = values.argmax(axis=1)
        classes = [quantity.classes[i] if quantity.classes else str(i) for i in best]
        return dict(zip(names, (classes, values.max(axis=1)), strict=True))
    return dict(zip(names, values.reshape(len(values), -1).T, strict=True))


def _of_file(model: Model, path: Path) -> Table:
    labels, fields = model.task.read_inputs(path)

    def blocks() -> Iterator[Mapping[str, Any]]:
        for start in range(0, len(labels), model.batch_size):
            stop = min(start + model.batch_size, len(labels))
            part = {name: part_of(values, start, stop) for name, values in fields.items()}
            yield {"input": labels[start:stop], **_as_columns(model, model.predict(part))}

    columns = (Column("input", "text"), *_results(model))
    if model.task.group_field is None:
        return Table(columns, len(labels), blocks())
    groups = Groups(labels)
    lowest = groups.least(model.predict(fields))
    named = {"input": [labels[row] for row in groups.first], columns[-1].name: lowest}
    return Table(columns, len(lowest), iter([named]))


def _of_compositions(model: Model, path: Path) -> Table:
    from dmi_hpc.screening.options import read_screening
    from dmi_hpc.screening.stream import Network, blocks, number_of

    what = read_screening(path)
    network, wanted = Network(model, what.precision), what.compositions

    def predicted() -> Iterator[Mapping[str, Any]]:
        for block in blocks(wanted, model.device):
            if len(block):
                values = model.scale.unscale(network(block.fractions()).cpu().numpy())
                yield {"input": block.formulas().tolist(), **_as_columns(model, values)}

    columns = (Column("input", "text"), *_results(model))
    return Table(columns, number_of(wanted, model.device), predicted())


def _of_set(model: Model, path: Path, split: SplitName | Literal["all"]) -> Table:
    if split not in ("all", *SPLITS):
        raise DataError(f"--split: found '{split}', expected all, {', '.join(SPLITS)}")
    shards = ShardSet.open(find_staged(path), verify="read")  # blocks as they come: one pass
    have = {field.name for field in shards.manifest.fields}
    if missing := [name for name in model.task.input_fields if name not in have]:
        raise DataError(
            f"{path}: task {model.task.name} needs fields {', '.join(missing)}; found "
            f"{', '.join(sorted(have))}"
        )
    rows = shards.rows(split)
    label = model.task.label_field if model.task.label_field in have else None

    def blocks() -> Iterator[Mapping[str, Any]]:
        with shards:
            for part in model.of_rows(shards, rows, World(), carry=(label,) if label else ()):
                block: dict[str, Any] = {"row": part.rows, **_as_columns(model, part.values)}
                if label:
                    block["input"] = [bytes(text).decode() for text in part.fields[label]]
                yield block

    names = (Column("row", "integer"), *((Column("input", "text"),) if label else ()))
    return Table((*names, *_results(model)), len(rows), blocks())
