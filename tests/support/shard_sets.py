"""Small shard sets with every kind of field, whose rows can be told from their numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dmi_hpc.data import BuildPlan, Compression, Field, Ragged, ShardSet, ShardWriter, SplitRule

FIELDS = (
    Field(name="n", dtype="int64", unit="1", description="number in order of appending"),
    Field(name="x", dtype="float32", shape=(3,), unit="GPa", description="stresses"),
    Field(name="image", dtype="uint8", shape=(7, 11, 13), unit="", description="odd bytes a row"),
    Field(name="name", dtype="S7", unit="", description="text"),
    Field(name="z", dtype="uint8", unit="", description="atomic number", axis="node"),
    Field(name="pos", dtype="float64", shape=(3,), unit="nm", description="place", axis="node"),
    Field(
        name="edge",
        dtype="uint8",
        shape=(2,),
        unit="",
        description="ends",
        axis="edge",
        refers="node",
    ),
)
NAMES = tuple(field.name for field in FIELDS)
NUMERIC = tuple(field.name for field in FIELDS if field.numeric)


def content(
    rows: int, atoms: tuple[int, ...] = (0, 3, 1, 0, 40, 2)
) -> dict[str, np.ndarray | Ragged]:
    """Rows of FIELDS; atoms: nodes of each row in turn, with as many edges less one."""
    rng = np.random.default_rng(rows)
    nodes = [atoms[i % len(atoms)] for i in range(rows)]
    pairs = [rng.integers(0, max(k, 1), (max(0, k - 1), 2)).astype(np.uint8) for k in nodes]
    return {
        "n": np.arange(rows),
        "x": rng.normal(100, 10, (rows, 3)).astype(np.float32),
        "image": rng.integers(0, 256, (rows, 7, 11, 13)).astype(np.uint8),
        "name": np.array([b"Fe%d" % i for i in range(rows)], dtype="S7"),
        "z": Ragged.from_rows([rng.integers(1, 99, k).astype(np.uint8) for k in nodes]),
        "pos": Ragged.from_rows([rng.normal(size=(k, 3)) for k in nodes]),
        "edge": Ragged.from_rows(pairs),
    }


def make_set(
    folder: Path,
    rows: int,
    rows_per_shard: int = 10,
    codec: str | None = None,
    shares: tuple[float, float] = (0.2, 0.1),
    **options: object,
) -> dict[str, np.ndarray | Ragged]:
    """Write a set; returns its rows as `content` gave them."""
    plan = BuildPlan(
        task="toy",
        rows_per_shard=rows_per_shard,
        fields=FIELDS,
        split_rule=SplitRule(seed=1, validation=shares[0], test=shares[1], key="row number"),
        seed=0,
        block_bytes=4096,
        compression=Compression(codec=codec) if codec else None,
    )
    made = content(rows, **options)
    with ShardWriter(folder, plan) as writer:
        writer.append(made)
    return made


def numbers(shards: ShardSet) -> np.ndarray:
    """`n` of each row of a set, which groups the rows of a shard by split; by the oracle."""
    with ShardSet.open(shards.path, verify="none", backend="h5py") as oracle:
        return oracle.gather("n", oracle.rows("all"))


def pick(values: np.ndarray | Ragged, rows: np.ndarray) -> np.ndarray | Ragged:
    """Rows of what `content` gave."""
    return values.take(rows) if isinstance(values, Ragged) else values[rows]


def assert_same(found: np.ndarray | Ragged, expected: np.ndarray | Ragged) -> None:
    """Equal bytes, dtype and shape."""
    assert type(found) is type(expected)
    if isinstance(found, Ragged):
        np.testing.assert_array_equal(found.offsets, expected.offsets)
        found, expected = found.values, expected.values
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.tobytes() == expected.tobytes()
