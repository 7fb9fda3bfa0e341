"""How well the seconds of a search's trials are foretold from their costs.

    python benchmarks/search_pace.py RUN [RUN ...]

Reads the journals of finished searches, without early stopping, and forecasts every trial from those
that had finished before it, as a search does. In a run folder made with `dmi search RECIPE --out RUN`
(any recipe; `[search] workers` 1 and an idle machine give the cleanest figures).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from loading.report import machine, markdown

from dmi_hpc.run import open_run
from dmi_hpc.tasks import make_task
from search.records.history import Evaluation, evaluations
from search.spaces.genome import from_json
from search.spaces.recipe import recipe_space
from search.trials.pace import Load, Pace, load_of

COUNTS = (10, 20, 50, 100)  # trials, between which accuracy is judged
LEAST = 5  # of them
SURELY, MOSTLY = 0.05, 0.9


def loads(run: Path) -> Iterator[tuple[Load, Evaluation]]:
    """Every evaluation with what it computed, in the order they were told."""
    recipe = open_run(run).recipe
    space = recipe_space(recipe, make_task(recipe.task)).network
    for found in sorted(evaluations(run), key=lambda e: e.told):
        yield load_of(from_json(found.genome), space, recipe.search.epochs), found


def accuracy(trials: Sequence[tuple[Load, float]]) -> list[list[str]]:
    """|log ratio| of measured to foretold seconds, as if the median of those before were told, and
    the share within a quantile; by how many trials were known."""
    pace, told = Pace(), list[tuple[float, float, float]]()
    for number, (load, seconds) in enumerate(trials):
        typical = float(np.median([s for _, s in trials[:number]])) if number else seconds
        expected, most = pace.seconds(load) or typical, pace.seconds(load, MOSTLY) or typical
        told.append((np.log(seconds / expected), np.log(seconds / typical), seconds <= most))
        pace.learn(load, seconds)
    rows = []
    ends = (*(count for count in COUNTS if count < len(trials)), len(trials))
    for first, last in pairwise(ends):
        if last - first >= LEAST:
            ours, plain, within = np.abs(np.array(told[first:last])).T
            sizes = [np.quantile(errors, q) for errors in (ours, plain) for q in (0.5, 0.9)]
            figures = [f"{figure:.2f}" for figure in (*sizes, within.mean())]
            rows.append([f"{first + 1} to {last}", *figures])
    return rows


def limits(trials: Sequence[tuple[Load, Evaluation]], limit_s: float) -> str:
    """What a search saves that does not start trials foretold to be over the limit."""
    pace, spent, saved, timeouts, foretold, wrong = Pace(), 0.0, 0.0, 0, 0, 0
    for load, found in trials:
        least, spent = pace.seconds(load, SURELY), spent + found.seconds
        over = least is not None and least > limit_s
        if found.failure is None:
            wrong += over
            pace.learn(load, found.seconds)
        elif found.failure == "timeout":
            timeouts, foretold = timeouts + 1, foretold + over
            saved += found.seconds if over else 0.0
    return (
        f"limit of {limit_s:g} s: {timeouts} trials timed out, {foretold} of them foretold "
        f"({saved:.0f} of {spent:.0f} s saved); {wrong} refused that would have finished"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    runs = parser.parse_args().runs
    print(machine())
    for run in runs:
        trials = list(loads(run))
        good = [(load, found.seconds) for load, found in trials if found.failure is None]
        taken = np.quantile([seconds for _, seconds in good], (0.1, 0.5, 0.9))
        print(f"\n{run.name}: {len(good)} trials, 10, 50, 90 %: {taken.round(2)} s\n")
        headings = [
            "trials",
            "median",
            "90 %",
            "always the median: median",
            "90 %",
            f"within {MOSTLY}",
        ]
        print(markdown(headings, accuracy(good)))
        limit_s = open_run(run).recipe.search.trial_time_limit_s
        if limit_s is not None:
            print(limits(trials, limit_s))


if __name__ == "__main__":
    main()
