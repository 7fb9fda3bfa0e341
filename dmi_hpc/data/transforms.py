"""Transforms of whole batches, for `ShardLoader(transform=...)`: they run in its threads.

    transform = Compose((Normalise.of(shards.manifest, ("y",)), VoxelSymmetry(("phase",))))

Every random choice is a function of the row's place in the epoch (`Batch.bits`), so a row is changed
in the same way at any number of ranks, threads and batch sizes, and after a resume. Two random
transforms of one pipeline need different `purpose`s to be independent.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from dmi_hpc.data.loader import Batch
from dmi_hpc.data.manifest import Manifest
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
Fields = Mapping[str, Any]

_SPATIAL = (-3, -2, -1)


class Transform(Protocol):
    """Gives all fields of a batch, those it does not change too."""

    def __call__(self, batch: Batch) -> Fields: ...


@dataclass(frozen=True)
class Compose:
    """One transform after the other."""

    transforms: tuple[Transform, ...]

    def __call__(self, batch: Batch) -> Fields:
        for transform in self.transforms:
            batch = replace(batch, fields=dict(transform(batch)))
        return batch.fields


@dataclass(frozen=True)
class Normalise:
    """(value - mean) / deviation, of dtype; scales: field -> (mean, deviation)."""

    scales: Mapping[str, tuple[float, float]]
    dtype: str = "float32"

    @classmethod
    def of(cls, manifest: Manifest, fields: Sequence[str], dtype: str = "float32") -> Normalise:
        """By the statistics of the training rows; a constant is only shifted. Raises DataError."""
        scales = {}
        for name in fields:
            manifest.field(name)
            found = manifest.statistics.get(name)
            if found is None:
                raise DataError(f"field {name!r} has no statistics: text, or no training rows")
            scales[name] = (found.mean, found.std or 1.0)
        return cls(scales, dtype)

    def __call__(self, batch: Batch) -> Fields:
        fields = dict(batch.fields)
        for name, (mean, deviation) in self.scales.items():
            # in float64: a large mean would take the digits of a float32
            fields[name] = _each(
                fields[name],
                lambda v, m=mean, d=deviation: ((v - np.float64(m)) / d).astype(self.dtype),
            )
        return fields


@dataclass(frozen=True)
class Cast:
    """Other dtypes; dtypes: field -> name of a numpy dtype."""

    dtypes: Mapping[str, str]

    def __call__(self, batch: Batch) -> Fields:
        fields = dict(batch.fields)
        for name, dtype in self.dtypes.items():
            fields[name] = _each(fields[name], lambda v, d=dtype: v.astype(d))
        return fields


@dataclass(frozen=True)
class Symmetry:
    """An element of the cube's group: axis i of the result is axis `axes[i]`, reversed if `flips[i]`."""

    axes: tuple[int, ...]
    flips: tuple[bool, ...]

    @property
    def proper(self) -> bool:
        """A rotation, without reflection."""
        parity = sum(a > b for a, b in itertools.combinations(self.axes, 2)) + sum(self.flips)
        return parity % 2 == 0

    def __call__(self, volumes: Array) -> Array:
        """(..., a, b, c) -> the same, permuted and reflected; a view."""
        first = volumes.ndim - 3
        turned = volumes.transpose(*range(first), *(first + axis for axis in self.axes))
        steps = (slice(None, None, -1 if flip else None) for flip in self.flips)
        return turned[(..., *steps)]


def cube_symmetries(keep: int | None = None, *, proper: bool = False) -> tuple[Symmetry, ...]:
    """The 48 of a cube, identity first; keep: 16 that map this axis to itself, reversed or not.

    proper: the half of them that are rotations.
    """
    if keep not in (None, 0, 1, 2):
        raise DataError(f"keep: expected an axis 0, 1 or 2, found {keep!r}")
    found = [
        Symmetry(axes, flips)
        for axes in itertools.permutations((0, 1, 2))
        for flips in itertools.product((False, True), repeat=3)
        if keep is None or axes[keep] == keep
    ]
    return tuple(s for s in found if s.proper or not proper)


