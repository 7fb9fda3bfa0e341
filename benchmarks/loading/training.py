"""How long a training waits for its data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from loading.report import Figure

WHAT = "data wait in a DeepSpeed run of recipes/elemnet.toml"
RECIPE = Path(__file__).parents[2] / "recipes" / "elemnet.toml"
EPOCHS = 2
TIMEOUT_S = 1800


def data_wait(table: Path | None, folder: Path) -> Figure:
    """Share of an epoch's time that rank 0 waits, as `dmi train` records it; the last epoch counts.

    table: of formulas and targets (CSV), or a shard set made from one.
    """
    if table is None:
        return Figure(WHAT, None, "%", most=2.0, detail="give --elemnet TABLE.csv or a set of it")
    try:
        last = _last_epoch(table.resolve(), folder)
    except RuntimeError as error:
        # the other figures took minutes: they are kept
        return Figure(WHAT, None, "%", most=2.0, detail=" ".join(str(error).split()))
    return Figure(
        WHAT,
        100 * last["data_wait"],
        "%",
        most=2.0,
        detail=f"1 rank, epoch {last['epoch'] + 1}, {last['samples_per_s']:.0f} samples/s",
    )


def _last_epoch(data: Path, folder: Path) -> dict[str, float]:
    """The record of the last epoch of a short training."""
    if not (data / "manifest.json").exists():
        _dmi("data", "import", str(data), "--out", str(folder / "table"), "--seed", "1")
        data = folder / "table"
    text, changed = RECIPE.read_text(), 0
    for pattern, value in (
        (r'path = ".*"', f'path = "{data}"'),
        (r"epochs = \d+", f"epochs = {EPOCHS}"),
    ):
        text, found = re.subn(f"^{pattern}", lambda _, new=value: new, text, flags=re.MULTILINE)
        changed += found
    if changed != 2:
        raise ValueError(f"{RECIPE}: expected one path and one epochs, found {changed}")
    recipe = folder / "elemnet.toml"
    recipe.write_text(text)
    _dmi("train", str(recipe), "--out", str(folder / "run"))
    lines = (folder / "run" / "train" / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == "epoch"][-1]


def _dmi(*arguments: str) -> None:
    command = [sys.executable, "-c", "from dmi_hpc.cli import main; main()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"dmi {' '.join(arguments)}: {(done.stderr or done.stdout)[-300:]}")
