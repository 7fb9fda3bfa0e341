"""Text and arrays -> a field's values; what does not fit is named, never changed in silence."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from dmi_hpc.data.manifest import SPLITS, Field
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
Problems = dict[int, str]  # position -> why it is no value of the field

_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")
_PADDED = re.compile(r"\s*[+-]?0[0-9]+\s*")  # 007 names something: as a number it were 7
_EXACT = 2**53  # below, every integer is a float64
_LONG = 4000  # digits that Python turns into an integer
_TRUE_FALSE = {"true": 1, "false": 0}
_SPLIT_NAMES = {
    **{name: index for index, name in enumerate(SPLITS)},
    **dict.fromkeys(("training", "0"), 0),
    **dict.fromkeys(("val", "valid", "dev", "1"), 1),
    **dict.fromkeys(("testing", "2"), 2),
}


@dataclass(frozen=True)
class Texts:
    """What the cells of a column look like: how many of each kind, and the longest in bytes.

    padded: those of the integers that begin with zeros. others: text, and integers beyond 64 bits,
    which no dtype holds.
    """

    integers: int = 0
    floats: int = 0
    truths: int = 0
    others: int = 0
    empty: int = 0
    longest: int = 0
    padded: int = 0

    @classmethod
    def of(cls, cells: Sequence[str]) -> Texts:
        ascii_only = "".join(cells).isascii()
        longest = max((len(c) if ascii_only else len(c.encode()) for c in cells), default=0)
        filled = [cell for cell in cells if cell.strip()]
        empty = len(cells) - len(filled)
        if _all_numbers(filled):
            whole = [cell for cell in filled if _INTEGER.fullmatch(cell)]
            huge = sum(map(_is_huge, whole))
            floats, padded = len(filled) - len(whole), _count_padded(whole)
            return cls(len(whole) - huge, floats, 0, huge, empty, longest, padded)
        count = [_kind(cell) for cell in filled].count
        numbers = count("int"), count("float"), count("truth")
        return cls(*numbers, count("text"), empty, longest, _count_padded(filled))

    def __add__(self, other: Texts) -> Texts:
        return Texts(
            self.integers + other.integers,
            self.floats + other.floats,
            self.truths + other.truths,
            self.others + other.others,
            self.empty + other.empty,
            max(self.longest, other.longest),
            self.padded + other.padded,
        )

    def dtype(self, floats: str) -> str:
        """Of a field that holds them: a number or truth value if at least half of the filled are.

        The rest are then bad records: one `n/a` does not turn a million numbers into text. Integers
        that begin with zeros are identifiers, unless there are floats beside them.
        """
        filled = self.integers + self.floats + self.truths + self.others
        if self.padded and not self.floats:
            return f"S{self.longest}"
        if filled and 2 * (self.integers + self.floats) >= filled:
            return floats if self.floats else "int64"
        if filled and 2 * self.truths >= filled:
            return "uint8"
        return f"S{max(1, self.longest)}"


def _all_numbers(cells: Sequence[str]) -> bool:
    """Python reads 1_000 as a number; people use such texts as names."""
    try:
        list(map(float, cells))
    except ValueError:
        return False
    return "_" not in "".join(cells)


def _count_padded(cells: Sequence[str]) -> int:
    return sum(_PADDED.fullmatch(cell) is not None for cell in cells)


def _is_huge(integer: str) -> bool:
    """No dtype holds it."""
    return len(integer) > 18 and (len(integer) > _LONG or abs(int(integer)) >= 2**63)


def _kind(cell: str) -> str:
    if _INTEGER.fullmatch(cell):
        return "text" if _is_huge(cell) else "int"
    if cell.strip().lower() in _TRUE_FALSE:
        return "truth"
    return "float" if _all_numbers([cell]) else "text"


def from_texts(field: Field, cells: Sequence[str]) -> tuple[Array, Problems]:
    """(n,) values of a field of no shape, 0 where there is a problem."""
    assert field.shape == (), "a cell holds one value"
    if not field.numeric:
        return _encoded(field, [cell.encode() for cell in cells])
    problems: Problems = {}
    if not _all_numbers(cells):
        cells = list(cells)
        for i, cell in enumerate(cells):
            if (truth := _TRUE_FALSE.get(cell.strip().lower())) is not None:
                cells[i] = str(truth)
            elif not _all_numbers([cell]):
                wanted = "an integer" if field.numpy.kind in "iu" else "a number"
                problems[i] = f"expected {wanted}, found {_quoted(cell)}"
                cells[i] = "0"
    if field.numpy.kind in "iu":
        values, more = _integers(field, cells)
    else:
        floats = np.array([float(c) for c in cells], dtype=np.float64)
        values, more = from_array(field, floats)
        more |= _rounded(cells, floats)
    return values, {**more, **problems}


def _rounded(cells: Sequence[str], floats: Array) -> Problems:
    """Integers that a float64 holds only without their last digits: identifiers, most likely."""
    large = np.flatnonzero(np.isfinite(floats) & (np.abs(floats) >= _EXACT)).tolist()
    return {
        i: f"the integer {cells[i].strip()} loses digits as a float: expected int64 or text"
        for i in large
        if _INTEGER.fullmatch(cells[i]) and int(cells[i]) != int(floats[i])
    }


def _integers(field: Field, cells: Sequence[str]) -> tuple[Array, Problems]:
    """Of texts of numbers; never through a float, which is exact only below 2**53."""
    limits, problems = np.iinfo(field.dtype), {}
    if all(map(_INTEGER.fullmatch, cells)) and max(map(len, cells), default=0) <= _LONG:
        whole = list(map(int, cells))
        if limits.min <= min(whole, default=0) and max(whole, default=0) <= limits.max:
            return np.array(whole, dtype=field.numpy), {}
    numbers = np.zeros(len(cells), dtype=field.numpy)
    for i, cell in enumerate(cells):
        if not math.isfinite(float(cell)):
            problems[i] = f"expected finite values, found {float(cell)}"
            continue
        exact = Decimal(cell.strip())
        if exact != exact.to_integral_value():
            problems[i] = f"{cell.strip()} cannot be stored as {field.dtype}"
        elif not limits.min <= exact <= limits.max:
            problems[i] = f"{cell.strip()} is out of the range of {field.dtype}"
        else:
            numbers[i] = int(exact)
    return numbers, problems


def from_array(field: Field, found: Array) -> tuple[Array, Problems]:
    """(n, *shape) of any dtype as the field's, 0 where a value is not finite or does not fit."""
    if found.shape[1:] != field.shape:
        raise DataError(f"expected {field.shape} an entry, found {found.shape[1:]}")
    if (found.dtype.kind in "SUO") == field.numeric:
        kind = "numbers" if field.numeric else "text"
        raise DataError(
            f"field {field.name!r}: expected {kind} for {field.dtype}, found {found.dtype}"
        )
    if not field.numeric:
        return _encoded(field, [_bytes_of(item) for item in found])
    per_entry = tuple(range(1, found.ndim))
    with np.errstate(over="ignore", invalid="ignore"):
        values = found.astype(field.numpy)
        if field.numpy.kind == "f":
            bad = ~np.isfinite(values).all(axis=per_entry)
        elif found.dtype.kind == "b":
            bad = np.zeros(len(found), dtype=bool)
        else:
            limits = np.iinfo(field.dtype)
            # as floats, the largest integers round up to one more than they are
            below = (
                found < float(limits.max) + 1 if found.dtype.kind == "f" else found <= limits.max
            )
            inside = (found >= limits.min) & below & (values == found)
            bad = ~inside.all(axis=per_entry)
    problems = {int(i): _why(field, found[i]) for i in np.flatnonzero(bad)}
    values[bad] = 0
    return values, problems


