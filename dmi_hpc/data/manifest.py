"""What a shard set is: ``manifest.json``, typed. Its presence is the commit point of a build.

The format is specified in docs/data-format.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import xxhash
from pydantic import (
    BaseModel,
    ConfigDict,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic import Field as Option

from dmi_hpc import files
from dmi_hpc.errors import DataError, FormatVersionError

FORMAT: Final = "dmi-shards"
VERSION: Final = 1
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")  # the index is what the field "split" stores

Array = np.ndarray[Any, np.dtype[Any]]
SplitName = Literal["train", "validation", "test"]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Field(_Plain):
    """One quantity of each row: dataset `/name` of shape (rows, *shape) in every shard."""

    name: str = Option(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")
    dtype: str = Option(description="of numpy: int8 ... uint64, float16 ... float64, or S<n>")
    shape: tuple[int, ...] = Option((), description="of one row")
    unit: str = Option(description='"1" if dimensionless, "" if it is no quantity')
    description: str

    @field_validator("dtype")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            found = np.dtype(name)
        except TypeError:
            found = np.dtype(object)
        if (
            found.kind not in "iufS"
            or found.itemsize == 0
            or (found.kind == "f" and found.itemsize > 8)
        ):
            raise ValueError(
                f"expected an int, uint or float type of numpy or S<bytes>, found {name!r}"
            )
        return name if found.kind == "S" else found.name

    @field_validator("shape")
    @classmethod
    def _positive(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if any(n < 1 for n in shape):
            raise ValueError(f"expected positive sizes, found {shape}")
        return shape

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """Element type as stored: little endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def row_bytes(self) -> int:
        return self.numpy.itemsize * int(np.prod(self.shape, dtype=np.int64))

    @property
    def numeric(self) -> bool:
        return self.numpy.kind != "S"


SPLIT = Field(
    name="split", dtype="uint8", unit="", description="0 = train, 1 = validation, 2 = test"
)


class SplitRule(_Plain):
    """Which split a row belongs to: a pure function of its group key (see `split_of`)."""

    seed: int = Option(ge=0, lt=2**64)
    validation: float = Option(ge=0, le=1, description="share of the keys")
    test: float = Option(ge=0, le=1, description="share of the keys")
    key: str = Option(description="what the key of a row is; equal keys share a split")

    @model_validator(mode="after")
    def _some_left(self) -> SplitRule:
        if self.validation + self.test > 1:
            raise ValueError(
                f"validation + test is {self.validation + self.test}, expected at most 1"
            )
        return self


def split_of(seed: int, key: str, validation: float, test: float) -> int:
    """Index into SPLITS of a row with this key.

    u = xxh3_64(key as UTF-8, seed) / 2**64 is uniform in [0, 1); test if u < test, validation if
    u < test + validation, else train. Raising one share moves no key between the other two's sides.
    """
    u = xxhash.xxh3_64_intdigest(key.encode(), seed=seed) / 2**64
    return 2 if u < test else 1 if u < test + validation else 0


class ShardRecord(_Plain):
    """One committed shard file."""

    file: str = Option(pattern=r"^[A-Za-z0-9_.-]+$")
    rows: int = Option(ge=1)
    bytes: int = Option(ge=1)
    xxh3: str = Option(pattern=r"^[0-9a-f]{16}$", description="xxh3_64 of the whole file")
    offsets: Mapping[str, int] = Option(description="field -> byte offset of its first element")


class Statistics(_Plain):
    """Of all elements of a numeric field over the training rows; population deviation."""

    mean: float
    std: float
    min: float
    max: float
    count: int = Option(ge=1, description="elements, not rows")


@dataclass(frozen=True)
class Moments:
    """Mergeable count, mean, squared deviations and range of float64 values."""

    count: int
    mean: float
    squares: float  # sum of squared deviations from the mean
    min: float
    max: float

    @classmethod
    def of(cls, values: Array) -> Moments:
        """Of a non-empty array."""
        mean = float(values.mean(dtype=np.float64))
        squares = float(np.square(values - np.float64(mean)).sum(dtype=np.float64))
        return cls(values.size, mean, squares, float(values.min()), float(values.max()))

    def merge(self, other: Moments) -> Moments:
        """Pairwise update of Chan, Golub & LeVeque (1979)."""
        count, delta = self.count + other.count, other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * other.count / count,
            self.squares + other.squares + delta * delta * self.count * other.count / count,
            min(self.min, other.min),
            max(self.max, other.max),
        )

    def statistics(self) -> Statistics:
        std = (self.squares / self.count) ** 0.5
        return Statistics(mean=self.mean, std=std, min=self.min, max=self.max, count=self.count)


