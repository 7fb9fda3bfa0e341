"""What the trainings of a study say together: means, spreads, ensembles; as data and as a table."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dmi_hpc.config import DataConfig
from dmi_hpc.data.manifest import read_manifest
from dmi_hpc.scores import score
from dmi_hpc.study.plan import Member, Point
from dmi_hpc.study.pool import Outcome
from dmi_hpc.targets import TargetScale
from dmi_hpc.tasks.base import Array, Transform

_SCORES = {  # shown of each kind of target: name, title, digits
    "logit": (("auc", "AUC", 4),),
    "category": (("accuracy", "accuracy", 4),),
    "log": (("mae", "MAE", 4), ("rmse", "RMSE", 4), ("r2", "R2", 4)),
    "identity": (("mae", "MAE", 4), ("rmse", "RMSE", 4), ("r2", "R2", 4)),
}
_FORCES = (("force_mae", "forces MAE", 4), ("force_rmse", "forces RMSE", 4))
_HIGHER_IS_BETTER = ("auc", "accuracy")
_DATA = "data.path"


@dataclass(frozen=True)
class Trained:
    """One member's own files: evaluation.json and predictions of the first quantity."""

    seed: int
    evaluation: Mapping[str, Any]
    status: Mapping[str, Any]
    epochs_s: float  # seconds of its epochs
    train_rows: int
    rows: tuple[str, ...]
    truth: Array
    predicted: Array


@dataclass
class PointResult:
    """What is known of a point; failed: seed -> reason."""

    point: Point
    trained: list[Trained] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)


