"""Least-squares support vector regression with an honest width: its own uncertainty.

J. A. K. Suykens and J. Vandewalle, "Least squares support vector machine classifiers", Neural
Processing Letters 9 (1999) 293. Its prediction is the mean of the Gaussian process with the same
kernel, whose variance comes for a matrix product more (C. E. Rasmussen and C. K. I. Williams,
"Gaussian Processes for Machine Learning", 2006: ch. 2; marginal likelihood: ch. 5).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize

from search.base import Vector

WIDTHS = (0.35, 0.7, 1.4, 2.8)  # of the kernel, in units of the typical distance of two points
NOISES = (0.01, 0.1, 0.4)  # variance of the targets that the inputs do not explain
JUDGED = 100  # points that choose them
FEW_FEATURES = 16  # up to so many get a width each ("automatic relevance determination")
RELEVANCE_STEPS = 15  # of the optimiser that finds those
RELEVANCE_SPREAD = 0.7  # prior deviation of the logarithm of a width
TINY = 1e-9


class Running(NamedTuple):
    """Points that are being evaluated: what `Regression.predict` needs of them."""

    points: Vector  # (p, d), scaled
    spread: Vector  # (n, p)
    factor: Vector  # (p, p), of Cholesky


class Regression:
    """A fit of targets of mean 0 and variance 1; Matern 5/2 kernel."""

    def __init__(self, x: Vector, y: Vector) -> None:
        """x: (n, d) features; y: (n,). Widths and noise have the greatest marginal likelihood."""
        some = np.linspace(0, len(x) - 1, min(len(x), JUDGED)).astype(int)
        width, self._noise = _judged(x[some], y[some])
        self._scales = np.full(x.shape[1], 1.0 / width)
        if x.shape[1] <= FEW_FEATURES:
            self._scales, self._noise = _relevances(x[some], y[some], width, self._noise)
        self._x = x * self._scales
        factor = cholesky(_noisy(_kernel(_squares(self._x, self._x)), self._noise), lower=True)
        self._inverse = cho_solve((factor, True), np.eye(len(x)))  # (n, n)
        self._weights = self._inverse @ y  # (n,)
        self._scale = float(np.sqrt(max(y @ self._weights / len(y), TINY)))

    def running(self, points: Vector) -> Running:
        """(p, d) points, at least one, whose targets will be known soon."""
        points = points * self._scales
        near = _kernel(_squares(self._x, points))  # (n, p)
        spread = self._inverse @ near
        own = _kernel(_squares(points, points)) - near.T @ spread
        return Running(points, spread, cholesky(_noisy(own, self._noise), lower=True))

    def predict(self, x: Vector, running: Running | None = None) -> tuple[Vector, Vector]:
        """(m, d) -> (m,) expected targets and (m,) their standard deviations.

        running: lowers the deviation around its points.
        """
        x = x * self._scales
        near = _kernel(_squares(self._x, x))  # (n, m)
        variance = 1.0 - (near * (self._inverse @ near)).sum(axis=0)
        if running is not None:
            cross = _kernel(_squares(running.points, x)) - running.spread.T @ near  # (p, m)
            variance -= (solve_triangular(running.factor, cross, lower=True) ** 2).sum(axis=0)
        return near.T @ self._weights, self._scale * np.sqrt(np.maximum(variance, TINY))


def _squares(first: Vector, second: Vector) -> Vector:
    """Squared distances of all pairs."""
    norms = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1)
    found: Vector = np.maximum(norms - 2 * first @ second.T, 0.0)
    return found


def _kernel(squares: Vector) -> Vector:
    """Of squared distances in units of the width."""
    r = np.sqrt(5 * squares)
    found: Vector = (1 + r + r * r / 3) * np.exp(-r)
    return found


def _noisy(kernel: Vector, noise: float) -> Vector:
    kernel[np.diag_indices(len(kernel))] += noise
    return kernel


def _judged(x: Vector, y: Vector) -> tuple[float, float]:
    """The best width, the same for all features, and noise."""
    squares = _squares(x, x)
    typical = float(np.sqrt(np.median(squares[np.triu_indices(len(x), 1)]))) or 1.0
    choices = [(width * typical, noise) for width in WIDTHS for noise in NOISES]
    evidence = [_evidence(_kernel(squares / width**2), noise, y) for width, noise in choices]
    return choices[int(np.argmax(evidence))]


def _evidence(kernel: Vector, noise: float, y: Vector) -> float:
    """Logarithm of the marginal likelihood, up to a constant, at the best scale of the targets."""
    factor = cholesky(_noisy(kernel, noise), lower=True)
    residual = solve_triangular(factor, y, lower=True)
    misfit = float(residual @ residual) / len(y)
    return -0.5 * len(y) * float(np.log(misfit + TINY)) - float(np.log(np.diag(factor)).sum())


def _relevances(x: Vector, y: Vector, width: float, noise: float) -> tuple[Vector, float]:
    """(d,) inverse widths, and noise, from equal ones as the start and the centre of the prior."""
    differences = np.moveaxis((x[:, None] - x[None]) ** 2, 2, 0)  # (d, n, n)
    centre = np.append(np.full(x.shape[1], -np.log(width)), np.log(noise))

    def cost(p: Vector) -> tuple[float, Vector]:
        """Negative log posterior of the logarithms `p` of scales and noise, and its gradient."""
        weights, found = np.exp(2 * p[:-1]), np.exp(p[-1])
        r = np.sqrt(5 * np.tensordot(weights, differences, 1))
        decay = np.exp(-r)
        factor = cholesky(_noisy((1 + r + r * r / 3) * decay, found), lower=True)
        inverse = cho_solve((factor, True), np.eye(len(y)))
        solved = inverse @ y
        misfit = y @ solved / len(y) + TINY
        slope = 0.5 * (inverse - np.outer(solved, solved) / misfit)  # by the kernel
        by_square = slope * (-5 / 6) * (1 + r) * decay
        off = (p - centre) / RELEVANCE_SPREAD
        value = 0.5 * len(y) * np.log(misfit) + np.log(np.diag(factor)).sum() + 0.5 * off @ off
        scales = 2 * weights * np.tensordot(differences, by_square, 2)
        gradient = np.append(scales, np.trace(slope) * found) + off / RELEVANCE_SPREAD
        return float(value), gradient

    options = {"maxiter": RELEVANCE_STEPS}
    bounds = [(c - 4, c + 4) for c in centre]
    best = minimize(cost, centre, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
    return np.exp(best[:-1]), float(np.exp(best[-1]))
