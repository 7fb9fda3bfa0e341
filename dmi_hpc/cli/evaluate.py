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
    for part in (result, *result.get("others", ())):
        unit = f" ({part['unit']})" if part["unit"] else ""
        say(f"{result['split']} split, {part['rows']:,} rows, {part['quantity']}{unit}")
        for method in part["methods"]:
            say(f"  {method['label']:<44} {_scores(method, part.get('transform', 'identity'))}")


def _scores(method: dict[str, Any], transform: str) -> str:
    """What fits the kind of target, in one line."""
    if transform == "category":
        return f"accuracy {method['accuracy']:.4f}"
    if transform == "logit":
        auc = "     -" if method.get("auc") is None else f"{method['auc']:.4f}"
        return f"AUC {auc}  MAE of the probability {method['mae']:.4f}"
    text = f"MAE {method['mae']:8.4f}"
    if method["mae_percent"] is not None:
        text += f"  ({method['mae_percent']:6.2f} %)"
    text += f"  RMSE {method['rmse']:8.4f}"
    if method["r2"] is not None:
        text += f"  R2 {method['r2']:.4f}"
    if method.get("force_mae") is not None:
        text += f"  forces MAE {method['force_mae']:.4f} RMSE {method['force_rmse']:.4f} eV/A"
    return text
