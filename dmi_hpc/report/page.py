"""The page: what to say about a run, rendered by ``template.html.j2`` with everything escaped."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from dmi_hpc.models.cost import cost
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.report import charts, diagrams, figures
from dmi_hpc.report.collect import Evaluated, Evaluation, Method, Predictions, Run
from dmi_hpc.report.formatting import MISSING, compact, duration, number
from dmi_hpc.report.launching_section import launching_context
from dmi_hpc.report.search_section import search_context

# (stage, command that runs it)
STAGES = {
    "data": "dmi data",
    "search": "dmi search",
    "training": "dmi train",
    "evaluation": "dmi evaluate",
}
WORST_SHOWN = 8
_NBSP = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Tile:
    """One number that matters, with what it is."""

    value: str
    caption: str


def render(run: Run) -> str:
    """The whole page as HTML text; depends on nothing but `run`."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=number, compact=compact, duration=duration, plain=plain, shape=diagrams.shape_text
    )
    template = resources.files(__package__).joinpath("template.html.j2").read_text("utf-8")
    context = {
        "run": run,
        "headline": headline(run),
        "tiles": _tiles(run),
        "missing": missing_stages(run),
        "light": charts.LIGHT,
        "dark": charts.DARK,
        "recipe": json.dumps(run.info.recipe, indent=2, ensure_ascii=False),
        "identity": _identity(run),
        **_result(run),
        **_training(run),
        **search_context(run),
        **launching_context(run.allocations),
        **_network(run),
        "pictures": [
            (picture.caption, base64.b64encode(picture.png).decode()) for picture in run.gallery
        ],
    }
    environment.globals["score_columns"] = score_columns
    return environment.from_string(template).render(context)


def missing_stages(run: Run) -> list[tuple[str, str]]:
    """Stages without output in the run folder, with the command that runs each."""
    present = {
        "data": run.data,
        "search": run.search,
        "training": run.training,
        "evaluation": run.evaluation,
    }
    return [(stage, command) for stage, command in STAGES.items() if present[stage] is None]


def headline(run: Run) -> str:
    """The result of the run in one sentence, whatever stage it has reached."""
    if run.evaluation is not None:
        return _evaluation_headline(run.evaluation, evolved=_evolved(run))
    if run.refined is not None:
        members, test = sum(m.chosen for m in run.refined.members), run.refined.test
        return (
            f"An ensemble of {members} trainings of the best networks found predicts "
            f"{run.refined.quantity} of {test.rows:,} unseen test rows with a mean absolute error of "
            f"{number(test.mae)}{_NBSP}{run.refined.unit}."
        )
    if run.training is not None and run.training.epochs:
        known = [e.validation_error for e in run.training.epochs if e.validation_error is not None]
        best = f", best validation error {number(min(known))}" if known else ""
        return f"Trained for {len(run.training.epochs)} epochs{best}; not evaluated yet."
    if run.search is not None and run.search.best is not None:
        best_trial = run.search.best
        name, fitness = run.search.name(best_trial.id), number(best_trial.fitness, 4)
        return (
            f"Best of {len(run.search.finished):,} evaluated networks so far: number {name}, fitness "
            f"{fitness}; not trained in full yet."
        )
    if run.search is not None and run.search.failed:
        return f"No evaluation has succeeded: all {len(run.search.failed)} finished ones failed."
    if run.search is not None:
        return "The search has not finished any evaluation yet."
    if run.data is not None:
        return f"A data set of {run.data.rows:,} rows; no network has been trained on it yet."
    return "Nothing has been run yet."


def _evaluation_headline(evaluation: Evaluation, *, evolved: bool) -> str:
    network, unit = evaluation.network, evaluation.unit
    rows = "unseen test" if evaluation.split == "test" else evaluation.split
    subject = (
        f"The {'evolved ' if evolved else ''}network predicts {evaluation.quantity} of "
        f"{evaluation.rows:,} {rows} rows with "
    )
    if evaluation.of_classes:
        return subject + _class_headline(evaluation)
    percent = f" ({number(network.mae_percent)}{_NBSP}%)" if network.mae_percent is not None else ""
    text = subject + f"a mean absolute error of {number(network.mae)}{_NBSP}{unit}{percent}"
    if not evaluation.baselines:
        return text + "."
    best = min(evaluation.baselines, key=lambda method: method.mae)
    first = evaluation.baselines[0]
    text += f": {_ratio(network, first, unit)}"
    if best is not first:
        text += f", and {_ratio(network, best, unit, 'the best baseline, ')}"
    return text + "."


def _class_headline(evaluation: Evaluation) -> str:
    if evaluation.transform == "category":
        what, name = "accuracy", "an accuracy"
    else:
        what, name = "auc", "an area under the ROC curve"
    known = [(getattr(m, what), m) for m in evaluation.baselines if getattr(m, what) is not None]
    ours = getattr(evaluation.network, what)
    text = f"{name} of {number(ours)}" if ours is not None else "rows of one class alone"
    if known:
        value, best = max(known, key=lambda pair: pair[0])
        text += f"; the best baseline, {best.label}: {number(value)}"
    return text + "."


# title, attribute of a method, digits or None for the usual ones; {unit} stands for " / unit"
_SCORES = (
    ("AUC", "auc", 4),
    ("accuracy", "accuracy", 4),
    ("MAE{unit}", "mae", None),  # of classes: of the probability
    ("MAE / %", "mae_percent", None),
    ("RMSE{unit}", "rmse", None),
    ("R²", "r2", 4),
    ("forces MAE / (eV/Å)", "force_mae", None),
    ("forces RMSE / (eV/Å)", "force_rmse", None),
)


