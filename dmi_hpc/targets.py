"""What a network's outputs mean: targets in field units to network units and back.

A network has one output for each number that it predicts, or one for each class. Scales are plain data,
kept with the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from scipy.special import expit, logit, softmax

from dmi_hpc.errors import DataError
from dmi_hpc.tasks.base import Transform

Array = np.ndarray[Any, np.dtype[Any]]


class TargetScale(BaseModel):
    """One target: (transform(y) - mean) / std, from the training rows only.

    Outputs of the network (n,) <-> values (n,). logit: y is 0 or 1 and the value a probability, the
    output its logit. category: y is the number of a class; outputs (n, classes) are logits, values
    (n, classes) probabilities. Neither has a mean or deviation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    transform: Transform
    mean: float
    std: float

    @classmethod
    def of(cls, target: Array, transform: Transform) -> TargetScale:
        """target: (n,), nan where it is not known. Raises DataError if it does not suit."""
        target = target[~np.isnan(target)]
        if not len(target):
            raise DataError("the target is known of no training row")
        if transform in ("logit", "category"):
            return cls._of_classes(target, transform)
        if transform == "log" and (target <= 0).any():
            raise DataError(f"a log-scaled target must be positive, found {target.min():.4g}")
        values = np.log(target) if transform == "log" else target
        std = float(values.std())
        if not std > 0:
            raise DataError(f"the target is constant ({values[0]:.4g}) over the training rows")
        return cls(transform=transform, mean=float(values.mean()), std=std)

    @classmethod
    def _of_classes(cls, target: Array, transform: Transform) -> TargetScale:
        found = np.unique(target)
        wanted = "0 and 1" if transform == "logit" else "whole numbers from 0"
        fits = np.isin(found, (0, 1)) if transform == "logit" else (found >= 0) & (found % 1 == 0)
        if not fits.all():
            raise DataError(f"a target of classes: found {found[~fits][0]:.4g}, expected {wanted}")
        if len(found) < 2:
            raise DataError(f"all training rows are of class {found[0]:.0f}: nothing can be learnt")
        return cls(transform=transform, mean=0.0, std=1.0)

    @property
    def heads(self) -> tuple[TargetScale, ...]:
        return (self,)

    @property
    def unit(self) -> float:
        """How much one unit of the output is where it is 0, in the target's unit; 1 of classes."""
        if self.transform in ("logit", "category"):
            return 1.0
        below, above = self.unscale(np.array([-0.5, 0.5]))
        return float(above - below)

    def scale(self, target: Array) -> Array:
        values = np.log(target) if self.transform == "log" else target
        return np.asarray((values - self.mean) / self.std, dtype=np.float32)

    def unscale(self, output: Array) -> Array:
        outputs = np.asarray(output, dtype=np.float64)
        if self.transform == "logit":
            return np.asarray(expit(outputs))
        if self.transform == "category":
            return np.asarray(softmax(outputs, axis=-1))
        values = outputs * self.std + self.mean
        return np.exp(values) if self.transform == "log" else values

    def centre(self, values: Array) -> Array:
        """(members, n, ...) values -> (n, ...): those of the mean of the members' outputs."""
        match self.transform:
            case "identity":
                return np.asarray(values.mean(axis=0))
            case "log":
                return np.asarray(np.exp(np.log(values).mean(axis=0)))
            case "logit":
                return np.asarray(expit(logit(values).mean(axis=0)))
            case "category":
                return np.asarray(softmax(np.log(values).mean(axis=0), axis=-1))


class TargetScales(BaseModel):
    """Several targets of a row, (n, k); nan where one is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    heads: tuple[TargetScale, ...]

    def scale(self, target: Array) -> Array:
        return self._each("scale", target)

    def unscale(self, output: Array) -> Array:
        return self._each("unscale", output)

    def centre(self, values: Array) -> Array:
        """(members, n, k) -> (n, k)."""
        return self._each("centre", values)

    def _each(self, method: str, values: Array) -> Array:
        columns = [getattr(head, method)(values[..., k]) for k, head in enumerate(self.heads)]
        return np.stack(columns, axis=-1)


Scale = TargetScale | TargetScales


def scale_of(
    targets: Sequence[Array], transforms: Sequence[Transform], names: Sequence[str]
) -> Scale:
    """The scale of one target, or of several. Raises DataError naming the field that does not suit."""
    heads = []
    for target, transform, name in zip(targets, transforms, names, strict=True):
        try:
            heads.append(TargetScale.of(target, transform))
        except DataError as error:
            raise DataError(f"field {name}: {error}") from None
    return heads[0] if len(heads) == 1 else TargetScales(heads=tuple(heads))