@dataclass(frozen=True)
class VoxelSymmetry:
    """A random symmetry of the cube for each row, and a periodic shift if `shifts`.

    fields: dense, (..., a, b, c) an entry, scalars a voxel; all are changed alike, so one can be the
    input and another the field to predict. keep: an axis that stays, of load say; proper: no
    reflections. Whatever else the batch holds must not change under these operations.
    """

    fields: tuple[str, ...]
    keep: int | None = None
    proper: bool = False
    shifts: bool = False
    purpose: int = 1

    def __call__(self, batch: Batch) -> Fields:
        fields, symmetries = dict(batch.fields), cube_symmetries(self.keep, proper=self.proper)
        for name in self.fields:
            values = fields[name]
            _check_volumes(name, values, symmetries)
            if self.shifts and values.shape[-3:] != fields[self.fields[0]].shape[-3:]:
                raise DataError(f"field {name!r}: shifts need equally many voxels in all fields")
            operation, *shifts = _digits(
                batch.bits(self.purpose), (len(symmetries), *values.shape[-3:])
            )
            turned = np.empty_like(values)
            for number in np.unique(operation):  # all rows of one operation at once
                rows = np.flatnonzero(operation == number)
                turned[rows] = symmetries[number](values[rows])
            if self.shifts:
                # row by row: a copy of slabs, where one index for all would gather single voxels
                for row, shift in zip(turned, np.stack(shifts, axis=1).tolist(), strict=True):
                    row[...] = np.roll(row, shift, axis=_SPATIAL)
            fields[name] = turned
        return fields


@dataclass(frozen=True)
class CrystalRotation:
    """A random rotation of each row's frame, uniform over SO(3).

    vectors: fields whose entries are Cartesian vectors along the last axis: positions, forces, the
    cell (3, 3) with a lattice vector a row, a dipole. tensors: of rank 2, (..., 3, 3): stress.
    """

    vectors: tuple[str, ...]
    tensors: tuple[str, ...] = ()
    purpose: int = 2

    def __call__(self, batch: Batch) -> Fields:
        fields, rotations = dict(batch.fields), random_rotations(batch.bits(self.purpose))
        for name in self.vectors:
            fields[name] = _rotated(name, fields[name], rotations, rank=1)
        for name in self.tensors:
            fields[name] = _rotated(name, fields[name], rotations, rank=2)
        return fields


def random_rotations(bits: Array) -> Array:
    """(n,) uniform uint64 -> (n, 3, 3) float64, uniform over SO(3) (Shoemake 1992)."""
    u, v, w = (digit / 2**21 for digit in _digits(bits, (2**21,) * 3))
    low, high = np.sqrt(1 - u), np.sqrt(u)
    a, b = 2 * np.pi * v, 2 * np.pi * w
    x, y, z, s = low * np.sin(a), low * np.cos(a), high * np.sin(b), high * np.cos(b)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * s), 2 * (x * z + y * s)],
        [2 * (x * y + z * s), 1 - 2 * (x * x + z * z), 2 * (y * z - x * s)],
        [2 * (x * z - y * s), 2 * (y * z + x * s), 1 - 2 * (x * x + y * y)],
    ]
    return np.moveaxis(np.array(rows), -1, 0)


def _rotated(name: str, values: Any, rotations: Array, rank: int) -> Any:
    """R v of the last axis, or R T R' of the last two, of each row."""
    if isinstance(values, Ragged):
        each = np.repeat(rotations, values.lengths, axis=0)
        return Ragged(_rotated(name, values.values, each, rank), values.offsets)
    if values.ndim < 1 + rank or values.shape[-rank:] != (3,) * rank or values.dtype.kind != "f":
        raise DataError(
            f"field {name!r}: expected float entries (..., {', '.join(['3'] * rank)}) to rotate, "
            f"found {values.dtype} {values.shape[1:]}"
        )
    rotations = rotations.astype(values.dtype)
    for _ in range(rank):  # rank 2: T R', then its transpose (R T') R' is that of R T R'
        values = _turned(rotations, values)
        values = values.swapaxes(-2, -1) if rank == 2 else values
    return values


def _turned(rotations: Array, vectors: Array) -> Array:
    """R v of the last axis. Not einsum: the last bits of its sums depend on the other rows."""
    each = rotations.reshape(len(rotations), *(1 for _ in vectors.shape[2:]), 3, 3)
    x, y, z = (each[..., j] * vectors[..., j : j + 1] for j in range(3))
    return np.asarray(x + y + z)


def _each(values: Any, change: Any) -> Any:
    if isinstance(values, Ragged):
        return Ragged(change(values.values), values.offsets)
    return change(values)


def _check_volumes(name: str, values: Any, symmetries: Sequence[Symmetry]) -> None:
    if isinstance(values, Ragged) or values.ndim < 4:
        raise DataError(f"field {name!r}: expected dense entries (..., a, b, c), no volumes found")
    sides = values.shape[-3:]
    if any(sides[axis] != sides[i] for s in symmetries for i, axis in enumerate(s.axes)):
        raise DataError(
            f"field {name!r}: axes of {sides} voxels cannot be exchanged; keep the odd one (keep=...)"
        )


def _digits(bits: Array, sizes: Sequence[int]) -> list[Array]:
    """Independent numbers in range(size) from one uniform uint64 a row, (n,) int64 each.

    Their bias is the product of the sizes / 2**64.
    """
    found = []
    for size in sizes:
        bits, digit = np.divmod(bits, np.uint64(size))
        found.append(digit.astype(np.int64))
    return found
