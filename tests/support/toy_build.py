"""Row makers that worker processes can import (a test module they could not), and small sets."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmi_hpc.data.build import Alone, build
from dmi_hpc.data.manifest import BuildPlan, Compression, Field, SplitRule
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.writer import ShardWriter
from dmi_hpc.errors import DMIError

FIELDS = (
    Field(name="x", dtype="float32", shape=(3,), unit="GPa", description="noise in Å³"),
    Field(name="n", dtype="int64", unit="1", description="row number"),
    Field(name="text", dtype="S7", unit="", description="row number as text"),
    Field(name="volume", dtype="uint8", shape=(5, 3, 3), unit="1", description="phases"),
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
NAMES = tuple(field.name for field in FIELDS)


def make_plan(rows=100, rows_per_shard=17, codec=None, **changes):
    values = {
        "task": "toy",
        "rows": rows,
        "rows_per_shard": rows_per_shard,
        "fields": FIELDS,
        "split_rule": SplitRule(seed=5, validation=0.2, test=0.1, key="row number"),
        "seed": 0,
        "block_bytes": 4096,
        "compression": Compression(codec=codec) if codec else None,
    }
    return BuildPlan(**(values | changes))


def make_rows(ids, seed=0):
    """Random rows, each from its own number; some have no atoms."""
    random = [np.random.default_rng([seed, int(i)]) for i in ids]
    atoms = [int(rng.integers(0, 6)) for rng in random]
    pairs = [rng.integers(0, max(n, 1), (2 * n, 2)) for rng, n in zip(random, atoms, strict=True)]
    return {
        "x": np.array([rng.normal(100, 1, 3) for rng in random], dtype=np.float32).reshape(-1, 3),
        "n": np.array(ids, dtype=np.int64),
        "text": np.array([f"Fe{i}" for i in ids], dtype="S7"),
        "volume": np.array(
            [rng.integers(0, 2, (5, 3, 3)) for rng in random], dtype=np.uint8
        ).reshape(-1, 5, 3, 3),
        "z": Ragged.from_rows(
            [rng.integers(1, 90, n).astype(np.uint8) for rng, n in zip(random, atoms, strict=True)]
        ),
        "edge": Ragged.from_rows([pair.astype(np.int32) for pair in pairs]),
    }


@dataclass(frozen=True)
class Rows:
    """Makes rows; optionally slow, failing or deadly at one row. calls: file that notes each."""

    sleep_s: float = 0.0
    fail_at: int = -1
    die_at: int = -1
    seed: int = 0
    calls: str = ""

    def __call__(self, ids):
        time.sleep(self.sleep_s)
        if self.fail_at in ids:
            raise ZeroDivisionError(f"no solution for row {self.fail_at}")
        if self.die_at in ids:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls:
            with Path(self.calls).open("a") as stream:
                stream.write(f"{ids[0]} {ids[-1]}\n")
        return make_rows(ids, self.seed)


class ThreadRanks:
    """Ranks that are threads of this process."""

    def __init__(self, size):
        self.size, self.values = size, [None] * size
        self.meet = threading.Barrier(size, timeout=30)

    def rank(self, rank):
        ranks = self

        class Rank:
            size = ranks.size

            def share(self, value):
                ranks.values[rank] = value
                ranks.meet.wait()
                shared = list(ranks.values)
                ranks.meet.wait()  # all have read before one writes again
                return shared

            def gather(self, value):
                shared = self.share(value)
                return shared if rank == 0 else None

        Rank.rank = rank
        return Rank()


def build_alone(target, plan=None, rows=None, processes=1, progress=lambda n: None):
    return build(target, plan or make_plan(), rows or Rows(), Alone(), processes, progress)


def build_on_ranks(target, size, rows=None, plan=None, processes=1):
    """The outcome of each rank: a manifest or the error."""
    ranks = ThreadRanks(size)

    def one(rank):
        try:
            mine = ranks.rank(rank)
            return build(
                target, plan or make_plan(), rows or Rows(), mine, processes, lambda n: None
            )
        except DMIError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def write_set(folder, rows=100, seed=0, rows_per_shard=40, codec=None, calls=1, **changes):
    """Append the rows by a ShardWriter in some calls; its manifest."""
    plan = make_plan(None, rows_per_shard, codec, seed=seed, **changes)
    with ShardWriter(folder, plan) as writer:
        for ids in np.array_split(np.arange(rows), calls):
            writer.append(make_rows(ids, seed))
    return writer.manifest


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def equal(found, expected):
    """Whether two fields hold equal rows."""
    if isinstance(expected, Ragged):
        same = np.array_equal(found.offsets, expected.offsets)
        return same and np.array_equal(found.values, expected.values)
    return found.dtype == expected.dtype and np.array_equal(found, expected)


def stored_rows(shards, names=NAMES):
    """All rows of an open set by their number n, as make_rows gives them."""
    found = shards.fields(names, shards.rows("all"))
    order = np.argsort(shards.gather("n", shards.rows("all")))
    return {
        name: values.take(order) if isinstance(values, Ragged) else values[order]
        for name, values in found.items()
    }
