"""Row makers that worker processes can import (a test module they could not)."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import numpy as np

from dmi_hpc.data.manifest import BuildPlan, Field, SplitRule


def make_plan(rows=100, rows_per_shard=17, **changes):
    values = {
        "task": "toy",
        "rows": rows,
        "rows_per_shard": rows_per_shard,
        "fields": (
            Field(name="x", dtype="float32", shape=(3,), unit="GPa", description="noise"),
            Field(name="n", dtype="int64", unit="1", description="row number"),
        ),
        "split_rule": SplitRule(seed=5, validation=0.2, test=0.1, key="row number"),
        "seed": 0,
    }
    return BuildPlan(**(values | changes))


@dataclass(frozen=True)
class Rows:
    """Random rows, each from its own number; optionally slow, failing or deadly at one row."""

    sleep_s: float = 0.0
    fail_at: int = -1
    die_at: int = -1

    def __call__(self, ids):
        time.sleep(self.sleep_s)
        if self.fail_at in ids:
            raise ZeroDivisionError(f"no solution for row {self.fail_at}")
        if self.die_at in ids:
            os.kill(os.getpid(), signal.SIGKILL)
        x = [np.random.default_rng(int(i)).normal(100, 1, 3) for i in ids]
        return {"x": np.array(x, dtype=np.float32), "n": ids}
