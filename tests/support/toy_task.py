"""A user's own task, as small as one can be: what plugs in without touching DMI-HPC.

Eight numbers in, a smooth function of them out. `fault` makes its code fail in chosen ways; `faults`
does so for batches of a given number of rows, that is for some networks of a search.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dmi_hpc.config import Config
from dmi_hpc.data.build import BuildPlan, build
from dmi_hpc.data.manifest import Field, Manifest, SplitRule
from dmi_hpc.models.space import Choice, FloatRange, Founder, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec
from dmi_hpc.tasks.base import Array, Baseline, BuildContext, Fields, Quantity, Task

WIDTH = 8
SLOW_S = float(os.environ.get("TOY_SLOW_S", "0.01"))  # a batch

Fault = Literal["none", "exception", "nan", "die", "slow", "hang"]


class ToyOptions(Config):
    samples: int = 200
    fault: Fault = "none"
    faults: Mapping[int, Fault] = {}


@dataclass(frozen=True)
class Rows:
    seed: int

    def __call__(self, ids: Array) -> dict[str, Array]:
        x = np.stack([np.random.default_rng([self.seed, int(i)]).normal(size=WIDTH) for i in ids])
        return {"x": x.astype(np.float32), "y": np.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2]}


class Toy(Task):
    Options = ToyOptions
    quantity = Quantity("y", "m")
    input_fields = ("x",)
    target_field = "y"
    input_shape = (WIDTH,)

    def build_data(self, target: Path, context: BuildContext) -> Manifest:
        config = context.config
        plan = BuildPlan(
            task=self.name,
            rows=self.options.samples,
            rows_per_shard=config.rows_per_shard,
            fields=(
                Field(name="x", dtype="float32", shape=(WIDTH,), unit="1", description="input"),
                Field(name="y", dtype="float64", shape=(), unit="m", description="target"),
            ),
            split_rule=SplitRule(
                seed=context.seed, validation=config.validation, test=config.test, key="row"
            ),
            seed=context.seed,
        )
        return build(
            target,
            plan,
            Rows(context.seed),
            context.communicator,
            context.processes,
            context.progress,
        )

    def inputs(self, fields: Fields) -> Array:
        match self.options.faults.get(len(fields["x"]), self.options.fault):
            case "exception":
                raise ZeroDivisionError("the user's own bug")
            case "nan":
                return np.full_like(fields["x"], np.nan)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "slow":
                time.sleep(SLOW_S)
            case "hang":
                time.sleep(3600)
        return fields["x"]

    def published_network(self) -> NetworkSpec:
        return NetworkSpec(input_shape=(WIDTH,), layers=(Dense(units=16), Activation()))

    def space(self) -> SearchSpace:
        return SearchSpace(
            network=NetworkSpace(
                input_shape=(WIDTH,),
                dense_blocks=(1, 3),
                units=(4, 8, 16, 32),
                norms=(None, "batch"),
                dropouts=(0.0, 0.1),
            ),
            hyper={
                "learning_rate": FloatRange(low=1e-3, high=1e-1, log=True),
                "batch_size": Choice(values=(8, 16, 32, 64), ordered=True),
            },
            founders=(Founder(name="toy", network=self.published_network()),),
        )

    def baselines(self) -> tuple[Baseline, ...]:
        def mean(train: Fields, target: Array, test: Fields) -> Array:
            return np.full(len(test["x"]), target.mean())

        return (Baseline("mean", "Mean of the training rows", mean),)
