"""``dmi evaluate``: the trained network on the held-out split, next to the baselines."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from dmi_hpc.cli.options import RunFolder, new_app
from dmi_hpc.run import open_run, record_command
from dmi_hpc.watch import console, say

app = new_app()


@app.command()
def evaluate(
    run_folder: RunFolder,
    split: Annotated[str, typer.Option(help="train | validation | test")] = "test",
) -> None:
    """Score the best checkpoint and the task's baselines, in field units, on one split.

    The report shows the test split; others are written beside it, as evaluation-SPLIT.json.
    """
    from dmi_hpc.assess import assess
    from dmi_hpc.data.manifest import SPLITS, SplitName
    from dmi_hpc.errors import DMIError

    if split not in SPLITS:
        raise DMIError(f"--split: found '{split}', expected {', '.join(SPLITS)}")
    run = open_run(run_folder.resolve())
    with console().status("evaluating the network and its baselines"):
        result = assess(run, cast(SplitName, split))
    record_command(run)
    say(f"{result['split']} split, {result['rows']} rows, {result['quantity']} ({result['unit']})")
    for method in result["methods"]:
        percent, r2 = method["mae_percent"], method["r2"]
        share = "" if percent is None else f"  ({percent:6.2f} %)"
        fit = "" if r2 is None else f"  R2 {r2:.4f}"
        say(
            f"  {method['label']:<44} MAE {method['mae']:8.4f}{share}"
            f"  RMSE {method['rmse']:8.4f}{fit}"
        )
