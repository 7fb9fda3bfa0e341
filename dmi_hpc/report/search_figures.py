"""Charts of the search."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dmi_hpc.report.charts import (
    ABOVE,
    LIGHT,
    MOST_VECTOR_POINTS,
    ORIGINS,
    chart,
    log_scale,
    origin_colour,
    plain,
    wide,
)
from dmi_hpc.report.evaluations import Search, Trial
from dmi_hpc.report.formatting import compact
from dmi_hpc.report.genes import Importance
from dmi_hpc.report.searching import Curve, Diversity, lanes, staircase

MOST_LANES = 64  # more workers are shown as a number at work
COST_NAMES = {
    "parameters": "parameters",
    "flops": "FLOP of one prediction",
    "memory_GB": "memory of training / GB",
    "energy_J": "energy of one prediction / J (estimate)",
    "latency_s": "latency of one prediction / s (measured)",
}


def time_scale(search: Search) -> tuple[str, float]:
    """(unit, its seconds) of a time axis."""
    if search.elapsed < 180:
        return "s", 1.0
    return ("min", 60.0) if search.elapsed < 7200 else ("h", 3600.0)


def search_progress(search: Search) -> str:
    """Fitness of every evaluation when it ended, best so far, failures; below: trials running."""
    unit, scale = time_scale(search)

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
        if wide(fitness):
            log_scale(above, "y")
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
        above.legend(**ABOVE)
        _running(below, search, scale)
        below.set_xlabel(f"time of search / {unit}")
        figure.align_ylabels()

    return chart("search", "Fitness of every evaluation against time", (900, 470), draw)


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
                label=plain(origin) if labels else None,
                zorder=3,
                rasterized=len(trials) > MOST_VECTOR_POINTS,
            )


def _running(axes: Axes, search: Search, scale: float) -> None:
    """Number of trials at work against time, from the duration of those that ended."""
    ended = [trial for trial in search.own if trial.told is not None]
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


def timeline(search: Search) -> str | None:
    """What each worker did when; None if there are too many of them to be drawn."""
    bars = lanes(search)
    count = 1 + max((bar.lane for bar in bars), default=0)
    if count > MOST_LANES:
        return None
    unit, scale = time_scale(search)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        kinds = [_kind(bar.trial) for bar in bars]
        for kind in dict.fromkeys([*ORIGINS, *kinds]):
            some = [bar for bar, of in zip(bars, kinds, strict=True) if of == kind]
            boxes = [
                [(x, bar.lane + y) for x, y in zip(ends, (0.6, 1.4, 1.4, 0.6), strict=True)]
                for bar in some
                for ends in [[t / scale for t in (bar.begin, bar.begin, bar.end, bar.end)]]
            ]
            if some:
                colour = "failed" if kind == "failed" else origin_colour(kind)
                axes.add_collection(
                    PolyCollection(
                        boxes,
                        facecolors=LIGHT[colour],
                        edgecolors="none",
                        alpha=0.35 if kind == "running" else 0.9,
                        label=plain(kind),
                        rasterized=len(bars) > MOST_VECTOR_POINTS,
                    )
                )
        for time in search.resumed:
            axes.axvline(time / scale, color=LIGHT["muted"], linestyle=":", linewidth=1.2)
        axes.set(xlim=(0, search.elapsed / scale or 1), ylim=(count + 0.6, 0.4))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.grid(visible=False, axis="y")
        axes.set(xlabel=f"time of search / {unit}", ylabel="worker")
        axes.legend(**ABOVE)

    return chart("timeline", "What each worker did when", (900, 110 + 14 * count), draw)


def _kind(trial: Trial) -> str:
    if trial.failure is not None:
        return "failed"
    return trial.origin if trial.told is not None else "running"


def pareto(search: Search, cost: str, winner: int | None) -> str:
    """Fitness against a cost, with the front: what accuracy costs."""
    trials = [trial for trial in search.finished if trial.metrics.get(cost, 0) > 0]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        _scatter_by_origin(axes, trials, lambda trial: trial.metrics[cost], labels=False)
        x, y = zip(*staircase(trials, cost), strict=True)
        end = max(trial.metrics[cost] for trial in trials)
        axes.step([*x, end], [*y, y[-1]], where="post", color=LIGHT["ink"], linewidth=1.4)
        axes.scatter(x, y, s=12, color=LIGHT["ink"], zorder=4, label="front")
        for trial in trials:
            if trial.id == winner:
                axes.scatter(
                    [trial.metrics[cost]],
                    [trial.fitness or 0.0],
                    s=170,
                    facecolors="none",
                    edgecolors=LIGHT["ink"],
                    linewidths=1.6,
                    label="winner",
                    zorder=4,
                )
        axes.legend(**ABOVE)
        log_scale(axes, "x")
        axes.xaxis.set_major_formatter(lambda value, _: compact(value))
        if wide([trial.fitness or 0.0 for trial in trials]):
            log_scale(axes, "y")
        axes.set(xlabel=plain(COST_NAMES.get(cost, cost)), ylabel="fitness (lower is better)")

    return chart(f"pareto-{cost}", f"Fitness against {cost}", (900, 330), draw)


def health(found: Diversity, quality: Curve) -> str | None:
    """Diversity and, where it is known, the surrogate's rank correlation, over the evaluations."""
    panels: list[tuple[str, list[tuple[str, str, Curve]]]] = []
    if found.distance:
        curves = [
            ("mean distance of genomes", "network", found.distance),
            ("different structures", "founder", found.structures),
        ]
        panels.append(("diversity", curves))
    if quality:
        panels.append(("rank correlation", [("surrogate", "mutation", quality)]))
    if not panels:
        return None

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (title, curves) in zip(rows, panels, strict=True):
            for label, colour, curve in curves:
                x, y = zip(*curve, strict=True)
                marker = "o" if len(x) == 1 else ""
                axes.plot(x, y, color=LIGHT[colour], label=label, marker=marker)
            low = min(0.0, *(y for *_, curve in curves for _, y in curve))
            axes.set_ylim(1.05 * low, 1.05)
            axes.axhline(0, color=LIGHT["muted"], linewidth=1)
            axes.set_ylabel(title)
            axes.legend(**ABOVE)
        rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        rows[-1].set_xlabel("evaluations with a fitness")
        figure.align_ylabels()

    title = "Diversity and quality of the surrogate over the evaluations"
    return chart("health", title, (900, 70 + 170 * len(panels)), draw)


def gene_importance(found: Sequence[Importance]) -> str:
    """Share of the fitness that each gene alone explains, with its best values."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = range(len(found))
        axes.barh(places, [100 * gene.share for gene in found], color=LIGHT["network"], height=0.6)
        for place, gene in zip(places, found, strict=True):
            axes.annotate(
                plain(f"best: {gene.best}"),
                (100 * gene.share, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=11,
                color=LIGHT["muted"],
            )
        axes.set_yticks(places, [plain(gene.name) for gene in found])
        axes.tick_params(axis="y", length=0, labelcolor=LIGHT["ink"])
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("share of the variance of fitness ranks / %")

    return chart("genes", "How much each gene explains", (900, 80 + 26 * len(found)), draw)
