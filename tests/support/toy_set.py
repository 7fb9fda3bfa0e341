"""A small shard set with every kind of field, for tests of the tools around a set."""

from __future__ import annotations

import numpy as np

from dmi_hpc.data.manifest import BuildPlan, Compression, Field, SplitRule
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.writer import ShardWriter

FIELDS = (
    Field(name="x", dtype="float32", shape=(5,), unit="GPa", description="stresses"),
    Field(name="y", dtype="float64", unit="eV/atom", description="formation enthalpy"),
    Field(name="formula", dtype="S8", unit="", description="as written"),
    Field(name="z", dtype="uint8", unit="", description="atomic numbers", axis="node"),
    Field(
        name="edge",
        dtype="int32",
        shape=(2,),
        unit="",
        description="pairs",
        axis="edge",
        refers="node",
    ),
)


def toy_rows(rows: int, seed: int = 0) -> dict[str, np.ndarray | Ragged]:
    rng = np.random.default_rng(seed)
    atoms = rng.integers(1, 6, rows)
    return {
        "x": rng.normal(100, 10, (rows, 5)).astype(np.float32),
        "y": rng.normal(size=rows),
        "formula": np.array([f"Fe{i % 7 + 1}O".encode() for i in range(rows)], dtype="S8"),
        "z": Ragged.from_rows([rng.integers(1, 90, n).astype(np.uint8) for n in atoms]),
        "edge": Ragged.from_rows([rng.integers(0, n, (2 * n, 2)).astype(np.int32) for n in atoms]),
    }


def toy_set(folder, rows=300, *, rows_per_shard=70, codec=None, seed=0, key="row number"):
    """(manifest, rows as they were appended) of a set in `folder`."""
    plan = BuildPlan(
        task="toy",
        rows_per_shard=rows_per_shard,
        fields=FIELDS,
        split_rule=SplitRule(seed=1, validation=0.2, test=0.1, key=key),
        seed=seed,
        block_bytes=4096,
        compression=Compression(codec=codec) if codec else None,
        provenance={"origin": "test"},
    )
    made = toy_rows(rows, seed)
    with ShardWriter(folder, plan) as writer:
        writer.append(made)
    return writer.manifest, made
