"""One rank of one contender of a comparison.

    python rank_process.py

Reads the comparison as a line of JSON, then lines with a number of steps to do; answers each of
those with a line when the steps are done, and ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from dmi_hpc import collectives
from dmi_hpc.world import World, detect
from training import contenders
from training.problems import Setting
from training.turns import Training

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


def main() -> None:
    asked, world = json.loads(sys.stdin.readline()), detect()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries say is no answer
    torch.set_num_threads(1)
    left = 0

    def turn() -> None:
        """Waits for the number of steps to do."""
        nonlocal left
        line = sys.stdin.readline()
        if not line:
            raise SystemExit
        left = int(line)

    def tick() -> None:
        nonlocal left
        left -= 1
        if not left:
            print("done", file=answers, flush=True)
            turn()

    setting = Setting(Path(asked["data"]), asked["task"], asked["batch"], asked["small"])
    with collectives.group(world, torch.device("cpu")):
        turn()
        maker_of(asked["contender"])(setting, world)(tick)


if __name__ == "__main__":
    main()
