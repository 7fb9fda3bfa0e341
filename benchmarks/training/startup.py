"""From the start of `dmi train` to its first step, on a staged set that the file cache holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from loading.report import Figure

from training.problems import ELEMNET, write_set

WHAT = "start of dmi train to its first step, staged set, 2 cores"
MOST_S = 8.0
ROWS, BATCH, CORES = 1024, 256, 2
TIMEOUT_S = 300
PROGRAM = f"""\
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:{CORES}])
from dmi_hpc.cli import main
main()
"""
RECIPE = """\
seed = 1
[task]
name = "elemnet"
dropout = false
[data]
path = "{data}"
[train]
epochs = 1
batch_size = {batch}
loss = "mae"
"""


def figure(folder: Path, repetitions: int) -> Figure:
    """A run before the others warms the file cache; with no repetitions it is the one that counts."""
    data, stage = write_set(folder / "set", ELEMNET, ROWS), folder / "stage"
    stage.mkdir()
    recipe = folder / "startup.toml"
    recipe.write_text(RECIPE.format(data=data, batch=BATCH))
    try:
        _dmi(stage, "data", "stage", str(data), "--to", str(stage))
        found = [_first_step(stage, recipe, folder / f"run-{n}") for n in range(repetitions + 1)]
        _dmi(stage, "data", "stage", "--remove", "--to", str(stage))
    except RuntimeError as error:
        return Figure(WHAT, None, " s", most=MOST_S, detail=" ".join(str(error).split()))
    times = [seconds for seconds in found[1:] or found if seconds is not None]
    if not times:
        return Figure(WHAT, None, " s", most=MOST_S, detail="no event first_step in metrics.jsonl")
    detail = f"1 rank, {min(times):.1f} to {max(times):.1f} s"
    return Figure(WHAT, median(times), " s", most=MOST_S, detail=detail)


def _first_step(stage: Path, recipe: Path, run: Path) -> float | None:
    """Seconds, as the training itself tells them; None if it does not."""
    _dmi(stage, "train", str(recipe), "--out", str(run))
    lines = (run / "train" / "metrics.jsonl").read_text().splitlines()
    entries: list[dict[str, Any]] = [json.loads(line) for line in lines]
    times = [e["since_start_s"] for e in entries if e.get("event") == "first_step"]
    return float(times[0]) if times else None


def _dmi(stage: Path, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        env={**os.environ, "DMI_STAGE": str(stage)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode:
        raise RuntimeError(f"dmi {' '.join(arguments)}: {(done.stderr or done.stdout)[-300:]}")
