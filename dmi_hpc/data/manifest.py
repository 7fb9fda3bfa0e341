"""What a shard set is: ``manifest.json``, typed. Its presence is the commit point of a build.

The format is specified in docs/data-format.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import numpy as np
import xxhash
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic import Field as Option

from dmi_hpc import files
from dmi_hpc.data.statistics import Statistics
from dmi_hpc.errors import DataError, FormatVersionError

FORMAT: Final = "dmi-shards"
VERSION: Final = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "validation", "test")  # the index is what the field "split" stores
PAGE: Final = 4096  # uncompressed arrays start at multiples of it: page-aligned maps, O_DIRECT
BLOCK_ENTRY: Final = 24  # bytes of a block table's row: offset, stored bytes, xxh3, uint64 each

Array = np.ndarray[Any, np.dtype[Any]]
SplitName = Literal["train", "validation", "test"]
_Some = TypeVar("_Some")
_NAME = r"^[A-Za-z][A-Za-z0-9_]*$"
_HASH = r"^[0-9a-f]{16}$"
_DTYPE = re.compile(r"[<>=|]?(?!a\d)[A-Za-z]+\d{0,7}", re.ASCII)
_TEXT: Final = 4096  # characters of a unit or description: HDF5 takes attributes below 64 KiB
_MOST: Final = 2**62  # of any number of rows, entries or bytes: int64 can add them


def _unicode(value: _Some) -> _Some:
    """Names of files may have bytes that no UTF-8 can; UnicodeEncodeError is a ValueError."""
    json.dumps(value, ensure_ascii=False).encode()
    return value


_Free = Annotated[Mapping[str, JsonValue], AfterValidator(_unicode)]
_Text = Annotated[str, AfterValidator(_unicode)]


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Field(_Plain):
    """One quantity: dataset `/name` of every shard.

    Dense (no axis): one entry a row. Ragged: each row has as many entries as its axis says, the
    same number for all fields of that axis.
    """

    name: str = Option(pattern=_NAME, max_length=64)
    dtype: str = Option(description="of numpy: int8 ... uint64, float16 ... float64, or S<n>")
    shape: tuple[int, ...] = Option((), max_length=16, description="of one entry")
    unit: _Text = Option(max_length=_TEXT, description='"1" if dimensionless, "" if no quantity')
    description: _Text = Option(max_length=_TEXT)
    axis: str | None = Option(None, pattern=_NAME, max_length=64, description="of a ragged field")
    refers: str | None = Option(
        None, description="values number the entries of that axis within their row"
    )
    optional: bool = Option(False, description="floats; NaN where a value is not known")

    @model_serializer(mode="wrap")
    def _written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = handler(self)
        if not self.optional:  # as before there were any: plans keep their fingerprints
            data.pop("optional", None)
        return data

    @field_validator("dtype")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            # numpy parses whole programs; "a5" warns
            found = np.dtype(name if _DTYPE.fullmatch(name) else object)
        except (TypeError, ValueError):
            found = np.dtype(object)
        if (
            found.kind not in "iufS"
            or not 0 < found.itemsize <= 2**20
            or (found.kind == "f" and found.itemsize > 8)
        ):
            raise ValueError(
                f"expected an int, uint or float type of numpy or S<bytes>, found {name[:40]!r}"
            )
        return f"S{found.itemsize}" if found.kind == "S" else found.name

    @field_validator("shape")
    @classmethod
    def _positive(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if any(n < 1 for n in shape):
            raise ValueError(f"expected positive sizes, found {shape}")
        if math.prod(shape) > 2**40:
            raise ValueError(f"expected at most 2**40 elements an entry, found {shape}")
        return shape

    @model_validator(mode="after")
    def _integers_refer(self) -> Field:
        if self.refers is not None and np.dtype(self.dtype).kind not in "iu":
            raise ValueError(f"{self.name}: refers needs an integer dtype, found {self.dtype}")
        if self.optional and np.dtype(self.dtype).kind != "f":
            raise ValueError(f"{self.name}: optional needs a float dtype, found {self.dtype}")
        return self

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """Element type as stored: little endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def entry_bytes(self) -> int:
        return self.numpy.itemsize * math.prod(self.shape)

    @property
    def numeric(self) -> bool:
        return self.numpy.kind != "S"


SPLIT = Field(
    name="split", dtype="uint8", unit="", description="0 = train, 1 = validation, 2 = test"
)


def axis_array(axis: str) -> Field:
    """The stored array of an axis: where each row's entries begin, (rows + 1,)."""
    return Field.model_construct(
        name=f"_axes.{axis}", dtype="int64", shape=(), unit="", description="", axis=None
    )


class SplitRule(_Plain):
    """Which split a row belongs to: a pure function of its group key (see `split_of`)."""

    seed: int = Option(ge=0, lt=2**64)
    validation: float = Option(ge=0, le=1, description="share of the keys")
    test: float = Option(ge=0, le=1, description="share of the keys")
    key: _Text = Option(description="what the key of a row is; equal keys share a split")

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


