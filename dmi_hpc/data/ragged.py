"""Rows of different lengths: nodes of graphs, atoms of crystals, points of histories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Ids = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Ragged:
    """Row i is values[offsets[i] : offsets[i + 1]].

    values: (entries, *shape); offsets: (rows + 1,) int64, from 0 to entries, never falling; other
    integers are converted. Raises ValueError if they are not such.
    """

    values: Array
    offsets: Ids

    def __post_init__(self) -> None:
        given = np.asarray(self.offsets)
        if given.dtype.kind not in "iu":
            raise ValueError(f"offsets: expected integers, found {given.dtype}")
        o = given.astype(np.int64, copy=False)  # differences of unsigned ones never fall
        object.__setattr__(self, "offsets", o)
        if o.ndim != 1 or len(o) == 0 or o[0] != 0 or o[-1] != len(self.values):
            ends = [int(o[0]), int(o[-1])] if o.ndim == 1 and len(o) else "none"
            raise ValueError(f"offsets: expected 0 to {len(self.values)}, found {ends}")
        if len(o) > 1 and (np.diff(o) < 0).any():
            raise ValueError("offsets: expected never to fall")

    @classmethod
    def from_rows(cls, rows: Sequence[Array]) -> Ragged:
        """From at least one array (n_i, *shape)."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        return cls(np.concatenate(rows), offsets_of(lengths))

    @classmethod
    def concatenate(cls, parts: Sequence[Ragged]) -> Ragged:
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(np.concatenate([part.values for part in parts]), offsets_of(lengths))

    @property
    def lengths(self) -> Ids:
        """Entries of each row, (rows,) int64."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Array:
        """Entries of one row, (n, *shape), a view."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[Array]:
        return (self[row] for row in range(len(self)))

    def take(self, rows: Ids) -> Ragged:
        """These rows in this order."""
        lengths = self.lengths[rows]
        places = places_of(self.offsets[:-1][rows], lengths)
        return Ragged(self.values.take(places, axis=0), offsets_of(lengths))


def offsets_of(lengths: Ids) -> Ids:
    """(n,) lengths -> (n + 1,) offsets."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def places_of(starts: Ids, lengths: Ids) -> Ids:
    """starts[0], starts[0] + 1, ... for lengths[0] entries, then from starts[1], and so on."""
    offsets = offsets_of(lengths)
    places = np.repeat(starts - offsets[:-1], lengths)
    places += np.arange(offsets[-1], dtype=np.int64)
    return places


def row_of_entry(offsets: Ids) -> Ids:
    """The row that each entry belongs to, (entries,) int64."""
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))
