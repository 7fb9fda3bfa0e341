"""Mean, deviation, range and histogram of a field, merged from its shards: exact, in any order of rows.

The histogram's bins are dyadic: multiples of a power of two. Two histograms merge without error
however their ranges differ, so a set's statistics need one pass and no range known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, model_validator
from pydantic import Field as Option

Array = np.ndarray[Any, np.dtype[Any]]

BINS = 64  # at most; more than half of it unless the values are almost constant
_FINEST = 48  # bins are never narrower than 2**-48 of the largest magnitude: float64 has 52 bits
_SMALLEST = -1000  # and never below 2**-1000
_PIECE = 1 << 16  # elements turned into float64 at once: stays in the cache


class Histogram(BaseModel):
    """counts[i] values lie in [(first + i) 2**exponent, (first + i + 1) 2**exponent)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exponent: int = Option(ge=_SMALLEST, le=1024)
    first: int = Option(ge=-(2**62), le=2**62)
    counts: tuple[int, ...] = Option(min_length=1, max_length=BINS)

    @model_validator(mode="after")
    def _counts(self) -> Histogram:
        if min(self.counts) < 0:
            raise ValueError("expected counts of at least 0")
        return self

    @property
    def edges(self) -> Array:
        """(bins + 1,) float64; infinite past the largest number."""
        numbers = np.arange(len(self.counts) + 1, dtype=np.float64) + float(self.first)
        with np.errstate(over="ignore"):  # 2**1024 is the end of the last bin that there is
            return np.asarray(np.ldexp(numbers, self.exponent))

    def merge(self, other: Histogram) -> Histogram:
        exponent = max(self.exponent, other.exponent)
        while True:
            spans = [_coarsened(h, exponent) for h in (self, other)]
            first = min(low for low, _ in spans)
            bins = max(low + len(counts) for low, counts in spans) - first
            if bins <= BINS:
                break
            exponent += 1
        total = np.zeros(bins, dtype=np.int64)
        for low, counts in spans:
            total[low - first : low - first + len(counts)] += counts
        return Histogram(exponent=exponent, first=first, counts=tuple(total.tolist()))


def _coarsened(histogram: Histogram, exponent: int) -> tuple[int, Array]:
    """(first, counts) in wider bins."""
    shift = exponent - histogram.exponent
    first = histogram.first >> shift
    bins = (histogram.first + np.arange(len(histogram.counts), dtype=object)) >> shift
    places = (bins - first).astype(np.int64)
    return first, np.bincount(places, weights=histogram.counts).astype(np.int64)


def _exponent(low: float, high: float) -> int:
    """The smallest whose bins cover [low, high] with at most BINS: a function of the range alone."""
    if low == high == 0:
        return _SMALLEST  # whatever is merged with it has bins as wide as its own
    magnitude = math.frexp(max(abs(low), abs(high)))[1]
    exponent = max(_SMALLEST, magnitude - _FINEST)
    if high > low:
        exponent = max(exponent, math.frexp(high - low)[1] - BINS.bit_length())
    while _bin(high, exponent) - _bin(low, exponent) >= BINS:
        exponent += 1
    return exponent


def _bin(value: float, exponent: int) -> int:
    scaled = math.ldexp(value, -exponent)
    return -1 if value < 0 and scaled == 0 else math.floor(scaled)  # it may underflow


def _bins(values: Array, exponent: int) -> Array:
    """(n,) float64 whole numbers: the bin of each value."""
    scaled = np.ldexp(values, -exponent)
    bins = np.floor(scaled)
    if exponent > 0:  # it may underflow
        bins -= (values < 0) & (scaled == 0)
    return np.asarray(bins)


class Statistics(BaseModel):
    """Of all elements of a numeric field over the training rows; population deviation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mean: float
    std: float
    min: float
    max: float
    count: int = Option(ge=1, description="elements, not rows")
    histogram: Histogram


@dataclass(frozen=True)
class Moments:
    """Mergeable count, mean, population deviation, range and histogram of finite values."""

    count: int
    mean: float
    std: float
    min: float
    max: float
    histogram: Histogram

    @classmethod
    def of(cls, values: Array) -> Moments:
        """Of a non-empty array of finite numbers."""
        flat = values.reshape(-1)
        if flat.itemsize == 1:
            return cls._of_bytes(flat)
        low, high = float(flat.min()), float(flat.max())
        exponent = _exponent(low, high)
        first = _bin(low, exponent)
        counts = np.zeros(_bin(high, exponent) - first + 1, dtype=np.int64)
        # scaled below 1 by a power of two, exactly: no sum or square is too large or too small
        power = max(_SMALLEST, math.frexp(max(abs(low), abs(high)))[1])
        mean = math.fsum(_sum(piece) for piece in _pieces(flat, power)) / flat.size
        squares = 0.0
        for piece in _pieces(flat, power):
            squares += float(np.square(piece - mean).sum())
        for piece in _pieces(flat, 0):
            bins = (_bins(piece, exponent) - first).astype(np.int64)
            counts += np.bincount(bins, minlength=len(counts))
        mean, std = (math.ldexp(x, power) for x in (mean, math.sqrt(squares / flat.size)))
        if low == high:  # no rounding in what users divide by
            mean, std = low, 0.0
        histogram = Histogram(exponent=exponent, first=first, counts=tuple(counts.tolist()))
        return cls(flat.size, mean, std, low, high, histogram)

    @classmethod
    def _of_bytes(cls, flat: Array) -> Moments:
        """The same of 8-bit integers: 256 values at most, counted (voxels, images)."""
        least = int(flat.min())
        times = np.zeros(256, dtype=np.int64)
        for start in range(0, flat.size, _PIECE):
            piece = flat[start : start + _PIECE].astype(np.int64)
            times += np.bincount(piece - least, minlength=256)
        present = np.flatnonzero(times)
        times, found = times[present], present.astype(np.float64) + least
        mean = float((found * times).sum() / flat.size)
        std = math.sqrt(float((np.square(found - mean) * times).sum()) / flat.size)
        exponent = _exponent(found[0], found[-1])
        bins = _bins(found, exponent).astype(np.int64)
        counts = np.bincount(bins - bins[0], weights=times).astype(np.int64)
        histogram = Histogram(exponent=exponent, first=int(bins[0]), counts=tuple(counts.tolist()))
        return cls(flat.size, mean, std, float(found[0]), float(found[-1]), histogram)

    def merge(self, other: Moments) -> Moments:
        """Pairwise update of Chan, Golub & LeVeque (1979), written for deviations."""
        count = self.count + other.count
        mine, theirs = self.count / count, other.count / count
        half = other.mean / 2 - self.mean / 2  # the whole difference may be too large for a float
        return Moments(
            count,
            self.mean + half * theirs + half * theirs,
            math.hypot(
                self.std * math.sqrt(mine),
                other.std * math.sqrt(theirs),
                half * (2 * math.sqrt(mine * theirs)),
            ),
            min(self.min, other.min),
            max(self.max, other.max),
            self.histogram.merge(other.histogram),
        )

    def statistics(self) -> Statistics:
        return Statistics(
            mean=self.mean,
            std=self.std,
            min=self.min,
            max=self.max,
            count=self.count,
            histogram=self.histogram,
        )


def _pieces(flat: Array, power: int) -> Iterator[Array]:
    """float64, divided by 2**power."""
    scale = math.ldexp(1.0, -power)
    for start in range(0, flat.size, _PIECE):
        yield flat[start : start + _PIECE].astype(np.float64, copy=False) * scale


def _sum(piece: Array) -> float:
    return float(piece.sum(dtype=np.float64))
