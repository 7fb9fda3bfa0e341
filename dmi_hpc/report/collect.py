"""Reads a run folder into frozen data. Every file but ``run.json`` may be absent."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmi_hpc.errors import RunError
from dmi_hpc.files import read_json_lines
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.report.checked import read_json, validate
from dmi_hpc.report.evaluations import Search
from dmi_hpc.report.journals import read_searches
from dmi_hpc.report.launching import Allocations, read_allocations


@dataclass(frozen=True)
class RunInfo:
    """``run.json``: what was asked for, where and with what it ran."""

    name: str
    task: str
    recipe: dict[str, Any]
    created: str = ""
    commands: tuple[str, ...] = ()
    versions: dict[str, Any] = field(default_factory=dict)
    hardware: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class DataField:
    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    unit: str = ""
    description: str = ""


@dataclass(frozen=True)
class DataPlan:
    """What the shard set was to be."""

    task: str
    fields: tuple[DataField, ...]
    split_rule: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """The shard set's manifest. `statistics` is by field name, over the training split."""

    rows: int
    plan: DataPlan
    split_rows: dict[str, int] = field(default_factory=dict)
    shards: tuple[dict[str, Any], ...] = ()
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Winner:
    """``search/winner.json``: the best network found and how it is trained."""

    id: int
    fitness: float
    network: NetworkSpec
    hyper: dict[str, Any] = field(default_factory=dict)
    origin: str = ""
    parents: tuple[int, ...] = ()
    island: str = ""

    @property
    def name(self) -> str:
        """As ``dmi search top`` shows it."""
        return f"{self.island}:{self.id}" if self.island else str(self.id)


@dataclass(frozen=True)
class RefinedMember:
    """One training of one found network; errors in the ensemble's unit. chosen: for the ensemble."""

    network: str
    seed: int
    validation_mae: float
    test_mae: float
    chosen: bool


@dataclass(frozen=True)
class Uncertainty:
    """How well sigma tells the error: shares of errors within one and two sigma, likelihood, order."""

    nll: float
    coverage_1: float
    coverage_2: float
    rank_correlation: float | None = None


@dataclass(frozen=True)
class EnsembleScores(Uncertainty):
    """On one split, with the calibrated sigma; raw: with the bare spread of the members."""

    rows: int = 0
    mae: float = 0.0
    raw: Uncertainty | None = None


@dataclass(frozen=True)
class Refined:
    """``search/ensemble/ensemble.json``: the best networks in full, and their ensemble."""

    quantity: str
    unit: str
    members: tuple[RefinedMember, ...]
    validation: EnsembleScores
    test: EnsembleScores

    @property
    def best(self) -> RefinedMember:
        """By the validation split."""
        return min(self.members, key=lambda member: member.validation_mae)

    @property
    def networks(self) -> list[tuple[str, list[RefinedMember]]]:
        """(name, its trainings), in the order of the file."""
        names = dict.fromkeys(member.network for member in self.members)
        return [(name, [m for m in self.members if m.network == name]) for name in names]


@dataclass(frozen=True)
class _EnsembleFile:
    scores: Refined


@dataclass(frozen=True)
class Epoch:
    """One line of ``train/metrics.jsonl``, counted from 0; what was not recorded is None.

    validation_error: in the evaluation's unit; seconds: of this epoch alone.
    """

    epoch: int
    train_loss: float | None = None
    validation_loss: float | None = None
    validation_error: float | None = None
    learning_rate: float | None = None
    seconds: float | None = None
    samples_per_s: float | None = None


@dataclass(frozen=True)
class TrainStatus:
    """``train/status.json``; `best_epoch` (from 0) is the one whose weights are evaluated."""

    state: str
    best_epoch: int | None = None
    ranks: int | None = None
    engine: str = ""
    parameters: int | None = None
    reason: str = ""
    device: str = ""
    weights_xxh3: str = ""


@dataclass(frozen=True)
class Training:
    epochs: tuple[Epoch, ...]
    status: TrainStatus | None
    network: NetworkSpec | None


@dataclass(frozen=True)
class Method:
    """Scores of one method, in the evaluation's unit, as `dmi_hpc.scores.Scores` has them."""

    name: str
    label: str
    mae: float
    rmse: float | None = None
    r2: float | None = None
    mae_percent: float | None = None
    auc: float | None = None
    accuracy: float | None = None
    force_mae: float | None = None
    force_rmse: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Published:
    """A figure from the literature; nothing here has run it."""

    label: str
    mae: float | None = None
    mae_percent: float | None = None
    source: str = ""
    rmse: float | None = None
    r2: float | None = None
    auc: float | None = None
    accuracy: float | None = None
    force_mae: float | None = None
    force_rmse: float | None = None