class Compression(_Plain):
    """How blocks are stored; arrays of axes and blocks never are."""

    codec: Literal["zstd", "blosc2"]
    level: int = Option(3, ge=1, le=22)

    @model_validator(mode="after")
    def _level_of_codec(self) -> Compression:
        if self.codec == "blosc2" and self.level > 9:
            raise ValueError(f"blosc2 has levels 1 to 9, found {self.level}")
        return self


class BuildPlan(_Plain):
    """Everything that decides the content of a shard set, and nothing else.

    The field "split" is added to `fields`. rows is None if as many as come are appended; else shard
    k holds rows k * rows_per_shard onwards of the order asked for, and only the last has fewer.
    """

    task: _Text = Option(min_length=1)
    rows: int | None = Option(None, ge=1, le=_MOST)
    rows_per_shard: int = Option(ge=1, le=_MOST)
    fields: tuple[Field, ...] = Option(min_length=1)
    split_rule: SplitRule
    seed: int = Option(ge=0, lt=2**64)
    shuffled: bool = Option(False, description="rows were asked for in a random order of `seed`")
    block_bytes: int = Option(
        2**20, ge=PAGE, le=2**30, description="unit of checksum and cold read"
    )
    compression: Compression | None = None
    provenance: _Free = Option({}, description="origin and options; no dates")

    @field_validator("fields")
    @classmethod
    def _with_split(cls, fields: tuple[Field, ...]) -> tuple[Field, ...]:
        names = [field.name for field in fields]
        if len(set(names)) < len(names):
            raise ValueError(f"expected distinct field names, found {', '.join(names)}")
        axes = {field.axis for field in fields if field.axis is not None}
        for field in fields:
            if field.refers is not None and field.refers not in axes:
                raise ValueError(
                    f"{field.name} refers to axis {field.refers!r}; axes: {', '.join(sorted(axes))}"
                )
        if SPLIT.name not in names:
            return (*fields, SPLIT)
        if SPLIT not in fields:
            raise ValueError(f"the field name {SPLIT.name!r} is reserved")
        return fields

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the ragged axes, in order of first use."""
        return tuple(dict.fromkeys(field.axis for field in self.fields if field.axis is not None))

    @property
    def arrays(self) -> tuple[Field, ...]:
        """All that each shard stores: the fields, then the arrays of the axes."""
        return (*self.fields, *(axis_array(axis) for axis in self.axes))

    def block_entries(self, array: Field) -> int:
        """Entries of one block along the first axis; the last block may have fewer."""
        return max(1, self.block_bytes // array.entry_bytes)

    def blocks(self, array: Field, length: int) -> int:
        return -(-length // self.block_entries(array))

    def compressed(self, array: Field) -> bool:
        return self.compression is not None and not array.name.startswith("_")

    @property
    def shard_count(self) -> int:
        assert self.rows is not None, "rows of a plan to build are known"
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, shard: int) -> range:
        """Rows of a shard in the order asked for; only the last shard may be smaller."""
        assert self.rows is not None, "rows of a plan to build are known"
        start = shard * self.rows_per_shard
        return range(start, min(start + self.rows_per_shard, self.rows))

    def fingerprint(self) -> str:
        """Equal plans, equal fingerprints."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return xxhash.xxh3_64_hexdigest(text.encode())


class StoredArray(_Plain):
    """Where an array lies in a shard file."""

    offset: int = Option(ge=0, le=_MOST, description="of its first byte; 0 if compressed or empty")
    length: int = Option(ge=0, le=_MOST, description="entries along the first axis")
    blocks: int = Option(
        ge=0, le=_MOST, description="offset of its block table; 0 if it has no entries"
    )
    xxh3: str = Option(pattern=_HASH, description="of the bytes of the block table")


class ShardRecord(_Plain):
    """One committed shard file."""

    file: str = Option(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200)
    rows: int = Option(ge=1, le=_MOST)
    bytes: int = Option(ge=1, le=_MOST)
    xxh3: str = Option(pattern=_HASH, description="xxh3_64 of the whole file")
    split_rows: tuple[int, int, int] = Option(description="train, validation, test, in this order")
    arrays: Mapping[str, StoredArray]


