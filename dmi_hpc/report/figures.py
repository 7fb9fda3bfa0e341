"""Charts as inline SVG: colours are CSS variables, so that a page restyles them (dark, print).

Matplotlib writes ``figure`` colours as hexadecimal; each colour of ``LIGHT`` is unique and becomes
``var(--name)`` afterwards. No state outlives a call, and equal data give equal bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from dmi_hpc.report.collect import Epoch, Predictions
from dmi_hpc.report.evaluations import Search, Trial

LIGHT = {
    "ink": "#1d2530",
    "muted": "#667080",
    "grid": "#dfe3e9",
    "network": "#0b6bb5",
    "baseline": "#dd8a2e",
    "founder": "#7b52ab",
    "random": "#98a1ad",
    "mutation": "#169b78",
    "crossover": "#2f86d6",
    "incumbent": "#c9a227",
    "failed": "#c8383f",
}
DARK = {
    "ink": "#e4e8ee",
    "muted": "#98a3b3",
    "grid": "#313a47",
    "network": "#5fb4f5",
    "baseline": "#eda85a",
    "founder": "#b494e0",
    "random": "#7f8a99",
    "mutation": "#4cc9a4",
    "crossover": "#7db8f2",
    "incumbent": "#e0c25a",
    "failed": "#f0757b",
}
ORIGINS = ("founder", "random", "mutation", "crossover", "incumbent")

# Beyond this many points a scatter is stored as a bitmap: the page stays small.
MOST_VECTOR_POINTS = 2500
_STYLE: dict[str, Any] = {
    "font.size": 12,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
_ABOVE: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 8}
_ABOVE_LEFT: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0.1}
_NO_METADATA: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def origin_colour(origin: str) -> str:
    return origin if origin in ORIGINS else "muted"


def _chart(name: str, label: str, size: tuple[int, int], draw: Callable[[Figure], None]) -> str:
    """Draw on a new figure of `size` (CSS pixels); `name` keeps its element ids apart."""
    text = io.StringIO()
    with mpl.rc_context(), warnings.catch_warnings():
        # The browser draws the text; matplotlib only measures it and may lack the glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcdefaults()  # not the user's matplotlibrc
        style: Any = _STYLE | {"svg.hashsalt": name}
        mpl.rcParams.update(style)
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        draw(figure)
        figure.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
    return _inline(text.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    body = svg[svg.index("<defs>") :]
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    for name, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{name})")
    return (
        f'<svg viewBox="{box.group(1)}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{body}"
    )


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
                label=_plain(label),
                zorder=3 - order,
                rasterized=truth.size > MOST_VECTOR_POINTS,
            )
        shown = [truth, *(np.asarray(predictions.methods[name]) for name, _ in names)]
        low, high = _limits(np.concatenate(shown))
        axes.plot([low, high], [low, high], color=LIGHT["ink"], linewidth=1, zorder=4)
        axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        axes.set_xlabel(f"true {_plain(quantity)}")
        axes.set_ylabel(f"predicted {_plain(quantity)}")
        axes.legend(**_ABOVE_LEFT)

    return _chart("parity", f"Parity plot: predicted against true {quantity}", (430, 400), draw)


def error_histogram(
    predictions: Predictions, names: Sequence[tuple[str, str]], quantity: str
) -> str:
    """Distribution of prediction - truth on shared bins (the middle 99 % of all errors)."""
    errors = [np.subtract(predictions.methods[name], predictions.truth) for name, _ in names]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        low, high = np.quantile(np.concatenate(errors), [0.005, 0.995])
        bins = np.linspace(*_limits(np.array([low, high, 0.0])), 40).tolist()
        for order in reversed(range(len(names))):
            colour, alpha = ("network", 0.8) if order == 0 else ("baseline", 0.55)
            axes.hist(
                np.clip(errors[order], bins[0], bins[-1]),
                bins=bins,
                color=LIGHT[colour],
                alpha=alpha,
                label=_plain(names[order][1]),
            )
        axes.axvline(0, color=LIGHT["ink"], linewidth=1)
        axes.set_xlabel(f"error of {_plain(quantity)}")
        axes.set_ylabel("rows")
        axes.legend(**_ABOVE_LEFT, reverse=True)

    return _chart("errors", f"Histogram of prediction errors of {quantity}", (430, 400), draw)


def learning_curves(epochs: Sequence[Epoch], best_epoch: int | None, unit: str) -> str:
    """Loss, validation MAE and learning rate after each epoch, one panel for each that is known."""
    panels = [
        ("loss", {"train_loss": "training", "validation_loss": "validation"}, 2.4),
        (f"validation MAE{f' / {_plain(unit)}' if unit else ''}", {"validation_mae": ""}, 2.4),
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
                axes.legend(**_ABOVE)
            values = [value for key in keys for _, value in curves[key]]
            if _wide(values) and "learning_rate" not in keys:
                _log_scale(axes, "y")
            else:
                axes.yaxis.set_major_formatter(_tick)
            if best_epoch is not None:
                axes.axvline(best_epoch + 1, color=LIGHT["baseline"], linewidth=1.2)
            axes.set_ylabel(title)
        rows[-1, 0].set_xlabel("epoch")
        figure.align_ylabels()

    height = 70 + round(85 * sum(height for *_, height in shown))
    return _chart("learning", "Learning curves by epoch", (900, height), draw)


def _marker(points: Sequence[float]) -> str:
    """A single point makes no line."""
    return "o" if len(points) == 1 else ""


def search_progress(search: Search) -> str:
    """Fitness of every evaluation when it ended, best so far, failures; below: trials running."""
    unit, scale = ("min", 60.0) if search.elapsed < 7200 else ("h", 3600.0)

    def draw(figure: Figure) -> None:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.6, 1])
        _scatter_by_origin(above, search.finished, lambda trial: (trial.told or 0.0) / scale)
        fitness = [trial.fitness or 0.0 for trial in search.finished]
        if fitness:
            times = [(trial.told or 0.0) / scale for trial in search.finished]
            best = np.minimum.accumulate(fitness).tolist()
            end = search.elapsed / scale
            above.step([*times, end], [*best, best[-1]], where="post", color=LIGHT["ink"])
            above.plot([], [], color=LIGHT["ink"], label="best so far")
        else:
            above.set_yticks([])
        if _wide(fitness):
            _log_scale(above, "y")
        if search.failed:
            above.plot(
                [(trial.told or 0.0) / scale for trial in search.failed],
                [0.03] * len(search.failed),
                "x",
                color=LIGHT["failed"],
                transform=above.get_xaxis_transform(),
                label="failed",
            )
        for time in search.resumed:
            above.axvline(time / scale, color=LIGHT["muted"], linestyle=":", linewidth=1.2)
        above.set_ylabel("fitness (lower is better)")
        above.legend(**_ABOVE)
        _running(below, search, scale)
        below.set_xlabel(f"time of search / {unit}")
        figure.align_ylabels()

    return _chart("search", "Fitness of every evaluation against time", (900, 470), draw)


def _scatter_by_origin(
    axes: Axes, trials: Sequence[Trial], x: Callable[[Trial], float], *, labels: bool = True
) -> None:
    for origin in dict.fromkeys([*ORIGINS, *(trial.origin for trial in trials)]):
        chosen = [trial for trial in trials if trial.origin == origin]
        if chosen:
            axes.scatter(
                [x(trial) for trial in chosen],
                [trial.fitness or 0.0 for trial in chosen],
                s=30,
                linewidths=0,
                alpha=0.85,
                color=LIGHT[origin_colour(origin)],
                label=_plain(origin) if labels else None,
                zorder=3,
                rasterized=len(trials) > MOST_VECTOR_POINTS,
            )


def _running(axes: Axes, search: Search, scale: float) -> None:
    """Number of trials at work against time, from the duration of those that ended."""
    ended = [trial for trial in search.trials.values() if trial.told is not None]
    steps = [(max(0.0, (t.told or 0.0) - t.seconds), 1) for t in ended]
    steps += [(t.told or 0.0, -1) for t in ended]
    steps.sort()
    times = [0.0, *(time / scale for time, _ in steps)]
    counts = np.cumsum([0, *(step for _, step in steps)])
    axes.fill_between(times, counts, step="post", color=LIGHT["network"], alpha=0.35, linewidth=0)
    if search.workers:
        axes.axhline(search.workers, color=LIGHT["muted"], linewidth=1)
    axes.set_ylim(0, max(search.workers or 1, int(counts.max())) * 1.15)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.set_ylabel("running")


def size_against_fitness(search: Search, winner: int | None) -> str:
    """Fitness against the number of parameters: what accuracy costs."""
    sized = [trial for trial in search.finished if trial.parameters]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _scatter_by_origin(axes, sized, lambda trial: trial.parameters or 1.0, labels=False)
        for trial in sized:
            if trial.id == winner:
                axes.scatter(
                    [trial.parameters or 1.0],
                    [trial.fitness or 0.0],
                    s=170,
                    facecolors="none",
                    edgecolors=LIGHT["ink"],
                    linewidths=1.6,
                    label="winner",
                    zorder=4,
                )
                axes.legend(**_ABOVE)
        _log_scale(axes, "x")
        if _wide([trial.fitness or 0.0 for trial in sized]):
            _log_scale(axes, "y")
        axes.set(xlabel="parameters", ylabel="fitness (lower is better)")

    return _chart("size", "Fitness against number of parameters", (900, 300), draw)


def _log_scale(axes: Axes, name: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers: 0.2, 0.5, 1, 2 ..."""
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axis.set_major_formatter(_tick)
    axis.set_minor_formatter(NullFormatter())


def _tick(value: float, _position: float | None) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _wide(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows these better."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 5 * min(finite)


def _limits(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def _plain(text: str) -> str:
    """Text that matplotlib takes neither for a formula nor, in a legend, for a hidden entry."""
    return text.replace("$", r"\$").lstrip("_")
