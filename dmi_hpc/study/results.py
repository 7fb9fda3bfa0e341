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


@dataclass(frozen=True)
class Trained:
    """One member's own files: evaluation.json and predictions of the first quantity."""

    seed: int
    evaluation: Mapping[str, Any]
    status: Mapping[str, Any]
    epochs_s: float  # seconds of its epochs
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
        rows=tuple(line["row"] for line in table),
        truth=np.array([float(line["truth"]) for line in table]),
        predicted=np.array([float(line["network"]) for line in table]),
    )


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
    names = [
        name for name, value in next(iter(networks.values())).items() if _is_score(name, value)
    ]
    return found | {
        "quantity": about["quantity"],
        "unit": about["unit"],
        "transform": about.get("transform", "identity"),
        "data": about["data"],
        "test_rows": about["rows"],
        "parameters": first.status["parameters"],
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


def _is_score(name: str, value: Any) -> bool:
    return isinstance(value, float | int) and name != "seconds"


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
        names = [name for name, value in networks[0].items() if _is_score(name, value)]
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
    if len(known) > 1:
        lines += ["", *_over_points(known)]
    lines += ["", *(f"{key}: {value}  " for key, value in about.items())]
    return "\n".join(lines) + "\n"


def _table(points: Sequence[Mapping[str, Any]]) -> list[str]:
    scores = [s for s in (*_SCORES[points[0]["transform"]], *_FORCES) if s[0] in points[0]["mean"]]
    unit = f" ({points[0]['unit']})" if points[0]["unit"] else ""
    several = any(point["ensemble"] for point in points)
    head = ["", "seeds", "test rows", *(title for _, title, _ in scores)]
    head += [f"ensemble {scores[0][1]}"] * several
    head += [f"{b['label']} {scores[0][1]}" for b in points[0]["baselines"]]
    head += ["weights", "training / s"]
    lines = [f"{points[0]['quantity']}{unit}; mean ± deviation over the seeds", ""]
    lines += [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for point in points:
        row = [_name(point), str(len(point["seeds"])), f"{point['test_rows']:,}"]
        row += [_spread(point, name, digits) for name, _, digits in scores]
        if several:
            ensemble = point["ensemble"] or {}
            row.append(_number(ensemble.get(scores[0][0]), scores[0][2]))
        row += [_number(b.get(scores[0][0]), scores[0][2]) for b in point["baselines"]]
        row += [f"{point['parameters']:,}", f"{_mean(list(point['seconds'].values())):,.0f}"]
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


def _over_points(points: Sequence[Mapping[str, Any]]) -> list[str]:
    scores = [s for s in _SCORES[points[0]["transform"]] if s[0] in points[0]["mean"]]
    each = [
        f"{title} {_mean([p['mean'][name] for p in points]):.{digits}f} ± "
        f"{_deviation([p['mean'][name] for p in points]):.{digits}f}"
        for name, title, digits in scores
    ]
    return [f"over the {len(points)} points: {', '.join(each)}"]


def _name(point: Mapping[str, Any]) -> str:
    return Point(point["point"]).name


def _spread(point: Mapping[str, Any], name: str, digits: int) -> str:
    mean, deviation = point["mean"].get(name), point["deviation"].get(name)
    text = _number(mean, digits)
    return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