def score_columns(evaluated: Evaluated) -> list[tuple[str, str, int | None]]:
    """What a table of its methods shows: the scores that at least one of them has."""
    unit = f" / {evaluated.unit}" if evaluated.unit and not evaluated.of_classes else ""
    return [
        (title.format(unit=unit), name, digits)
        for title, name, digits in _SCORES
        if any(getattr(method, name) is not None for method in evaluated.methods)
        and not (evaluated.of_classes and name in ("mae_percent", "r2"))
    ]


def _ratio(network: Method, other: Method, unit: str, prefix: str = "") -> str:
    named = f"{prefix}{other.label} ({number(other.mae)}{_NBSP}{unit})"
    if network.mae <= 0 or other.mae <= 0:
        return f"against {named}"
    if network.mae <= other.mae:
        return f"{number(other.mae / network.mae, 2)} times smaller than {named}"
    return f"{number(network.mae / other.mae, 2)} times larger than {named}"


def _tiles(run: Run) -> list[Tile]:
    tiles = []
    if run.evaluation is not None:
        network, split = run.evaluation.network, run.evaluation.split
        if network.auc is not None:
            tiles.append(Tile(number(network.auc, 4), f"AUC, {split} split"))
        elif network.accuracy is not None:
            tiles.append(Tile(number(network.accuracy, 4), f"accuracy, {split} split"))
        else:
            error = f"{number(network.mae)} {run.evaluation.unit}"
            tiles.append(Tile(error, f"MAE, {split} split"))
            if network.r2 is not None:
                tiles.append(Tile(number(network.r2, 4), f"R², {split} split"))
    if run.data is not None:
        tiles.append(Tile(f"{run.data.rows:,}", "rows of data"))
    if run.search is not None:
        tiles.append(Tile(f"{len(run.search.finished):,}", "networks evaluated"))
        if run.search.utilisation is not None:
            tiles.append(Tile(f"{100 * run.search.utilisation:.0f} %", "workers busy"))
    spec = network_of(run)
    if spec is not None:
        tiles.append(Tile(compact(cost(spec).parameters), "weights of the network"))
    return tiles


def network_of(run: Run) -> NetworkSpec | None:
    """The network that was trained, else the winner of the search."""
    if run.training is not None and run.training.network is not None:
        return run.training.network
    return run.winner.network if run.winner is not None else None


def _evolved(run: Run) -> bool:
    return run.winner is not None and run.winner.network == network_of(run)


def _result(run: Run) -> dict[str, Any]:
    """Parity plot, error histogram and the worst rows: what the predictions show."""
    evaluation, predictions = run.evaluation, run.predictions
    if evaluation is None or predictions is None or not predictions.truth or evaluation.of_classes:
        return {"parity": None}
    baselines = [method for method in evaluation.baselines if method.name in predictions.methods]
    best = min(baselines, key=lambda method: method.mae, default=None)
    shown = [(m.name, m.label) for m in (evaluation.network, best) if m is not None]
    quantity = f"{evaluation.quantity} / {evaluation.unit}"
    errors = np.abs(np.subtract(predictions.methods["network"], predictions.truth))
    return {
        "parity": Markup(figures.parity(predictions, shown, quantity)),
        "histogram": Markup(figures.error_histogram(predictions, shown, quantity)),
        "quantiles": [(share, float(np.quantile(errors, share / 100))) for share in (50, 90, 99)],
        "worst": _worst(predictions, errors),
    }


def _worst(predictions: Predictions, errors: np.ndarray) -> list[tuple[str, str, float, float]]:
    order = np.argsort(-errors, kind="stable")[:WORST_SHOWN]
    network = predictions.methods["network"]
    return [
        (predictions.rows[i], predictions.labels[i], predictions.truth[i], network[i])
        for i in order.tolist()
    ]


def _training(run: Run) -> dict[str, Any]:
    if run.training is None or not run.training.epochs:
        return {"learning": None}
    epochs = run.training.epochs
    best = run.training.status.best_epoch if run.training.status else None
    unit = run.evaluation.unit if run.evaluation is not None else ""
    rates = [epoch.samples_per_s for epoch in epochs if epoch.samples_per_s is not None]
    return {
        "learning": Markup(figures.learning_curves(epochs, best, unit)),
        "training_seconds": sum(epoch.seconds or 0.0 for epoch in epochs),
        "training_rate": float(np.median(rates)) if rates else None,
    }


def _network(run: Run) -> dict[str, Any]:
    spec = network_of(run)
    if spec is None:
        return {"network": None}
    return {
        "network": Markup(diagrams.network_drawing(spec)),
        "blocks": diagrams.blocks(spec),
        "cost": cost(spec),
        "evolved": _evolved(run),
    }


def _identity(run: Run) -> dict[str, Any]:
    """What tells whether a repeated run gave the same."""
    status = run.training.status if run.training is not None else None
    return {
        "seed": run.info.seed,
        **({"started": run.info.created} if run.info.created else {}),
        **({"weights, xxh3": status.weights_xxh3} if status and status.weights_xxh3 else {}),
    }


def plain(value: Any) -> str:
    """Any JSON value in one line: numbers short, mappings as ``key: value``."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        text = f"{value:.5g}" if isinstance(value, float) else str(value)
        return number(value, 3) if "e" in text or "n" in text else text
    if isinstance(value, Mapping | list | tuple) and not value:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value)
    return str(value)
