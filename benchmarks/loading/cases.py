"""The data of the benchmark, and the shard sets made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """Dense samples. rival_rows: that the other loaders get, the slowest write 10 k a second."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: int
    rival_rows: int
    batch: int
    sequential: bool  # whether it is also compared with memcpy

    @property
    def title(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def sample_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def small(self) -> Case:
        """The same with hardly any rows: to see that everything runs."""
        rows = 8 * self.batch + 3
        return replace(self, rows=rows, rival_rows=rows)

    def array(self) -> Array:
        """(rows, *shape), random."""
        rng = np.random.default_rng(1)
        if self.dtype == "uint8":
            return rng.integers(0, 256, (self.rows, *self.shape), dtype=np.uint8)
        return rng.random((self.rows, *self.shape), dtype=np.float32)


CASES = (
    Case("a", (86,), "float32", 1_000_000, 200_000, 1024, False),
    Case("b", (60, 60), "float32", 20_000, 20_000, 256, True),
    Case("c", (51, 51, 51), "uint8", 8_000, 2_000, 32, True),
)
GRAPHS, NEIGHBOURS, GRAPH_BATCH = 20_000, 12, 64


def plan_of(fields: tuple[Any, ...], rows_per_shard: int, rows: int | None = None) -> Any:
    from dmi_hpc.data import BuildPlan, SplitRule

    rule = SplitRule(seed=1, validation=0.0, test=0.0, key="row number")
    return BuildPlan(
        task="benchmark",
        fields=fields,
        rows=rows,
        rows_per_shard=rows_per_shard,
        split_rule=rule,
        seed=1,
    )


def field_of(name: str, values: Array, **ragged: str) -> Any:
    from dmi_hpc.data import Field

    return Field(
        name=name,
        dtype=values.dtype.name,
        shape=values.shape[1:],
        unit="1",
        description="random",
        **ragged,
    )


def write_set(folder: Path, array: Array, shards: int) -> Path:
    """One dense field "x"."""
    from dmi_hpc.data import ShardWriter

    each = -(-len(array) // shards)
    with ShardWriter(folder, plan_of((field_of("x", array),), each)) as writer:
        for start in range(0, len(array), each):
            rows = array[start : start + each]
            writer.append({"x": rows, "split": np.zeros(len(rows), dtype=np.uint8)})
    return folder


def make_graphs(count: int) -> dict[str, Array]:
    """Crystals of 20 to 40 atoms with 12 neighbours each; entries of all graphs one after the other.

    z (atoms,), positions (atoms, 3), pairs (edges, 2) atoms within their graph, distance (edges,),
    y (graphs,), nodes and edges (graphs,) how many each has.
    """
    rng = np.random.default_rng(2)
    nodes = rng.integers(20, 41, count)
    edges = nodes * NEIGHBOURS
    atoms, total = int(nodes.sum()), int(edges.sum())
    first = np.repeat(np.cumsum(nodes) - nodes, nodes)
    source = np.repeat(np.arange(atoms) - first, NEIGHBOURS)
    target = (rng.random(total) * np.repeat(nodes, edges)).astype(np.int64)
    return {
        "z": rng.integers(1, 95, atoms),
        "positions": rng.random((atoms, 3), dtype=np.float32),
        "pairs": np.stack([source, target], axis=1),
        "distance": rng.random(total, dtype=np.float32),
        "y": rng.random(count, dtype=np.float32),
        "nodes": nodes,
        "edges": edges,
    }


def write_graphs(folder: Path, graphs: dict[str, Array]) -> Path:
    from dmi_hpc.data import Ragged, ShardWriter

    offsets = {
        axis: np.concatenate([[0], np.cumsum(graphs[f"{axis}s"])]) for axis in ("node", "edge")
    }
    fields = (
        field_of("z", graphs["z"], axis="node"),
        field_of("positions", graphs["positions"], axis="node"),
        field_of("pairs", graphs["pairs"], axis="edge", refers="node"),
        field_of("distance", graphs["distance"], axis="edge"),
        field_of("y", graphs["y"]),
    )
    rows = {
        field.name: Ragged(graphs[field.name], offsets[field.axis]) if field.axis else graphs["y"]
        for field in fields
    }
    count = len(graphs["y"])
    with ShardWriter(folder, plan_of(fields, count)) as writer:
        writer.append({**rows, "split": np.zeros(count, dtype=np.uint8)})
    return folder
