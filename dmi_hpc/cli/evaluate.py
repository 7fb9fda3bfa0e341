"""``dmi evaluate``: the trained network on the held-out split, next to the baselines."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Any, cast

import typer

from dmi_hpc.cli.options import RunFolder, new_app
from dmi_hpc.run import open_run, record_command
from dmi_hpc.watch import console, say

app = new_app()


@app.command()
def evaluate(
    run_folder: RunFolder,
    split: Annotated[str, typer.Option(help="train | validation | test")] = "test",
    network_only: Annotated[
        bool, typer.Option("--network-only", help="no baselines, no pictures: any size of split")
    ] = False,
) -> None:
    """Score the best checkpoint and the task's baselines, in field units, on one split.

    The report shows the test split; others are written beside it, as evaluation-SPLIT.json. Ranks
    are found from torchrun, mpirun or srun, as by dmi train: each predicts a part of the rows.
    """
    import torch

    from dmi_hpc import collectives
    from dmi_hpc.assess import assess
    from dmi_hpc.config import TrainConfig
    from dmi_hpc.data.manifest import SPLITS, SplitName
    from dmi_hpc.errors import DMIError, together
    from dmi_hpc.world import detect

    if split not in SPLITS:
        raise DMIError(f"--split: found '{split}', expected {', '.join(SPLITS)}")
    world = detect()
    device, share = collectives.device_of(world), collectives.gather_objects
    with collectives.group(world, device) if world.size > 1 else nullcontext():
        with together(share):
            run = open_run(run_folder.resolve())
            if world.size > 1:
                torch.set_num_threads(TrainConfig().threads_of_rank(world.ranks_on_cores))
        what = "the network" if network_only else "the network and its baselines"
        with console().status(f"evaluating {what}") if world.is_first else nullcontext():
            result = assess(run, cast(SplitName, split), world, network_only=network_only)
        with together(share):
            if world.is_first:
                record_command(run)
    if world.is_first:
        _show(result)


def _show(result: dict[str, Any]) -> None:
    say(f"{result['split']} split, {result['rows']} rows, {result['quantity']} ({result['unit']})")
    for method in result["methods"]:
        percent, r2 = method["mae_percent"], method["r2"]
        share = "" if percent is None else f"  ({percent:6.2f} %)"
        fit = "" if r2 is None else f"  R2 {r2:.4f}"
        say(
            f"  {method['label']:<44} MAE {method['mae']:8.4f}{share}"
            f"  RMSE {method['rmse']:8.4f}{fit}"
        )
