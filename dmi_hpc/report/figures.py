"""Charts of the result and of the training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from dmi_hpc.report.charts import (
    ABOVE,
    ABOVE_LEFT,
    LIGHT,
    MOST_VECTOR_POINTS,
    chart,
    limits,
    log_scale,
    plain,
    tick,
    wide,
)
from dmi_hpc.report.collect import Epoch, Predictions


def parity(predictions: Predictions, names: Sequence[tuple[str, str]], quantity: str) -> str:
    """Prediction against truth. `names`: (column, label), the network first, a baseline behind it."""
    truth = np.asarray(predictions.truth)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for order, (name, label) in enumerate(names):
            values = np.asarray(predictions.methods[name])
            colour, alpha = ("network", 0.75) if order == 0 else ("baseline", 0.45)
            axes.scatter(
                truth,
                values,
                s=16,
                linewidths=0,
                color=LIGHT[colour],
                alpha=alpha,
                label=plain(label),
                zorder=3 - order,
                rasterized=truth.size > MOST_VECTOR_POINTS,
            )
        shown = [truth, *(np.asarray(predictions.methods[name]) for name, _ in names)]
        low, high = limits(np.concatenate(shown))
        axes.plot([low, high], [low, high], color=LIGHT["ink"], linewidth=1, zorder=4)
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_xlabel(f"true {plain(quantity)}")
        axes.set_ylabel(f"predicted {plain(quantity)}")
        axes.legend(**ABOVE_LEFT)

    return chart("parity", f"Parity plot: predicted against true {quantity}", (430, 400), draw)


def error_histogram(
    predictions: Predictions, names: Sequence[tuple[str, str]], quantity: str
) -> str:
    """Distribution of prediction - truth on shared bins (the middle 99 % of all errors)."""
    errors = [np.subtract(predictions.methods[name], predictions.truth) for name, _ in names]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        low, high = np.quantile(np.concatenate(errors), [0.005, 0.995])
        bins = np.linspace(*limits(np.array([low, high, 0.0])), 40).tolist()
        for order in reversed(range(len(names))):
            colour, alpha = ("network", 0.8) if order == 0 else ("baseline", 0.55)
            axes.hist(
                np.clip(errors[order], bins[0], bins[-1]),
                bins=bins,
                color=LIGHT[colour],
                alpha=alpha,
                label=plain(names[order][1]),
            )
        axes.axvline(0, color=LIGHT["ink"], linewidth=1)
        axes.set_xlabel(f"error of {plain(quantity)}")
        axes.set_ylabel("rows")
        axes.legend(**ABOVE_LEFT, reverse=True)

    return chart("errors", f"Histogram of prediction errors of {quantity}", (430, 400), draw)


def learning_curves(epochs: Sequence[Epoch], best_epoch: int | None, unit: str) -> str:
    """Loss, validation error and learning rate after each epoch, one panel for each that is known."""
    panels = [
        ("loss", {"train_loss": "training", "validation_loss": "validation"}, 2.4),
        (f"validation error{f' / {plain(unit)}' if unit else ''}", {"validation_error": ""}, 2.4),
        ("learning rate", {"learning_rate": ""}, 1.0),
    ]
    curves = {
        key: [(e.epoch + 1, value) for e in epochs if (value := getattr(e, key)) is not None]
        for _, keys, _ in panels
        for key in keys
    }
    shown = [panel for panel in panels if any(curves[key] for key in panel[1])]

    def draw(figure: Figure) -> None:
        heights = [height for *_, height in shown]
        rows = figure.subplots(len(shown), 1, sharex=True, squeeze=False, height_ratios=heights)
        for axes, (title, keys, _) in zip(rows[:, 0], shown, strict=True):
            for key, label in keys.items():
                if curves[key]:
                    colour = "random" if key == "train_loss" else "network"
                    x, y = zip(*curves[key], strict=True)
                    axes.plot(x, y, color=LIGHT[colour], label=label, marker=_marker(x))
            if len([key for key in keys if curves[key]]) > 1:
                axes.legend(**ABOVE)
            values = [value for key in keys for _, value in curves[key]]
            if wide(values) and "learning_rate" not in keys:
                log_scale(axes, "y")
            else:
                axes.yaxis.set_major_formatter(tick)
            if best_epoch is not None:
                axes.axvline(best_epoch + 1, color=LIGHT["baseline"], linewidth=1.2)
            axes.set_ylabel(title)
        rows[-1, 0].set_xlabel("epoch")
        figure.align_ylabels()

    height = 70 + round(85 * sum(height for *_, height in shown))
    return chart("learning", "Learning curves by epoch", (900, height), draw)


def _marker(points: Sequence[float]) -> str:
    """A single point makes no line."""
    return "o" if len(points) == 1 else ""
