"""``dmi export``: a trained network for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmi_hpc.cli.options import new_app, stops_tidily
from dmi_hpc.cli.predict import Trained, require_one_process
from dmi_hpc.watch import console, say

app = new_app()


@app.command()
def export(
    run: Trained,
    out: Annotated[Path, typer.Option(help="new folder")],
    format: Annotated[
        str, typer.Option(help="safetensors (and JSON) | torch (.pt2) | onnx")
    ] = "safetensors",
) -> None:
    """Write the best checkpoint as a folder of its own, checked by reading it back.

    Beside the network: model.json (what it is of) and README.txt (units, how to call it).
    """
    from dmi_hpc.errors import DMIError
    from dmi_hpc.export import FILES, FORMATS
    from dmi_hpc.export import export as write
    from dmi_hpc.files import writing
    from dmi_hpc.predict import load

    require_one_process("export")
    kind = next((known for known in FORMATS if known == format), None)
    if kind is None:
        raise DMIError(f"--format: found '{format}', expected {', '.join(FORMATS)}")
    model = load(run)
    with stops_tidily(), console().status(f"exporting as {kind}"), writing(out.parent):
        spec = write(model, out, kind)
    say(
        f"{spec.quantity} ({spec.unit}) from {spec.checkpoint}: {out / FILES[kind]}, read back and "
        f"checked; {out / 'README.txt'} says how to use it"
    )
