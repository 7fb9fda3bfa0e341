"""One rank of a comparison: all contenders in this process, in turns, the same on every rank.

    python rank_process.py < COMPARISON.json

Rank 0 writes what it measured as one JSON object to stdout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import psutil
import torch
from loading.timing import interleaved

from dmi_hpc import collectives
from dmi_hpc.world import World, detect
from training import contenders
from training.problems import Setting
from training.turns import Training, turns_of

Maker = Callable[[Setting, World], Training]


def maker_of(name: str) -> Maker:
    match name.split():
        case ["ours"]:
            return contenders.ours
        case ["ours", "stage", stage]:
            return lambda setting, world: contenders.ours(
                setting, world, engine="deepspeed", zero_stage=int(stage)
            )
        case ["DeepSpeed", "stage", stage]:
            return lambda setting, world: contenders.raw_deepspeed(setting, world, int(stage))
        case ["by", "hand"]:
            return contenders.by_hand
        case ["DDP"]:
            return contenders.distributed
        case ["Lightning"]:
            return contenders.lightning
        case ["Lightning", "documented"]:
            return lambda setting, world: contenders.lightning(setting, world, documented=True)
    raise ValueError(f"no contender {name!r}")


class Wire:
    """Bytes that this machine sent over loopback between two calls."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.readings: list[int] = []

    def __call__(self) -> None:
        contenders.barrier(self._world)  # nobody has begun the window, or all have ended it
        self.readings.append(psutil.net_io_counters(pernic=True)["lo"].bytes_sent)
        contenders.barrier(self._world)

    def per_step(self, steps: int) -> float:
        start, end = self.readings[-2:]
        return (end - start) / steps


def compare(asked: dict[str, Any], world: World) -> dict[str, Any]:
    """Rates in steps a second, and bytes on the wire a step, of each contender and repetition."""
    setting = Setting(Path(asked["data"]), asked["task"], asked["batch"], asked["small"])
    steps = asked["steps"]
    wire = Wire(world)
    sent: dict[str, list[float]] = {name: [] for name in asked["contenders"]}
    trainings = {name: maker_of(name)(setting, world) for name in sent}
    with turns_of(trainings, asked["discarded"]) as turns:

        def measured(name: str) -> float:
            rate = turns[name].rate(steps, wire)
            sent[name].append(wire.per_step(steps))
            return rate

        windows = {name: partial(measured, name) for name in turns}
        rates = interleaved(windows, asked["repetitions"])
    return {"rates": rates, "bytes_per_step": {k: v[1:] for k, v in sent.items()}}


def main() -> None:
    asked, world = json.loads(sys.stdin.read()), detect()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries say is no answer
    torch.set_num_threads(1)
    with collectives.group(world, torch.device("cpu")):
        found = compare(asked, world)
    if world.is_first:
        answer.write(json.dumps(found))
    answer.close()


if __name__ == "__main__":
    main()
