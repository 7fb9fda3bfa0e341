"""Memory that batches are read into, lent again once nobody holds a batch any more."""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Buffers:
    """A buffer is lent again when nobody holds what was lent before.

    Fresh memory for each batch would cost a page fault every 4 kB, more than the gather itself.
    Owners are arrays of bytes as they were made, for those alone are what all views hold: numpy lets
    a view hold the array that owns the memory, or shows somebody else's, not those in between.
    idle: free buffers of a field that are kept.
    """

    def __init__(self, *, pin: bool, idle: int) -> None:
        self._pin, self._idle, self._lock = pin, idle, threading.Lock()
        self._owners: dict[str, list[Array]] = {}

    def borrow(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """(shape) of dtype, not initialised."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            owners = self._owners.setdefault(name, [])
            place = self._free(owners, size)
            if place is None:
                # ragged batches differ in size: room for the next ones too
                owners.append(self._new(size + size // 4))
                place = len(owners) - 1
            return owners[place][:size].view(dtype).reshape(shape)

    def _free(self, owners: list[Array], size: int) -> int | None:
        """Place of a large enough buffer that only `owners` holds; free ones too small or many go."""
        found, idle = None, 0
        for place in range(len(owners) - 1, -1, -1):
            # references: the list's and getrefcount's own argument; views hold their owner
            if sys.getrefcount(owners[place]) > _HELD_BY_LIST:
                continue
            if len(owners[place]) >= size and idle < self._idle:
                found, idle = place, idle + 1
            else:
                del owners[place]
                found = found - 1 if found is not None else None
        return found

    def _new(self, size: int) -> Array:
        if not self._pin:
            return np.empty(size, dtype=np.uint8)
        import torch

        pinned: Array = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned


def _references_of_a_list_item() -> int:
    items = [np.empty(0)]
    return sys.getrefcount(items[0])


_HELD_BY_LIST = _references_of_a_list_item()
