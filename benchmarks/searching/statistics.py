"""Comparison of optimisers over problems and seeds.

Means are over problems of means over seeds; intervals are 95 % bootstrap over the seeds of each
problem, the problems being given. Tests are two-sided Wilcoxon signed-rank over the (problem, seed)
pairs that both arms have run, with Holm's correction over all rivals of one table and budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata, wilcoxon

Values = npt.NDArray[np.float64]
Pair = tuple[str, int]  # problem, seed
Arms = Mapping[str, Mapping[Pair, Values]]  # arm -> pair -> (budgets,) regrets
RESAMPLES = 2000


class Comparison(NamedTuple):
    """Ours against one rival at one budget, over common pairs; lower regret wins."""

    pairs: int
    difference: float  # mean over problems of (ours - rival); negative if ours is better
    wins: int
    losses: int
    p: float  # before Holm's correction


def mean_interval(
    runs: Mapping[Pair, float], rng: np.random.Generator
) -> tuple[float, float, float]:
    """(mean, low, high) of runs."""
    groups = _by_problem(runs)
    mean = float(np.mean([np.mean(group) for group in groups]))
    drawn = [rng.choice(group, size=(RESAMPLES, len(group))).mean(axis=1) for group in groups]
    low, high = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975])
    return mean, float(low), float(high)


def compared(ours: Mapping[Pair, float], rival: Mapping[Pair, float]) -> Comparison:
    """Paired comparison; p = 1 if all pairs are equal. Raises ValueError without a common pair."""
    common = sorted(ours.keys() & rival.keys())
    if not common:
        raise ValueError("the arms have no problem and seed in common")
    differences = {pair: ours[pair] - rival[pair] for pair in common}
    values = np.array(list(differences.values()))
    p = float(wilcoxon(values).pvalue) if np.any(values) else 1.0
    mean = float(np.mean([np.mean(group) for group in _by_problem(differences)]))
    return Comparison(len(values), mean, int((values < 0).sum()), int((values > 0).sum()), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    order = np.argsort(p_values)
    scaled = np.array(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(p) for p in corrected]


def mean_ranks(arms: Mapping[str, Mapping[Pair, float]]) -> dict[str, float]:
    """Mean rank of each arm over the pairs that all have run (1 is best); nan if there is none."""
    common = sorted(set.intersection(*(set(runs) for runs in arms.values())))
    table = np.array([[runs[pair] for runs in arms.values()] for pair in common])
    ranks = rankdata(table, axis=1).mean(axis=0) if common else np.full(len(arms), np.nan)
    return dict(zip(arms, map(float, ranks), strict=True))


def report(
    lines: Sequence[Mapping[str, Any]],
    ours: str,
    budgets: Sequence[int],
    rng: np.random.Generator,
) -> str:
    """Markdown: for every group of problems the regrets of all arms, then ours against each rival."""
    parts = []
    for where in sorted({_where(line) for line in lines}):
        group = [line for line in lines if _where(line) == where]
        arms = _arms(group, budgets)
        parts.append(f"### {where}\n\n" + _regrets(group, arms, budgets, rng))
        if ours in arms and len(arms) > 1:
            parts.append(_against(arms, ours, budgets))
    return "\n\n".join(parts)


def _regrets(
    lines: Sequence[Mapping[str, Any]], arms: Arms, budgets: Sequence[int], rng: np.random.Generator
) -> str:
    last = {arm: _at(runs, len(budgets) - 1) for arm, runs in arms.items()}
    ranks = mean_ranks(last)
    shared = len(set.intersection(*(set(runs) for runs in arms.values())))
    head = f"| arm | {' | '.join(map(str, budgets))} | rank at {budgets[-1]} (n={shared}) | ms | runs |"
    rows = [head, "|---" * (len(budgets) + 4) + "|"]
    for arm in sorted(arms, key=lambda arm: mean_interval(last[arm], rng)[0]):
        found = [mean_interval(_at(arms[arm], place), rng) for place in range(len(budgets))]
        cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in found]
        spent = [1e3 * x["optimiser_s"] / len(x["best"]) for x in lines if x["arm"] == arm]
        cells += [f"{ranks[arm]:.1f}", f"{np.mean(spent):.1f}", str(len(arms[arm]))]
        rows.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _against(arms: Arms, ours: str, budgets: Sequence[int]) -> str:
    rivals = [arm for arm in arms if arm != ours and arms[arm].keys() & arms[ours].keys()]
    rows = [
        f"| {ours} against | "
        + " | ".join(f"{b}: difference, won-lost, p" for b in budgets)
        + " | n |",
        "|---" * (len(budgets) + 2) + "|",
    ]
    columns = []
    for place in range(len(budgets)):
        mine = _at(arms[ours], place)
        found = [compared(mine, _at(arms[rival], place)) for rival in rivals]
        columns.append(list(zip(found, holm([one.p for one in found]), strict=True)))
    for number, rival in enumerate(rivals):
        cells = [
            f"{one.difference:+.3f}, {one.wins}-{one.losses}, {p:.2g}"
            for one, p in (column[number] for column in columns)
        ]
        rows.append(f"| {rival} | {' | '.join(cells)} | {columns[0][number][0].pairs} |")
    return "\n".join(rows)


def _where(line: Mapping[str, Any]) -> str:
    return f"{line['group']}, {line['workers']} workers"


def _arms(lines: Sequence[Mapping[str, Any]], budgets: Sequence[int]) -> Arms:
    """An exhausted search keeps its last regret."""
    arms: dict[str, dict[Pair, Values]] = {}
    for line in lines:
        regret = line["regret"]
        values = np.array([regret[min(budget, len(regret)) - 1] for budget in budgets])
        arms.setdefault(line["arm"], {})[(line["problem"], line["seed"])] = values
    return arms


def _at(runs: Mapping[Pair, Values], place: int) -> dict[Pair, float]:
    return {pair: float(values[place]) for pair, values in runs.items()}


def _by_problem(runs: Mapping[Pair, float]) -> list[Values]:
    groups: dict[str, list[float]] = {}
    for (problem, _), value in runs.items():
        groups.setdefault(problem, []).append(value)
    return [np.array(group) for group in groups.values()]
