"""Rows that are several computations of one thing, of which the lowest value counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Groups:
    """Rows of equal names: the orderings of ions on the sites of a compound, of which nature takes the
    lowest."""

    def __init__(self, names: Sequence[Any] | Array) -> None:
        """names: (n,)."""
        _, first, self._of_row = np.unique(
            np.asarray(names), return_index=True, return_inverse=True
        )
        # in the order in which they come
        self._order = np.argsort(first)
        self.first = first[self._order]  # (groups,) the first row of each

    def least(self, values: Array) -> Array:
        """(n,) -> (groups,), in the order in which groups begin."""
        found = np.full(len(self.first), np.inf)
        np.minimum.at(found, self._of_row, values)
        return found[self._order]
