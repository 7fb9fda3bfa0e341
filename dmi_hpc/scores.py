"""How good predictions are: sums over rows that add up over ranks, and the scores that follow."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.special import logit
from torch import Tensor

from dmi_hpc.targets import Scale, TargetScale
from dmi_hpc.tasks.base import Array

if TYPE_CHECKING:
    from torchmetrics import Metric

_HELD_ROWS = 2**16  # that the metrics take at once: each call of theirs costs as much as a batch
# of the logarithm of the odds, in which a ROC curve is counted: far finer than networks are certain
_RANGE, _BINS = 20.0, 2**14

AddUp = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scores:
    """mae, rmse: the quantity's unit; r2: 1 is perfect; mae_percent: of the mean |truth|.

    r2 is nan for a single row, mae_percent None where every truth is zero. Of the probability of a
    class these are of |probability - truth|, and auc is the area under the ROC curve (None if all rows
    are of one class); of many classes they are of the probability of the true one against 1, and
    accuracy is the share of rows whose most probable class is the true one. force_mae, force_rmse:
    eV/angstrom, over all atoms and axes.
    """

    mae: float
    rmse: float
    r2: float
    mae_percent: float | None
    auc: float | None = None
    accuracy: float | None = None
    force_mae: float | None = None
    force_rmse: float | None = None

    @property
    def error(self) -> float:
        """What trainings and searches make small: `Task.measure` names it."""
        if not math.isfinite(self.mae):
            return self.mae  # the others do not show a prediction that is no number
        if self.auc is not None:
            return 1 - self.auc
        if self.accuracy is not None:
            return 1 - self.accuracy
        return self.mae + (self.force_mae or 0.0)


NUMBERS = TargetScale(transform="identity", mean=0.0, std=1.0)


class Scorer:
    """Sums of what was predicted so far of one target, from which scores follow; sums of ranks add up.

    Rows with a truth of nan are not counted.
    """

    def __init__(self, scale: TargetScale = NUMBERS, *, forces: bool = False) -> None:
        """forces: each update brings errors of forces, too; the same on all ranks, as is the scale."""
        # imports matplotlib and scipy.signal, 1.4 s: a training need not wait for it to begin
        from torchmetrics import MeanAbsoluteError, MeanSquaredError, R2Score

        self._transform = scale.transform
        # R2 does not depend on these, but what torchmetrics takes for a constant truth does
        self._centre, self._spread = 0.0, 1.0
        if scale.transform in ("identity", "log"):
            self._centre, above = scale.unscale(np.array([0.0, 1.0])).tolist()
            self._spread = above - self._centre
        # `scores` adds all sums up in one collective, or in none
        alone: dict[str, Any] = {"sync_on_compute": False}
        self._mae, self._mse = MeanAbsoluteError(**alone), MeanSquaredError(**alone)
        self._size = MeanAbsoluteError(**alone)  # mean |truth| is the error of predicting zero
        self._r2 = R2Score(**alone)
        self._force_mae = MeanAbsoluteError(**alone) if forces else None
        self._force_mse = MeanSquaredError(**alone) if forces else None
        for metric in self._metrics:
            metric.set_dtype(torch.float64)
        self._right = 0.0  # rows whose most probable class is the true one
        self._odds = np.zeros((2, _BINS))  # rows of class 0 and 1 by their predicted odds
        # a rank without rows has sums, too: zeros
        self._held, self._rows = [(np.empty(0), np.empty(0))], 0

    @property
    def _metrics(self) -> tuple[Metric, ...]:
        of_forces = (self._force_mae, self._force_mse)
        found = (self._mae, self._mse, self._size, self._r2, *of_forces)
        return tuple(metric for metric in found if metric is not None)

    def update(self, predicted: Array, truth: Array, forces: Array | None = None) -> None:
        """Count predictions of (n,) truths: (n,), or (n, classes). forces: (atoms, 3) errors."""
        known = ~np.isnan(truth)
        if not known.all():
            predicted, truth = predicted[known], truth[known]
        if self._transform == "category":
            predicted, truth = self._count_classes(predicted, truth.astype(np.int64))
        if self._transform == "logit":
            self._count_odds(predicted, truth.astype(np.int64))
        if self._force_mae is not None and self._force_mse is not None:
            assert forces is not None, "a scorer of forces needs their errors"
            errors = torch.from_numpy(forces.reshape(-1).astype(np.float64))
            self._force_mae.update(errors, torch.zeros_like(errors))
            self._force_mse.update(errors, torch.zeros_like(errors))
        self._held.append((predicted, truth))
        self._rows += len(truth)
        if self._rows >= _HELD_ROWS:
            self._flush()

    def _count_classes(self, predicted: Array, truth: Array) -> tuple[Array, Array]:
        self._right += float((predicted.argmax(axis=1) == truth).sum())
        return predicted[np.arange(len(truth)), truth], np.ones(len(truth))

    def _count_odds(self, predicted: Array, truth: Array) -> None:
        odds = np.clip(np.nan_to_num(logit(predicted)), -_RANGE, _RANGE)
        places = (odds / _RANGE + 1) / 2 * (_BINS - 1)
        np.add.at(self._odds, (truth, places.astype(np.int64)), 1.0)

    def _flush(self) -> None:
        if not self._held:
            return
        p, t = (
            torch.from_numpy(np.concatenate(part).astype(np.float64, copy=False))
            for part in zip(*self._held, strict=True)
        )
        self._mae.update(p, t)
        self._mse.update(p, t)
        self._size.update(torch.zeros_like(t), t)
        self._r2.update((p - self._centre) / self._spread, (t - self._centre) / self._spread)
        self._held, self._rows = [], 0

    def scores(self, add_up: AddUp = lambda sums: sums) -> Scores:
        """Scores of all rows counted, at least one. add_up: of the ranks, (k,) float64 on the CPU."""
        self._flush()
        places = [(metric, name) for metric in self._metrics for name in metric.metric_state]
        states = [getattr(metric, name) for metric, name in places]  # one number each
        own = [torch.tensor([self._right], dtype=torch.float64)]
        if self._transform == "logit":
            own.append(torch.from_numpy(self._odds.reshape(-1)))
        totals = add_up(torch.cat([*(state.double().reshape(1) for state in states), *own]))
        for (metric, name), state, total in zip(places, states, totals, strict=False):
            setattr(metric, name, total.reshape(state.shape))
        right, odds = float(totals[len(places)]), totals[len(places) + 1 :].numpy()
        rows = float(self._mae.total)
        assert rows > 0, "scores of no rows"
        mae, size = float(self._mae.compute()), float(self._size.compute())
        return Scores(
            mae,
            rmse=float(self._mse.compute()) ** 0.5,
            r2=float(self._r2.compute()) if rows > 1 else float("nan"),
            mae_percent=100 * mae / size if size > 0 else None,
            auc=_area(odds.reshape(2, -1)) if self._transform == "logit" else None,
            accuracy=right / rows if self._transform == "category" else None,
            force_mae=None if self._force_mae is None else float(self._force_mae.compute()),
            force_rmse=None if self._force_mse is None else float(self._force_mse.compute()) ** 0.5,
        )


def _area(counts: Array) -> float | None:
    """Under the ROC curve: the chance that a row of class 1 has the higher odds, ties half."""
    zeros, ones = counts
    pairs = zeros.sum() * ones.sum()
    below = np.cumsum(zeros) - zeros / 2
    return float((ones * below).sum() / pairs) if pairs > 0 else None


class Scorers:
    """One `Scorer` for each target of a task."""

    def __init__(self, scale: Scale, *, forces: bool = False) -> None:
        self._heads = scale.heads
        self._each = [Scorer(head, forces=forces) for head in scale.heads]

    def update(self, predicted: Array, truth: Array, forces: Array | None = None) -> None:
        """Count predictions: as of a `Scorer`; (n, k) of (n, k) truths of several targets."""
        if len(self._each) == 1:
            self._each[0].update(predicted, truth, forces)
            return
        for k, scorer in enumerate(self._each):
            scorer.update(predicted[:, k], truth[:, k])

    def each(self, add_up: AddUp = lambda sums: sums) -> tuple[Scores, ...]:
        """Scores of each target."""
        return tuple(scorer.scores(add_up) for scorer in self._each)

    def scores(self, add_up: AddUp = lambda sums: sums) -> Scores:
        """Those of the target; of several, their means, errors in units of each one's deviation."""
        found = self.each(add_up)
        if len(found) == 1:
            return found[0]
        shares = [
            (s.error if s.auc is not None else s.mae / head.unit, s.rmse / head.unit, s.r2)
            for s, head in zip(found, self._heads, strict=True)
        ]
        mae, rmse, r2 = np.mean(shares, axis=0).tolist()
        return Scores(mae, rmse, r2, None)


def score(predicted: Array, truth: Array, scale: TargetScale | None = None) -> Scores:
    """Scores of predictions of (n,) truths, n >= 1, by this process alone; scale: of classes."""
    if scale is None:
        mean, std = float(np.mean(truth)), float(np.std(truth)) or 1.0
        scale = TargetScale(transform="identity", mean=mean, std=std)
    scorer = Scorer(scale)
    scorer.update(np.asarray(predicted, dtype=np.float64), np.asarray(truth, dtype=np.float64))
    return scorer.scores()
