"""Whether the uncertainty of an ensemble means what it says, and what makes it so."""

from __future__ import annotations

from math import log, pi
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.stats import spearmanr

from dmi_hpc.ensemble import Calibration
from dmi_hpc.tasks.base import Array

LEAST = 1e-12  # sigma where all members agree, relative to the largest error


def calibrated(error: Array, spread: Array) -> Calibration:
    """The `Calibration` under which the errors (n,) are most likely, as normal ones.

    spread: (n,) of the members. Made for rows that no network was trained on.
    """
    size, width = _size(error), _size(spread)

    def cost(logs: Array) -> float:
        scale, floor = np.exp(logs)
        return nll(error / size, np.hypot(scale * spread / width, floor))

    # both matter; the spread says nothing; it says all: the likelihood may have a hill at each
    starts = ((0.0, log(0.5)), (-7.0, 0.0), (0.0, -7.0))
    bounds = [(-7, 7), (-7, 2)]
    fits = [minimize(cost, start, method="L-BFGS-B", bounds=bounds) for start in starts]
    scale, floor = np.exp(min(fits, key=lambda fit: float(fit.fun)).x)
    return Calibration(scale=float(scale * size / width), floor=float(floor * size))


def nll(error: Array, sigma: Array) -> float:
    """Mean negative log-likelihood of normal errors (n,) with standard deviations `sigma` > 0."""
    return float(np.mean(np.log(sigma) + 0.5 * log(2 * pi) + 0.5 * (error / sigma) ** 2))


def judged(error: Array, spread: Array, calibration: Calibration) -> dict[str, Any]:
    """How good an ensemble is by its errors (n,) and the spread (n,) of its members.

    coverage_1, coverage_2: share of errors within one and two sigma (normal ones: 0.683 and 0.954);
    nll: of errors in the quantity's unit; rank_correlation: Spearman's, of |error| and sigma, None
    if one of them is constant. raw: the same with the bare spread as sigma.
    """
    return {
        "rows": len(error),
        "mae": float(np.abs(error).mean()),
        **_uncertainty(error, calibration.sigma(spread)),
        "raw": _uncertainty(error, np.maximum(spread, LEAST * _size(error))),
    }


def _size(values: Array) -> float:
    """Root mean square, in whose unit the likelihood is well scaled; 1 if all are zero."""
    return float(np.sqrt(np.mean(values**2))) or 1.0


def _uncertainty(error: Array, sigma: Array) -> dict[str, float | None]:
    size = np.abs(error)
    varies = np.ptp(sigma) > 0 and np.ptp(size) > 0
    return {
        "nll": nll(error, sigma),
        "coverage_1": float((size <= sigma).mean()),
        "coverage_2": float((size <= 2 * sigma).mean()),
        "rank_correlation": float(spearmanr(size, sigma).statistic) if varies else None,
    }