def _why(field: Field, entry: Array) -> str:
    flat = np.asarray(entry).reshape(-1)
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        worst = flat[~np.isfinite(flat)][0]
        return f"expected finite values, found {worst}"
    if flat.size == 1:
        return f"{flat[0]} cannot be stored as {field.dtype}"
    return f"values from {flat.min()} to {flat.max()} cannot be stored as {field.dtype}"


def _bytes_of(item: Any) -> bytes:
    return item.encode() if isinstance(item, str) else bytes(item)


def _encoded(field: Field, cells: list[bytes]) -> tuple[Array, Problems]:
    size, problems = field.numpy.itemsize, {}
    for i, cell in enumerate(cells):
        if len(cell) > size:
            problems[i] = f"{len(cell)} bytes of text, the field holds {size} ({field.dtype})"
        elif cell.endswith(b"\0"):
            problems[i] = "text that ends in a zero byte"
        else:
            continue
        cells[i] = b""
    return np.array(cells, dtype=field.numpy), problems


def _quoted(cell: str) -> str:
    return repr(cell if len(cell) <= 40 else cell[:37] + "...") if cell.strip() else "nothing"


def splits_from(names: Sequence[str]) -> tuple[Array, Problems]:
    """Index into SPLITS of texts such as "train", "val" or "2"."""
    found = [_SPLIT_NAMES.get(name.strip().lower(), -1) for name in names]
    problems = {
        i: f"expected train, validation or test, found {_quoted(names[i])}"
        for i, split in enumerate(found)
        if split < 0
    }
    return np.array([max(0, split) for split in found], dtype=np.uint8), problems


def finite_float(text: str) -> float:
    """Raises DataError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"expected a finite value, found {text!r}")
    return value
