"""How long a trial takes, learned from those that finished: arithmetic on its costs, calibrated.

    pace = Pace()
    pace.learn(load_of(genome, space, epochs), seconds)    # a trial that finished
    pace.seconds(load_of(other, space, epochs), 0.9)       # what nine of ten such trials stay within

Seconds are a sum of what grows with the samples (a part each, one by FLOPs, one by activations), with
the steps (a part each, and one by the weights that are updated) and of what every trial takes. Its
coefficients cannot be negative, so that it goes on sensibly to costlier networks than it has seen.
How far it is off is known from what it had said of trials before they were learned from.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from dmi_hpc.models.cost import cost
from dmi_hpc.models.space import NetworkSpace
from search.spaces.genome import Genome, decode

ENOUGH = 6  # trials to learn from, before anything is said
JUDGED = 4  # of them also foretold, before the error is known
RECENT = 256  # trials learned from: machines change
LEAST_S, MOST_STEPS = 1e-3, 100
RECENT_RATIOS = 64  # of measured to foretold


@dataclass(frozen=True)
class Load:
    """What a trial computes. amount: epochs, or what else a search counts its trainings in;
    batch_size: 1 where all trials have the same."""

    amount: float
    flops: float
    activations: float
    parameters: float
    batch_size: int = 1

    @property
    def _terms(self) -> tuple[float, ...]:
        a = self.amount
        samples = (a, a * self.flops, a * self.activations)
        return (1.0, *samples, a / self.batch_size, a * self.parameters / self.batch_size)


def load_of(genome: Genome, space: NetworkSpace, amount: float) -> Load:
    """Of a training of `genome` for `amount`."""
    found, batch_size = cost(decode(genome, space)), dict(genome.hyper).get("batch_size") or 1
    return Load(amount, found.flops, found.activations, found.parameters, int(batch_size))


class Pace:
    """Foretells the seconds of trials on the workers of one session."""

    def __init__(self) -> None:
        self._terms: deque[tuple[float, ...]] = deque(maxlen=RECENT)
        self._seconds: deque[float] = deque(maxlen=RECENT)
        self._ratios: deque[float] = deque(maxlen=RECENT_RATIOS)
        self._coefficients: npt.NDArray[np.float64] | None = None

    def learn(self, load: Load, seconds: float) -> None:
        """A trial of this `load` took so long."""
        seconds = max(seconds, LEAST_S)
        if self._coefficients is not None:
            self._ratios.append(seconds / self._raw(load))
        self._terms.append(load._terms)
        self._seconds.append(seconds)
        if len(self._seconds) >= ENOUGH:
            fitted = _fitted(np.array(self._terms), np.array(self._seconds))
            self._coefficients = self._coefficients if fitted is None else fitted

    def seconds(self, load: Load, quantile: float = 0.5) -> float | None:
        """What the share `quantile` of such trials stays within; None while too few have finished."""
        if len(self._ratios) < JUDGED:
            return None
        # of few ratios the outer one: an interval too wide is the lesser harm
        method: Literal["higher", "lower"] = "higher" if quantile > 0.5 else "lower"
        return self._raw(load) * float(np.quantile(self._ratios, quantile, method=method))

    def _raw(self, load: Load) -> float:
        assert self._coefficients is not None
        return float(self._coefficients @ np.array(load._terms))


def _fitted(
    terms: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64] | None:
    """Least squares of the relative error; a trial that others held up counts little in it. None
    where it does not converge."""
    from scipy.optimize import nnls  # a third of a second that workers, who foretell nothing, save

    scale = terms.max(axis=0)  # positive: no network is without any of them
    try:
        found, _ = nnls(terms / scale / seconds[:, None], np.ones(len(seconds)), maxiter=MOST_STEPS)
    except RuntimeError:  # its way to say so
        return None
    return np.asarray(found / scale)
