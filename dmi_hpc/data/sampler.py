"""Which row comes when: pure functions of (seed, epoch, position). No state, O(1) memory.

Every rank computes its own share, so the sequence of global batches does not depend on the number
of ranks, and a training resumes from one integer: how many samples of the epoch all ranks together
have consumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

from dmi_hpc.data.permutation import Ids, Permutation, Words, cut, round_keys
from dmi_hpc.errors import DataError

Weights = np.ndarray[Any, np.dtype[np.float32]]

Shuffle = Literal["none", "global", "block"]
Tail = Literal["keep", "drop", "wrap"]


@dataclass(frozen=True)
class Order:
    """Which row stands at each position of an epoch: a bijection of range(rows) for each epoch.

    shuffle "none": the order of the rows. "global": one permutation of all rows. "block": blocks of
    `block_rows` consecutive rows are permuted, then rows are permuted within windows of
    `window_blocks` blocks that follow one another, so a reader needs one window at a time.

    parts: rows are cut into `parts` contiguous ranges (`part_rows`), each shuffled by itself; an
    equal share of every global batch of `batch_size`, in order, comes from each part. So a rank
    needs the parts of its slice only (`parts_of`), while the sequence of global batches is the same
    at any number of ranks. What parts have beyond the last full batch comes at the end, in order of
    parts. The order then depends on `batch_size`: in mid-epoch it cannot change (`check_resume`).
    Blocks are counted from row 0, and one that two parts share is read in both. Memory: O(parts).
    """

    seed: int
    rows: int
    shuffle: Shuffle = "global"
    block_rows: int = 0  # needed by "block"
    window_blocks: int = 64
    parts: int = 1
    batch_size: int = 1  # needed by parts > 1: a multiple of parts

    def __post_init__(self) -> None:
        _choice("shuffle", self.shuffle, get_args(Shuffle))
        _least(self, seed=0, rows=0, window_blocks=1, parts=1, batch_size=1)
        _least(self, block_rows=1 if self.shuffle == "block" else 0)
        if self.batch_size % self.parts:
            raise DataError(
                f"a batch of {self.batch_size} cannot be shared equally by {self.parts} parts; "
                "choose a batch size that is a multiple of the number of parts"
            )

    def index(self, epoch: int, positions: Ids) -> Ids:
        """Row at each position, (n,) int64 in range(rows) -> (n,) int64. Raises IndexError."""
        part, local = self._locate(positions)
        if self.shuffle == "block":
            return _layout(self, epoch).rows(part, local)
        starts = _starts(self.rows, self.parts)
        inside = local if self.shuffle == "none" else _shuffle(self, epoch).index(local, part)
        return starts[part] + inside

    def part_rows(self, part: int) -> range:
        """Rows of a part. Raises IndexError."""
        part, starts = range(self.parts)[part], _starts(self.rows, self.parts)
        return range(int(starts[part]), int(starts[part + 1]))

    def parts_of(self, rank: int, size: int) -> range:
        """Parts that `rank_slice` of full global batches touches (padding included).

        The fewer than batch_size + parts rows at the end of an epoch may be of any part.
        """
        if not 0 <= rank < size:
            raise IndexError(f"rank {rank} of {size}")
        each, share = -(-self.batch_size // size), self.batch_size // self.parts
        first, last = (min(rank * each + k, self.batch_size - 1) for k in (0, each - 1))
        return range(first // share, last // share + 1)

    def check_resume(self, position: int, batch_size: int) -> None:
        """Refuse (DataError) what would drop or repeat rows; batch_size: that from `position` on."""
        if self.parts > 1 and batch_size != self.batch_size and 0 < position < self.rows:
            raise DataError(
                f"the epoch was begun with global batches of {self.batch_size}, which cannot become "
                f"{batch_size} at position {position} as its order has {self.parts} parts; "
                "keep the batch size until the epoch ends, or train with parts = 1"
            )

    @property
    def windows(self) -> int:
        """Number of windows of an epoch, shuffle "block" only."""
        return int(_layout(self, 0).windows[-1])

    def window_of(self, epoch: int, positions: Ids) -> Ids:
        """Window that each position reads, (n,) int64; parts count on. Shuffle "block" only."""
        part, local = self._locate(positions)
        return _layout(self, epoch).window(part, local)

    def blocks(self, epoch: int, window: int) -> Ids:
        """Blocks of a window in reading order, (<= window_blocks,) int64. Raises IndexError.

        Block b is the rows from b * block_rows on. Shuffle "block" only.
        """
        layout = _layout(self, epoch)
        if not 0 <= window < layout.windows[-1]:
            raise IndexError(f"window {window} of {layout.windows[-1]}")
        part = np.asarray(np.searchsorted(layout.windows, window, side="right") - 1)
        first = (window - int(layout.windows[part])) * self.window_blocks
        stop = min(first + self.window_blocks, int(layout.count[part]))
        return layout.blocks(part, np.arange(first, stop))

    def _locate(self, positions: Ids) -> tuple[Ids, Ids]:
        """Part, () or (n,), and place within it, (n,), of each position."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and (positions.min() < 0 or positions.max() >= self.rows):
            raise IndexError(f"positions must be in [0, {self.rows})")
        if self.parts == 1:
            return np.zeros((), dtype=np.int64), positions
        share = self.batch_size // self.parts
        steps = self.rows // self.parts // share  # batches to which every part gives its share
        step = positions // self.batch_size
        slot = positions - step * self.batch_size
        part = slot // share
        local = step * share + slot - part * share
        rest = np.flatnonzero(step >= steps)
        if rest.size:
            over = positions[rest] - steps * self.batch_size
            starts = _starts(self.rows, self.parts) - np.arange(self.parts + 1) * (steps * share)
            part[rest] = np.searchsorted(starts, over, side="right") - 1
            local[rest] = steps * share + over - starts[part[rest]]
        return part, local


