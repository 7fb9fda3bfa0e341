"""What all kinds of genes are drawn and repaired with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def pick(values: Sequence[T], rng: np.random.Generator) -> T:
    """One of `values`, uniformly (much faster than ``rng.choice``)."""
    return values[int(rng.random() * len(values))]


def within(blocks: tuple[T, ...], limits: tuple[int, int], plain: T) -> tuple[T, ...]:
    """`blocks` with a depth within `limits`: the last ones go, or are repeated; `plain` if none."""
    least, most = limits
    missing = least - len(blocks)
    if missing > 0:
        return blocks + (blocks[-1] if blocks else plain,) * missing
    return blocks[:most]
