"""Random orders without memory: keyed bijections of a range, a few nanoseconds each."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

Ids = np.ndarray[Any, np.dtype[np.int64]]
Words = np.ndarray[Any, np.dtype[np.uint64]]
Halves = np.ndarray[Any, np.dtype[Any]]  # uint32 or uint64

ROUNDS = 6  # 4 make a pseudo-random permutation (Luby & Rackoff 1988); 2 more for small domains
TINY = 256  # below, 6 rounds show in chi-square tests of pairs (up to 31 rows; 12 do not)
CHUNK = 16384  # values at a time: the scratch, 4 arrays of 64 or 128 kB, stays in a core's L2 cache


def mix(words: Words) -> Words:
    """Finaliser of SplitMix64 (Steele et al. 2014): every output bit depends on every input bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@lru_cache(maxsize=16)
def round_keys(*numbers: int) -> Words:
    """Keys of a Permutation, (2 * ROUNDS,), from integers >= 0; only the last may exceed 2**32."""
    state = np.random.SeedSequence(numbers).generate_state(2 * ROUNDS, np.uint64)
    keys = np.asarray(state, dtype=np.uint64)
    keys.flags.writeable = False
    return keys


class Permutation:
    """A bijection of range(rows) that the keys choose, in O(1) memory.

    Generalised Feistel network (Black & Rogaway 2002) on pairs (left, right) of Z_a x Z_b, a and b
    near sqrt(rows): each round adds a keyed hash of one half to the other. a b exceeds rows by less
    than a, mostly by far less; values there walk the cycle until they are below rows.

    keys: of `round_keys`. sizes and names, (m,) int64: instead of one permutation m independent
    ones, member k of range(sizes[k]), sizes[k] <= rows; names choose them as the keys do.
    """

    def __init__(
        self, keys: Words, rows: int, sizes: Ids | None = None, names: Ids | None = None
    ) -> None:
        word = np.dtype(np.uint32 if rows < 2**31 else np.uint64)  # a, b <= 2**(half the word)
        self.sizes = np.atleast_1d(np.asarray(rows if sizes is None else sizes, dtype=np.int64))
        distinct, which = np.unique(self.sizes, return_inverse=True)
        if len(distinct) == 1:
            self.sizes, which = distinct, np.zeros(1, dtype=np.int64)  # dividing by one is faster
        a, b = _sides(distinct)
        self._sides = a.astype(word)[which], b.astype(word)[which]
        self._tweaks = None if names is None else _high(mix(names.astype(np.uint64)), word)
        used = ROUNDS if rows >= TINY else 2 * ROUNDS
        self._keys = [key.reshape(()) for key in np.split(_high(keys[:used], word), used)]

    def index(self, values: Ids, member: Ids | None = None) -> Ids:
        """Where each value goes. values: (n,) in range(its size) -> (n,) int64.

        member: () or (n,), the permutation that each value moves in, default 0.
        """
        member = np.asarray(0 if member is None else member)
        out = self._pass(np.asarray(values, dtype=np.int64), member)
        outside = np.flatnonzero(out >= _pick(self.sizes, member))
        while outside.size:
            there = cut(member, outside)
            out[outside] = self._pass(out[outside], there)
            outside = outside[out[outside] >= _pick(self.sizes, there)]
        return out

    def _pass(self, values: Ids, member: Ids) -> Ids:
        """One pass of the network, chunk by chunk; results may lie outside."""
        out = np.empty(len(values), dtype=np.int64)
        scratch = np.empty((4, min(CHUNK, len(values))), dtype=self._keys[0].dtype)
        for start in range(0, len(values), CHUNK):
            here = slice(start, min(start + CHUNK, len(values)))
            there = cut(member, here)
            left, right, *spare = scratch[:, : here.stop - start]
            a, b = (_pick(side, there) for side in self._sides)
            tweak = None if self._tweaks is None else _pick(self._tweaks, there)
            spare[0][...] = values[here]
            np.floor_divide(spare[0], b, out=left)
            np.multiply(left, b, out=right)
            np.subtract(spare[0], right, out=right)
            for even, odd in zip(self._keys[::2], self._keys[1::2], strict=True):
                _round(left, right, a, (even, tweak), spare)
                _round(right, left, b, (odd, tweak), spare)
            np.multiply(left, b, out=left)
            np.add(left, right, out=left)
            out[here] = left
        return out


def _sides(sizes: Ids) -> tuple[Ids, Ids]:
    """a and b of each size: of 64 pairs near its root that with the least a b >= size."""
    # float64 roots are the same on every machine (IEEE 754), and any a makes a bijection.
    root = np.ceil(np.sqrt(np.maximum(sizes, 1))).astype(np.int64)[:, None]
    a = root + np.minimum(np.arange(64), root // 16)
    best = np.argmin(-sizes[:, None] % a, axis=1)[:, None]  # a b - size
    a = np.take_along_axis(a, best, axis=1)[:, 0]
    return a, -(-sizes // a)


def _high(words: Words, word: np.dtype[Any]) -> Halves:  # the highest bits
    return (words >> np.uint64(64 - 8 * word.itemsize)).astype(word)


def cut(array: Ids, where: Any) -> Ids:
    return array[where] if array.ndim else array


def _pick(table: Any, member: Ids) -> Any:
    """Each member's entry, (n,), or one of no dimension for all."""
    return table[0, ...] if len(table) == 1 else table[member]


# Multipliers and shift of a hash (lowbias32 of C. Wellons; SplitMix64), half a word's width, mask.
# Arrays of no dimension: numpy handles them twice as fast as its scalars.
_HASHES = {
    np.dtype(word): tuple(np.array(number, dtype=word) for number in numbers)
    for word, numbers in {
        np.uint32: (0x7FEB352D, 0x846CA68B, 15, 16, 0xFFFF),
        np.uint64: (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 29, 32, 0xFFFFFFFF),
    }.items()
}


def _round(
    half: Halves, other: Halves, modulus: Halves, key: tuple[Halves, Halves | None], spare: Any
) -> None:
    """half += hash(other, key), modulo modulus <= 2**(half the word)."""
    hashed, work = spare
    first, second, shift, width, mask = _HASHES[half.dtype]
    np.bitwise_xor(other, key[0], out=hashed)
    np.multiply(hashed, first, out=hashed)
    if key[1] is not None:
        np.bitwise_xor(hashed, key[1], out=hashed)
    np.right_shift(hashed, shift, out=work)
    np.bitwise_xor(hashed, work, out=hashed)
    np.multiply(hashed, second, out=hashed)
    # hashed * modulus / 2**bits, rounded down, from two products that fit a word
    np.bitwise_and(hashed, mask, out=work)
    np.multiply(work, modulus, out=work)
    np.right_shift(work, width, out=work)
    np.right_shift(hashed, width, out=hashed)
    np.multiply(hashed, modulus, out=hashed)
    np.add(hashed, work, out=hashed)
    np.right_shift(hashed, width, out=hashed)
    np.add(half, hashed, out=half)
    np.subtract(half, modulus, out=work)  # wraps around to a huge number where half < modulus
    np.minimum(half, work, out=half)