def _starts(rows: int, parts: int) -> Ids:
    """l * rows // parts for l = 0 ... parts, (parts + 1,), without overflow."""
    part = np.arange(parts + 1, dtype=np.int64)
    return part * (rows // parts) + part * (rows % parts) // parts


@lru_cache(maxsize=4)
def _shuffle(order: Order, epoch: int) -> Permutation:
    """The global shuffle of each part."""
    sizes = np.diff(_starts(order.rows, order.parts))
    keys = round_keys(0, epoch, order.seed)
    return Permutation(keys, int(sizes.max()), sizes, np.arange(order.parts))


@dataclass(frozen=True)
class _Layout:
    """The block shuffle of one epoch. A place is a block's number in reading order of its part.

    A part's first and last block may lack rows, which leaves gaps on the axis of
    places * block_rows; `compact` numbers skip the gaps.
    """

    order: Order
    keys: Words  # of the rows in windows
    inner: Permutation  # of the blocks of each part but its first and last
    first: Ids  # (parts,) number of each part's first block
    count: Ids  # (parts,) its blocks
    ends: Ids  # (2, parts) places of its first and last block
    gaps: Ids  # (2, parts) where rows are missing, ascending ...
    missing: Ids  # (2, parts) ... and how many
    windows: Ids  # (parts + 1,) number of each part's first window

    def window(self, part: Ids, local: Ids) -> Ids:
        """Window of each position of a part, (n,); they are numbered through all parts."""
        length = self.order.block_rows * self.order.window_blocks
        return self.windows[part] + self._expand(part, local) // length

    def rows(self, part: Ids, local: Ids) -> Ids:
        """Row at each position of a part, (n,)."""
        if not local.size:
            return local
        height, blocks = self.order.block_rows, self.order.window_blocks
        windows = self.window(part, local)
        changes = np.diff(windows, prepend=-1) != 0  # a batch has few runs in one window
        run = np.cumsum(changes) - 1
        window, owner = windows[changes], cut(part, changes)
        place = (window - self.windows[owner]) * blocks
        end = np.minimum(place + blocks, self.count[owner])
        start, stop = (self._compact(owner, each * height) for each in (place, end))
        permutation = Permutation(self.keys, height * blocks, stop - start, window)
        start = start[run]
        padded = self._expand(part, start + permutation.index(local - start, run))
        places = padded // height
        if len(window) * blocks > len(local):
            return (self.blocks(part, places) - places) * height + padded
        grid = np.minimum(place[:, None] + np.arange(blocks), end[:, None] - 1)
        table = self.blocks(np.broadcast_to(owner, len(window)).repeat(blocks), grid.ravel())
        block: Ids = table[places + (np.arange(len(window)) * blocks - place)[run]]
        return (block - places) * height + padded

    def blocks(self, part: Ids, place: Ids) -> Ids:
        """Block at each place, (n,)."""
        first, last = self.ends[:, part]
        count = self.count[part]
        inner = place - (place > first) - (place > last)
        inner = np.clip(inner, 0, np.maximum(count - 3, 0))  # first and last are not asked for
        block = 1 + self.inner.index(inner, part)
        block[place == last] = cut(count - 1, place == last)
        block[place == first] = 0
        return self.first[part] + block

    def _expand(self, part: Ids, compact: Ids) -> Ids:
        for gap, missing in zip(self.gaps, self.missing, strict=True):
            compact = compact + missing[part] * (compact >= gap[part])
        return compact

    def _compact(self, part: Ids, padded: Ids) -> Ids:
        skipped = np.zeros((), dtype=np.int64)
        for gap, missing in zip(self.gaps, self.missing, strict=True):
            skipped = skipped + np.clip(padded - gap[part], 0, missing[part])
        return padded - skipped


@lru_cache(maxsize=4)
def _layout(order: Order, epoch: int) -> _Layout:
    assert order.shuffle == "block", "windows exist in block shuffle only"
    height, starts, names = (
        order.block_rows,
        _starts(order.rows, order.parts),
        np.arange(order.parts),
    )
    first = starts[:-1] // height
    count = np.where(np.diff(starts), -(-starts[1:] // height) - first, 0)
    most = int(count.max())
    ends_keys, inner_keys, row_keys = (round_keys(k, epoch, order.seed) for k in (1, 2, 3))
    # Where a permutation of all blocks puts 0 and 1: any two places are equally likely.
    places = Permutation(ends_keys, most, np.maximum(count, 1), names)
    ends = np.stack([places.index(np.minimum(k, np.maximum(count - 1, 0)), names) for k in (0, 1)])
    inner = Permutation(inner_keys, most, np.maximum(count - 2, 1), names)
    missing = np.stack([starts[:-1] - first * height, (first + count) * height - starts[1:]])
    gaps = np.stack([ends[0] * height, (ends[1] + 1) * height - missing[1]])
    ascending = np.argsort(gaps, axis=0, kind="stable")
    gaps, missing = (np.take_along_axis(each, ascending, axis=0) for each in (gaps, missing))
    windows = np.append(0, np.cumsum(-(-count // order.window_blocks)))
    return _Layout(order, row_keys, inner, first, count, ends, gaps, missing, windows)


@dataclass(frozen=True)
class Batches:
    """An epoch cut into global batches, from any position on.

    A training is resumed by the position alone, the samples of the epoch that all ranks together
    have consumed; the batch size may be another then (but see Order on parts).

    tail: what becomes of the last, incomplete batch. "keep": it is shorter, so that every row comes
    once. "drop": it is left out. "wrap": the epoch's first positions fill it, and so repeat.
    """

    rows: int
    batch_size: int
    tail: Tail = "keep"

    def __post_init__(self) -> None:
        _choice("tail", self.tail, get_args(Tail))
        _least(self, rows=0, batch_size=1)

    def steps(self, start: int = 0) -> int:
        """Batches from a position in [0, rows] on. Raises DataError."""
        if not 0 <= start <= self.rows:
            raise DataError(
                f"position {start} of an epoch of {self.rows} rows; resume with the data set and "
                "split that the state was saved with"
            )
        left = self.rows - start
        return left // self.batch_size if self.tail == "drop" else -(-left // self.batch_size)

    def positions(self, start: int, step: int) -> Ids:
        """Positions of a batch, step 0 beginning at `start`, (<= batch_size,). Raises IndexError."""
        steps = self.steps(start)
        if not 0 <= step < steps:
            raise IndexError(f"step {step} of {steps}")
        first = start + step * self.batch_size
        positions = np.arange(first, first + self.batch_size, dtype=np.int64)
        return positions % self.rows if self.tail == "wrap" else positions[: self.rows - first]


def rank_slice(positions: Ids, rank: int, size: int) -> tuple[Ids, Weights]:
    """Rank's share of a global batch: (positions, weights), both (ceil(batch / size),).

    All ranks get equally many; padding repeats the last position at weight 0. Positions of weight 1
    over the ranks in order are exactly the global batch. Raises IndexError.
    """
    if not 0 <= rank < size:
        raise IndexError(f"rank {rank} of {size}")
    each = -(-len(positions) // size)
    wanted = np.arange(rank * each, (rank + 1) * each)
    weights = (wanted < len(positions)).astype(np.float32)
    return positions[np.minimum(wanted, len(positions) - 1)], weights


def _choice(name: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        raise DataError(f"{name} is {found!r}; choose one of {', '.join(known)}")


def _least(config: Any, **least: int) -> None:
    for name, value in least.items():
        if (found := getattr(config, name)) < value:
            raise DataError(f"{name} is {found}; it must be at least {value}")