class BuildPlan(_Plain):
    """Everything that decides the content of a shard set, and nothing else.

    The field "split" is added to `fields`. Row i lies in shard i // rows_per_shard.
    """

    task: str = Option(min_length=1)
    rows: int = Option(ge=1)
    rows_per_shard: int = Option(ge=1)
    fields: tuple[Field, ...] = Option(min_length=1)
    split_rule: SplitRule
    seed: int = Option(ge=0)
    provenance: Mapping[str, JsonValue] = Option({}, description="origin and options; no dates")

    @field_validator("fields")
    @classmethod
    def _with_split(cls, fields: tuple[Field, ...]) -> tuple[Field, ...]:
        names = [field.name for field in fields]
        if len(set(names)) < len(names):
            raise ValueError(f"expected distinct field names, found {', '.join(names)}")
        if SPLIT.name not in names:
            return (*fields, SPLIT)
        if SPLIT not in fields:
            raise ValueError(f"the field name {SPLIT.name!r} is reserved")
        return fields

    @property
    def shard_count(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Global row numbers of a shard; only the last shard may be smaller."""
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def plan_json(self) -> dict[str, JsonValue]:
        return self.model_dump(mode="json", include=set(BuildPlan.model_fields))

    def fingerprint(self) -> str:
        """Equal plans, equal fingerprints; also of a manifest, for the plan it carried out."""
        text = json.dumps(self.plan_json(), sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_64_hexdigest(text.encode())


class Manifest(BuildPlan):
    """A plan that was carried out: the content of manifest.json."""

    format: Literal["dmi-shards"] = FORMAT
    version: Literal[1] = VERSION
    shards: tuple[ShardRecord, ...]
    split_rows: Mapping[SplitName, int]
    statistics: Mapping[str, Statistics] = Option(description="by field; empty without train rows")

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        expected = [len(self.shard_rows(k)) for k in range(self.shard_count)]
        found = [shard.rows for shard in self.shards]
        if found != expected:
            raise ValueError(
                f"{self.rows} rows at {self.rows_per_shard} per shard need {len(expected)} shards, "
                f"the last of {expected[-1]}; found rows {found[:8]} in {len(found)} shards"
            )
        if sum(self.split_rows.values()) != self.rows:
            raise ValueError(f"split_rows {dict(self.split_rows)} do not sum to {self.rows} rows")
        names = {field.name for field in self.fields}
        for shard in self.shards:
            if set(shard.offsets) != names:
                raise ValueError(
                    f"{shard.file}: offsets of {sorted(shard.offsets)}, expected {names}"
                )
        return self

    @property
    def identity(self) -> str:
        """Of the plan and every byte made from it: equal only for the same rows in the same splits."""
        text = self.fingerprint() + "".join(shard.xxh3 for shard in self.shards)
        return xxhash.xxh3_128_hexdigest(text.encode())

    def field(self, name: str) -> Field:
        """The field of this name; DataError lists the names there are."""
        for field in self.fields:
            if field.name == name:
                return field
        raise DataError(f"no field {name!r}; found {', '.join(f.name for f in self.fields)}")


def require_identity(recorded: str, found: str, *, maker: str) -> None:
    """Raises DataError if `maker` was made from another data set; "" stands for not recorded."""
    if recorded and found and recorded != found:
        raise DataError(
            f"{maker}: made from data set {recorded}, found data set {found}: rows to be judged by "
            "may be rows learned from. Put the first one back, or start a new run (another --out)"
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit a build: atomic and durable."""
    files.write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def read_manifest(folder: Path) -> Manifest:
    """Raises DataError if it is missing or not valid, FormatVersionError if it is newer."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path}: no such file, so no complete data set is there. Make one with `dmi data "
            "build` or `dmi data import`; an interrupted build continues with the same command."
        ) from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}). Build the set again.") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DataError(f'{path}: expected "format": "{FORMAT}"; this is no shard set')
    version = raw.get("version")
    if isinstance(version, int) and version > VERSION:
        raise FormatVersionError(
            f"{path}: written in version {version} of {FORMAT}; this program reads up to version "
            f"{VERSION}. Update dmi-hpc, or build the set again with this version."
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors()[:5]
        )
        raise DataError(f"{path}: {problems}. Was it edited? Build the set again.") from None