class Manifest(_Plain):
    """A plan that was carried out: the content of manifest.json."""

    format: Literal["dmi-shards"] = FORMAT
    version: Literal[2] = VERSION
    plan: BuildPlan
    rows: int = Option(ge=1, le=_MOST)
    split_rows: Mapping[SplitName, int]
    statistics: Mapping[str, Statistics] = Option(description="by field; empty without train rows")
    made_with: _Free = Option({}, description="command, versions; not identity")
    shards: tuple[ShardRecord, ...] = Option(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if self.plan.rows not in (None, self.rows):
            raise ValueError(f"the plan is of {self.plan.rows} rows, found {self.rows}")
        if sum(shard.rows for shard in self.shards) != self.rows:
            raise ValueError(f"rows of the shards do not sum to {self.rows}")
        totals = [sum(column) for column in zip(*(s.split_rows for s in self.shards), strict=True)]
        if dict(self.split_rows) != dict(zip(SPLITS, totals, strict=True)):
            raise ValueError(f"split_rows {dict(self.split_rows)}: the shards say {totals}")
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("expected distinct files of the shards")
        for shard in self.shards:
            _check_shard(self.plan, shard)
        return self

    @property
    def fields(self) -> tuple[Field, ...]:
        return self.plan.fields

    @property
    def bytes(self) -> int:
        """Of all shard files."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def identity(self) -> str:
        """Of the plan and every byte made from it: equal only for the same rows in the same splits."""
        text = self.plan.fingerprint() + "".join(shard.xxh3 for shard in self.shards)
        return xxhash.xxh3_128_hexdigest(text.encode())

    def field(self, name: str) -> Field:
        """The field of this name; DataError lists the names there are."""
        for field in self.fields:
            if field.name == name:
                return field
        raise DataError(f"no field {name!r}; found {', '.join(f.name for f in self.fields)}")


def _check_shard(plan: BuildPlan, shard: ShardRecord) -> None:
    """Refuse what cannot be true of a file of this size, before anything is read or allocated."""
    arrays = {array.name: array for array in plan.arrays}
    if set(shard.arrays) != set(arrays):
        raise ValueError(f"{shard.file}: arrays {sorted(shard.arrays)}, expected {sorted(arrays)}")
    if sum(shard.split_rows) != shard.rows or min(shard.split_rows) < 0:
        raise ValueError(f"{shard.file}: split_rows {shard.split_rows} of {shard.rows} rows")
    lengths: dict[str, int] = {}
    for name, stored in shard.arrays.items():
        array = arrays[name]
        if array.axis is None:
            expected = shard.rows + name.startswith("_axes.")
        else:
            expected = lengths.setdefault(array.axis, stored.length)
        if stored.length != expected:
            raise ValueError(f"{shard.file}: {name}: length {stored.length}, expected {expected}")
        ends = [stored.blocks + plan.blocks(array, stored.length) * BLOCK_ENTRY]
        if not plan.compressed(array):
            ends.append(stored.offset + stored.length * array.entry_bytes)
            if stored.offset % PAGE:
                raise ValueError(f"{shard.file}: {name}: offset {stored.offset} is not aligned")
        if max(ends) > shard.bytes:
            raise ValueError(
                f"{shard.file}: {name}: ends at byte {max(ends)} of a file of {shard.bytes}"
            )


def require_identity(recorded: str, found: str, *, maker: str) -> None:
    """Raises DataError if `maker` was made from another data set; "" stands for not recorded."""
    if recorded and found and recorded != found:
        raise DataError(
            f"{maker}: made from data set {recorded}, found data set {found}: rows to be judged by "
            "may be rows learned from. Put the first one back, or start a new run (another --out)"
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Commit a build: atomic and durable."""
    files.write_json(folder / MANIFEST, sealed(manifest.model_dump(mode="json")))


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's JSON with the checksum "xxh3" of all else: a flipped digit is not read as data."""
    rest = {key: value for key, value in content.items() if key != "xxh3"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return {**rest, "xxh3": xxhash.xxh3_64_hexdigest(text.encode())}


def read_manifest(folder: Path) -> Manifest:
    """Raises DataError if it is missing or not valid, FormatVersionError if of another version."""
    path = folder / MANIFEST
    try:
        raw = json.loads(path.read_bytes())
        found = raw.pop("xxh3", None) if isinstance(raw, dict) else None
        expected = sealed(raw)["xxh3"] if isinstance(raw, dict) else None
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{path}: no such file, so no complete data set is there. Make one with `dmi data "
            "build` or `dmi data import`; an interrupted build continues with --resume, an import "
            "begins anew."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}). Build the set again.") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise DataError(f'{path}: expected "format": "{FORMAT}"; this is no shard set')
    version = raw.get("version")
    if isinstance(version, int) and version != VERSION:
        todo = "Update dmi-hpc, or build" if version > VERSION else "Build"
        raise FormatVersionError(
            f"{path}: written in version {version} of {FORMAT}; this program reads version "
            f"{VERSION}. {todo} the set again with this version, in a new folder."
        )
    if found is None:
        raise DataError(
            f"{path}: has no checksum (key xxh3) of its content: cut, edited, or not written by "
            "dmi-hpc. Put the original back (with a copy of the set: dmi data verify --repair-from "
            "COPY), or build the set again."
        )
    if found != expected:
        raise DataError(
            f"{path}: expected checksum xxh3 {expected} of its content, found {found}: it is damaged "
            "or was edited. Put the original back (with a copy of the set: dmi data verify "
            "--repair-from COPY), or build the set again."
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors()[:5]
        )
        raise DataError(f"{path}: {problems}. Was it edited? Build the set again.") from None
