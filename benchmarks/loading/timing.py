"""Rates measured in turns: what disturbs the machine disturbs all that are compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Window = Callable[[], float]  # -> samples a second
Rates = dict[str, list[float]]  # one of each repetition


@dataclass(frozen=True)
class Settings:
    seconds: float  # of one window at least
    rival_seconds: float
    repetitions: int
    small: bool

    @classmethod
    def of(cls, *, quick: bool) -> Settings:
        return cls(0.02, 0.2, 2, True) if quick else cls(0.4, 1.0, 5, False)


def repeated(epoch: Callable[[], int], seconds: float) -> Window:
    """Whole epochs, until the window is over. epoch: returns how many samples it read."""

    def window() -> float:
        samples, started = 0, time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds or not samples:
            samples += epoch()
        return samples / spent

    return window


def interleaved(
    contenders: Mapping[str, Window], repetitions: int, *, warm_up: bool = True
) -> Rates:
    """Windows of all in turns, every second round backwards; a round before them warms up."""
    rates: Rates = {name: [] for name in contenders}
    for name in contenders if warm_up else ():
        contenders[name]()
    for repetition in range(repetitions):
        for name in list(contenders)[:: -1 if repetition % 2 else 1]:
            rates[name].append(contenders[name]())
    return rates


def ratio(rates: Rates, of: str, to: str) -> float:
    """Median of the ratios of each repetition."""
    return median(a / b for a, b in zip(rates[of], rates[to], strict=True))


def best(rates: Rates, names: list[str]) -> str:
    return max(names, key=lambda name: median(rates[name]))
