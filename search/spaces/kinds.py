"""Kinds of one parameter: how it is drawn, changed a little, and turned into numbers."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log, sqrt
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from dmi_hpc.config import Config

Value = bool | int | float | str | None
When = Mapping[str, tuple[Value, ...]]  # other parameter -> its values for which this one exists

STEP_DECADES = (-2.0, -0.5)  # widths of a number's steps, as powers of ten of its range
TINY = 1e-9
FURTHER = 0.25  # chance that a step among ordered choices goes one choice further
ONE_HOT = 1 / sqrt(2)  # two different categories are at distance 1


class _Kind(Config):
    when: When = Field(default_factory=dict)


class Choice(_Kind):
    """One of some values; `ordered` if neighbours are alike (batch sizes), else a set."""

    kind: Literal["choice"] = "choice"
    values: tuple[Value, ...] = Field(min_length=1)
    ordered: bool = False

    @model_validator(mode="after")
    def _distinct(self) -> Choice:
        if len({repr(value) for value in self.values}) < len(self.values):
            raise ValueError(f"expected distinct values, found {self.values!r}")
        return self

    @property
    def varies(self) -> bool:
        return len(self.values) > 1

    @property
    def smooth(self) -> bool:
        """Whether small steps make sense."""
        return self.ordered and self.varies

    def holds(self, value: Any) -> bool:
        return any(value == v and type(value) is type(v) for v in self.values)

    def random(self, rng: np.random.Generator) -> Value:
        return self.values[int(rng.random() * len(self.values))]

    def stepped(self, value: Value, rng: np.random.Generator) -> Value:
        """A neighbour if they are ordered, else any other one; `value` if it is the only one."""
        if not self.varies:
            return value
        last, place = len(self.values) - 1, self.values.index(value)
        if not self.ordered:
            return self.values[(place + 1 + int(rng.random() * last)) % (last + 1)]
        upwards = place == 0 or (place < last and rng.random() < 0.5)
        room = last - place if upwards else place
        distance = 1
        while distance < room and rng.random() < FURTHER:
            distance += 1
        return self.values[place + distance if upwards else place - distance]

    def numbers(self, value: Value) -> list[float]:
        """Coordinates for distances between configurations."""
        place = self.values.index(value)
        if self.ordered:
            return [place / max(1, len(self.values) - 1)]
        return [ONE_HOT * (i == place) for i in range(len(self.values))]

    def absent(self) -> list[float]:
        """`numbers` where the parameter does not exist."""
        return [0.5] if self.ordered else [0.0] * len(self.values)


class _Range(_Kind):
    """What reals and integers share. Positions run from 0 at `low` to 1 at `high`."""

    low: float
    high: float
    log: bool = False
    step: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _ascending(self) -> _Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"expected low < high (and low > 0 if log), found {self.low:g} and {self.high:g}"
            )
        return self

    @property
    def varies(self) -> bool:
        return True

    @property
    def smooth(self) -> bool:
        return True

    def position(self, value: Value) -> float:
        number = float(value)  # type: ignore[arg-type]  # `holds` has seen it
        if self.log:
            return log(number / self.low) / log(self.high / self.low)
        return (number - self.low) / (self.high - self.low)

    def at(self, position: float) -> float:
        """The number at `position`, clipped to the range; multiples of `step` above `low`."""
        position = min(max(position, 0.0), 1.0)
        span = self.high - self.low
        number = self.low + position * span
        if self.log:
            number = self.low * exp(position * log(self.high / self.low))
        if self.step is not None:
            number = self.low + min(round((number - self.low) / self.step), self._steps) * self.step
        return min(max(number, self.low), self.high)

    @property
    def _steps(self) -> int:
        assert self.step is not None
        return int((self.high - self.low) / self.step + 1e-9)

    def holds(self, value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high

    def random(self, rng: np.random.Generator) -> Value:
        if self.step is not None and not self.log:  # the ends are as likely as the rest
            return self.at(
                int(rng.random() * (self._steps + 1)) * self.step / (self.high - self.low)
            )
        return self.at(rng.random())

    def stepped(self, value: Value, rng: np.random.Generator) -> Value:
        """A normal step whose width is drawn over a decade and a half; of steps at least one."""
        place = self.position(value)
        move = 10.0 ** rng.uniform(*STEP_DECADES) * float(rng.standard_normal())
        found = self.at(place + move)
        if self.step is None or found != value:
            return found
        number = float(value)
        sides = [number + way for way in (-self.step, self.step)]
        sides = [n for n in sides if self.low - TINY <= n <= self.high + TINY]
        return self.at(self.position(sides[int(rng.random() * len(sides))])) if sides else value

    def numbers(self, value: Value) -> list[float]:
        return [self.position(value)]

    def absent(self) -> list[float]:
        return [0.5]


class Real(_Range):
    """A real number in [low, high]; `log`: uniform in its logarithm; `step`: low + k step only."""

    kind: Literal["real"] = "real"


class Integer(_Range):
    """An integer in [low, high], both included."""

    kind: Literal["integer"] = "integer"
    low: int
    high: int
    step: int = Field(1, ge=1)

    def at(self, position: float) -> int:
        return round(super().at(position))

    def holds(self, value: Any) -> bool:
        return isinstance(value, int) and super().holds(value)


Parameter = Annotated[Choice | Real | Integer, Field(discriminator="kind")]