def read_member(member: Member) -> Trained:
    folder = member.folder
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    lines = (folder / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    epochs = {e["epoch"]: e["seconds"] for e in map(json.loads, lines) if e.get("kind") == "epoch"}
    return Trained(
        seed=member.seed,
        evaluation=json.loads((folder / "evaluation.json").read_text()),
        status=json.loads((folder / "train" / "status.json").read_text()),
        epochs_s=sum(epochs.values()),
        train_rows=_train_rows(member.recipe.data),
        rows=tuple(line["row"] for line in table),
        truth=np.array([float(line["truth"]) for line in table]),
        predicted=np.array([float(line["network"]) for line in table]),
    )


def _train_rows(data: DataConfig) -> int:
    assert data.path is not None, "the seeds of a study share a data set"
    there = read_manifest(data.path).split_rows["train"]
    return there if data.train_rows is None else min(there, data.train_rows)


def gathered(members: Sequence[Member], outcomes: Mapping[Path, Outcome]) -> list[PointResult]:
    """Results of each point, in the order of the members. outcomes: by run folder."""
    found: dict[str, PointResult] = {}
    for member in members:
        result = found.setdefault(member.point.name, PointResult(member.point))
        outcome = outcomes[member.folder]
        if outcome.state == "done":
            result.trained.append(read_member(member))
        else:
            result.failed[member.seed] = outcome.reason
    return list(found.values())


def summary(result: PointResult) -> dict[str, Any]:
    """One point as plain data: scores of each seed, their mean and deviation, of the ensemble, of the
    baselines, and what the literature has."""
    found: dict[str, Any] = {
        "point": dict(result.point.changes),
        "failed": {str(seed): reason for seed, reason in result.failed.items()},
    }
    if not result.trained:
        return found
    first = next((t for t in result.trained if len(_methods(t)) > 1), result.trained[0])
    about = first.evaluation
    networks = {t.seed: _methods(t)["network"] for t in result.trained}
    names = _scores_of(list(networks.values()))
    return found | {
        "quantity": about["quantity"],
        "unit": about["unit"],
        "transform": about.get("transform", "identity"),
        "data": about["data"],
        "train_rows": first.train_rows,
        "test_rows": about["rows"],
        "parameters": first.status["parameters"],
        "device": first.status["device"],
        "seconds": {t.seed: round(t.epochs_s, 1) for t in result.trained},
        "seeds": {seed: {name: of[name] for name in names} for seed, of in networks.items()},
        "mean": {name: _mean([of[name] for of in networks.values()]) for name in names},
        "deviation": {name: _deviation([of[name] for of in networks.values()]) for name in names},
        "ensemble": _ensemble(result.trained, about.get("transform", "identity")),
        "baselines": [m for n, m in _methods(first).items() if n != "network"],
        "published": about["published"],
        "others": _others(result.trained),
    }


def _methods(trained: Trained) -> dict[str, dict[str, Any]]:
    return {method["name"]: method for method in trained.evaluation["methods"]}


def _scores_of(networks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of what is a number for all of them."""
    return [
        name
        for name in networks[0]
        if name != "seconds" and all(isinstance(of.get(name), float | int) for of in networks)
    ]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _deviation(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _ensemble(trained: Sequence[Trained], transform: Transform) -> dict[str, float] | None:
    """Scores of the mean of the members' outputs; None of one member, or of many classes."""
    if len(trained) < 2 or transform == "category":
        return None
    assert all(t.rows == trained[0].rows for t in trained), "all predict the same rows"
    scale = TargetScale(transform=transform, mean=0.0, std=1.0)
    mean = scale.centre(np.stack([t.predicted for t in trained]))
    found = score(mean, trained[0].truth, scale if transform == "logit" else None)
    kept = {name: getattr(found, name) for name in ("mae", "rmse", "r2", "auc")}
    return {n: value for n, value in kept.items() if value is not None and math.isfinite(value)}


def _others(trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """Mean and deviation of the further quantities of one network."""
    found = []
    for number, other in enumerate(trained[0].evaluation.get("others", ())):
        networks = [
            next(m for m in t.evaluation["others"][number]["methods"] if m["name"] == "network")
            for t in trained
        ]
        names = _scores_of(networks)
        found.append(
            {
                "quantity": other["quantity"],
                "unit": other["unit"],
                "mean": {name: _mean([n[name] for n in networks]) for name in names},
                "deviation": {name: _deviation([n[name] for n in networks]) for name in names},
                "baselines": [m for m in other["methods"] if m["name"] != "network"],
            }
        )
    return found


def markdown(
    title: str, command: str, about: Mapping[str, Any], points: Sequence[Mapping[str, Any]]
) -> str:
    """The study as a page: a table of all points, and what it was made with."""
    lines = [f"# {title}", "", "```sh", command, "```", ""]
    known = [point for point in points if "mean" in point]
    if known:
        lines += _table(known)
    for point in points:
        for seed, reason in point["failed"].items():
            lines.append(f"- failed: {_name(point)}, seed {seed}: {reason}")
    lines += [_over(group, known[0]["transform"]) for group in over_data(known)]
    lines += ["", *(f"{key}: {value}  " for key, value in about.items())]
    return "\n".join(lines) + "\n"


def _table(points: Sequence[Mapping[str, Any]]) -> list[str]:
    scores = [s for s in (*_SCORES[points[0]["transform"]], *_FORCES) if s[0] in points[0]["mean"]]
    unit = f" ({points[0]['unit']})" if points[0]["unit"] else ""
    several = any(point["ensemble"] for point in points)
    baselines = {b["name"]: b["label"] for point in points for b in point["baselines"]}
    head = ["", "seeds", "training rows", "test rows", *(title for _, title, _ in scores)]
    head += [f"ensemble {scores[0][1]}"] * several
    head += [f"{label} {scores[0][1]}" for label in baselines.values()]
    head += ["weights", "training / s"]
    lines = [f"{points[0]['quantity']}{unit}; mean ± deviation over the seeds", ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for point in points:
        row = [
            _name(point),
            str(len(point["seeds"])),
            f"{point['train_rows']:,}",
            f"{point['test_rows']:,}",
        ]
        row += [_spread(point, name, digits) for name, _, digits in scores]
        if several:
            ensemble = point["ensemble"] or {}
            row.append(_number(ensemble.get(scores[0][0]), scores[0][2]))
        there = {b["name"]: b.get(scores[0][0]) for b in point["baselines"]}
        row += [_number(there.get(name), scores[0][2]) for name in baselines]
        row += [f"{point['parameters']:,}", _seconds(point)]
        lines.append(f"| {' | '.join(row)} |")
    lines += [""]
    if any(point["others"] for point in points):
        lines += [*_further(points), ""]
    for figure in points[0]["published"]:
        kept = {k: v for k, v in figure.items() if k not in ("label", "source") and v is not None}
        told = ", ".join(f"{name} {value:g}" for name, value in kept.items())
        lines.append(f"- published: {figure['label']}, {told} ({figure['source']})")
    return [*lines, ""]


def _further(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """What else the same networks predict."""
    lines = ["| | quantity | MAE | RMSE | R2 | best baseline MAE |", "|---|---|---|---|---|---|"]
    for point in points:
        for other in point["others"]:
            best = min((b["mae"] for b in other["baselines"]), default=None)
            scores = [_spread(other, name, 4) for name in ("mae", "rmse", "r2")]
            row = [_name(point), other["quantity"], *scores, _number(best, 4)]
            lines.append(f"| {' | '.join(row)} |")
    return lines


def over_data(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Means over points that differ in their data set alone, and their deviation: over the folds of a
    cross-validation. One entry for each choice of the other keys that has several data sets."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for point in points:
        if "mean" in point:
            rest = {key: value for key, value in point["point"].items() if key != _DATA}
            groups.setdefault(Point(rest).name, []).append(point)
    found = []
    for name, group in groups.items():
        if len(group) < 2:
            continue
        entry: dict[str, Any] = {"point": name, "data_sets": len(group)}
        for key in ("mean", "ensemble"):
            of = [point[key] or {} for point in group]
            entry[key] = {
                score: {"mean": _mean(values), "deviation": _deviation(values)}
                for score in _scores_of(of)
                for values in [[each[score] for each in of]]
            }
        found.append(entry)
    return found


def _over(group: Mapping[str, Any], transform: Transform) -> str:
    told = [
        f"{kind}{title} {of[name]['mean']:.{digits}f} ± {of[name]['deviation']:.{digits}f}"
        for kind, of in (("", group["mean"]), ("ensemble ", group["ensemble"]))
        for name, title, digits in _SCORES[transform]
        if name in of
    ]
    which = "" if group["point"] == "all" else f", {group['point']}"
    return f"- over the {group['data_sets']} data sets{which}: {', '.join(told)}"


def results_row(
    title: str, command: str, about: Mapping[str, Any], point: Mapping[str, Any]
) -> str:
    """One line of a Markdown table of many studies: system; data; command; mean ± deviation (seeds);
    ensemble; best baseline; published; time and machine."""
    name, score_title, digits = _SCORES[point["transform"]][0]
    best = max if name in _HIGHER_IS_BETTER else min
    baselines = [b for b in point["baselines"] if b.get(name) is not None]
    baseline = best(baselines, key=lambda b: b[name], default=None)
    ensemble = (point["ensemble"] or {}).get(name)
    published = [f"{p['label']} {p[name]:g}" for p in point["published"] if p.get(name) is not None]
    cells = [
        title if not point["point"] else f"{title}, {_name(point)}",
        f"{point['train_rows']:,} + {point['test_rows']:,} rows, {point['data'][:8]}",
        f"`{command}`",
        f"{score_title} {_spread(point, name, digits)} {point['unit']}".rstrip()
        + f" ({len(point['seeds'])})",
        _number(ensemble, digits),
        f"{baseline['label']} {baseline[name]:.{digits}f}" if baseline else "-",
        "; ".join(published) or "-",
        f"{_seconds(point)} s, {about['machine']}",
    ]
    return f"| {' | '.join(cells)} |"


def _name(point: Mapping[str, Any]) -> str:
    return Point(point["point"]).name


def _spread(point: Mapping[str, Any], name: str, digits: int) -> str:
    mean, deviation = point["mean"].get(name), point["deviation"].get(name)
    text = _number(mean, digits)
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _seconds(point: Mapping[str, Any]) -> str:
    mean = _mean(list(point["seconds"].values()))
    return f"{mean:.1f}" if mean < 10 else f"{mean:,.0f}"
