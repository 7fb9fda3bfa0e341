"""Adaptive operator selection: what makes the next candidate, learned from what each kind brought.

Probability matching with a floor: the share of a kind follows the rate at which it lately brought a
result among the good ones, so that its credit depends on ranks alone and fades as results pass.
D. Thierens, "An adaptive pursuit strategy for allocating operator probabilities", GECCO 2005;
ranks as credit: A. Fialho et al., "Toward comparison-based adaptive operator selection", GECCO 2010.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from search.evolution.pareto import order
from search.evolution.population import Values

WINDOW = 48  # newest results that count
GOOD = 0.25  # share of them that earns credit
PRIOR = 4.0  # results of average success that each kind is taken to have had
FLOOR = 0.25  # of its given share, that no kind falls below


def adapted(
    given: Mapping[str, float], results: Sequence[tuple[str, Values | None]]
) -> dict[str, float]:
    """Shares of the kinds of change, from the `given` ones, which sum to 1 like those returned.

    results: (kind, values; None of a failure) of the newest evaluations. Kinds that are not given
    count among the results, but earn nothing.
    """
    values = [found for _, found in results if found is not None]
    good: set[int] = set()
    if values:
        places = iter(order(np.array(values)).tolist())
        best = GOOD * len(results)
        good = {i for i, (_, found) in enumerate(results) if found and next(places) < best}
    worth = {kind: share * _success(kind, results, good) for kind, share in given.items()}
    total = sum(worth.values())
    return {
        kind: FLOOR * share + (1 - FLOOR) * worth[kind] / total for kind, share in given.items()
    }


def _success(kind: str, results: Sequence[tuple[str, Values | None]], good: set[int]) -> float:
    """Share of what `kind` brought that is good, from `PRIOR` average ones on."""
    own = [i for i, (of, _) in enumerate(results) if of == kind]
    return (PRIOR * GOOD + len(good.intersection(own))) / (PRIOR + len(own))