@dataclass(frozen=True)
class Evaluated:
    """One quantity of an evaluation; transform: what kind it is, see `dmi_hpc.tasks.base.Transform`."""

    rows: int
    quantity: str
    unit: str
    methods: tuple[Method, ...]
    transform: str = "identity"

    @property
    def network(self) -> Method:
        return next(method for method in self.methods if method.name == "network")

    @property
    def baselines(self) -> tuple[Method, ...]:
        return tuple(method for method in self.methods if method.name != "network")

    @property
    def of_classes(self) -> bool:
        return self.transform in ("logit", "category")


@dataclass(frozen=True, kw_only=True)
class Evaluation(Evaluated):
    """others: what else the same network predicts."""

    split: str
    published: tuple[Published, ...] = ()
    others: tuple[Evaluated, ...] = ()


@dataclass(frozen=True)
class Predictions:
    """``predictions.csv``: one entry per evaluated row; `methods` by column name."""

    rows: tuple[str, ...]
    labels: tuple[str, ...]
    truth: tuple[float, ...]
    methods: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Picture:
    caption: str
    png: bytes


@dataclass(frozen=True)
class Run:
    """Everything the page shows; None or empty where a stage has not been run."""

    info: RunInfo
    data: Dataset | None
    search: Search | None
    winner: Winner | None
    refined: Refined | None
    training: Training | None
    evaluation: Evaluation | None
    predictions: Predictions | None
    gallery: tuple[Picture, ...]
    allocations: Allocations | None = None


def read_run(run: Path) -> Run:
    """Read the run folder. Raises RunError naming the file and key that cannot be understood."""
    info = read_json(run / "run.json", RunInfo)
    if info is None:
        raise RunError(
            f"{run}: no run.json: expected the folder of a run "
            "(`dmi search` or `dmi train` makes one); give its path"
        )
    return Run(
        info=info,
        data=read_json(_manifest(run, info), Dataset),
        search=read_searches(run / "search"),
        winner=read_json(run / "search" / "winner.json", Winner),
        refined=_read_refined(run / "search" / "ensemble" / "ensemble.json"),
        training=_read_training(run / "train"),
        evaluation=_read_evaluation(run / "evaluation.json"),
        predictions=_read_predictions(run / "predictions.csv"),
        gallery=_read_gallery(run / "gallery"),
        allocations=read_allocations(run),
    )


def _manifest(run: Path, info: RunInfo) -> Path:
    """The run's own shard set, unless the recipe names another one."""
    named = info.recipe.get("data", {}).get("path")
    return (Path(named) if named else run / "data") / "manifest.json"


def _read_refined(path: Path) -> Refined | None:
    found = read_json(path, _EnsembleFile)
    return found.scores if found is not None else None


def _read_training(folder: Path) -> Training | None:
    path = folder / "metrics.jsonl"
    lines = [line for line in read_json_lines(path) if line.get("kind") == "epoch"]
    # A resumed training writes the epoch it was interrupted in once more: the last one counts.
    by_epoch = {epoch.epoch: epoch for epoch in (validate(x, Epoch, path) for x in lines)}
    status = read_json(folder / "status.json", TrainStatus)
    network = read_json(folder / "network.json", NetworkSpec)
    if not by_epoch and status is None and network is None:
        return None
    return Training(tuple(by_epoch[key] for key in sorted(by_epoch)), status, network)


def _read_evaluation(path: Path) -> Evaluation | None:
    evaluation = read_json(path, Evaluation)
    if evaluation and all(method.name != "network" for method in evaluation.methods):
        names = ", ".join(method.name for method in evaluation.methods) or "none"
        raise RunError(f"{path}: methods: expected one named 'network', found {names}")
    return evaluation


def _read_predictions(path: Path) -> Predictions | None:
    if not path.exists():
        return None
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        columns = reader.fieldnames or []
        missing = [name for name in ("row", "label", "truth", "network") if name not in columns]
        if missing:
            raise RunError(f"{path}: no column {', '.join(missing)}: found {', '.join(columns)}")
        lines = list(reader)
    names = [name for name in columns if name not in ("row", "label", "truth")]
    numbers = {
        name: tuple(_number(line[name], path, name, i + 2) for i, line in enumerate(lines))
        for name in ["truth", *names]
    }
    return Predictions(
        rows=tuple(line["row"] for line in lines),
        labels=tuple(line["label"] for line in lines),
        truth=numbers.pop("truth"),
        methods=numbers,
    )


def _number(text: str | None, path: Path, column: str, line: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise RunError(f"{path}: line {line}, column {column}: expected a number, found {text!r}")
    return value


@dataclass(frozen=True)
class _PictureFile:
    file: str
    caption: str = ""


def _read_gallery(folder: Path) -> tuple[Picture, ...]:
    index = folder / "gallery.json"
    entries: tuple[_PictureFile, ...] = read_json(index, tuple[_PictureFile, ...]) or ()
    pictures = []
    for entry in entries:
        path = folder / entry.file
        if Path(entry.file).name != entry.file or path.suffix != ".png" or not path.is_file():
            raise RunError(f"{index}: {entry.file!r}: expected the name of a PNG file in {folder}")
        pictures.append(Picture(entry.caption, path.read_bytes()))
    return tuple(pictures)
