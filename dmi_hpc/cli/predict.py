"""``dmi predict``: a trained network on a user's inputs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dmi_hpc.cli.options import RunFolder, new_app
from dmi_hpc.run import open_run
from dmi_hpc.watch import say

app = new_app()


@app.command()
def predict(
    run_folder: RunFolder,
    inputs: Annotated[Path, typer.Argument(help="what the task reads: formulas.csv, phases.npy")],
    out: Annotated[Path | None, typer.Option(help="CSV to write; default: the terminal")] = None,
) -> None:
    """Predict with the best checkpoint; one line per input, in the quantity's unit."""
    from dmi_hpc.assess import load_model
    from dmi_hpc.files import write_text
    from dmi_hpc.table import csv_text

    run = open_run(run_folder.resolve())
    model = load_model(run)
    labels, fields = model.task.read_inputs(inputs)
    predicted = model.predict(fields)
    quantity = model.task.quantity
    header = ("input", f"{quantity.name} ({quantity.unit})")
    text = csv_text(header, zip(labels, (f"{p:.6g}" for p in predicted), strict=True))
    if out is None:
        sys.stdout.write(text)
        return
    write_text(out, text)
    say(f"{len(labels)} predictions in {out}")
