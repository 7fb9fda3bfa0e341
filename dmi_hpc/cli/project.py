"""``dmi project``: inputs as a trained network sees them, layer by layer, in two dimensions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmi_hpc.cli.options import new_app, stops_tidily
from dmi_hpc.cli.predict import Trained, require_one_process
from dmi_hpc.watch import say

app = new_app()


@app.command()
def project(
    run: Trained,
    inputs: Annotated[Path, typer.Argument(help="what the task reads, or a shard set")],
    out: Annotated[Path, typer.Option(help="file to write: .csv, .parquet, .h5")],
    layer: Annotated[str, typer.Option(help="all, or numbers from 1: 1,2,8")] = "all",
) -> None:
    """Activations of layers, projected on their two principal components; one row per input and layer.

    Layers are those with one vector for each input: dense ones with what follows them, readouts.
    """
    from dmi_hpc.files import writing
    from dmi_hpc.predict import load
    from dmi_hpc.projection import activations, layers_of, project, read_inputs
    from dmi_hpc.table import Column, check_suffix, table_file

    require_one_process("project")
    check_suffix(out)
    model = load(run)
    numbers = _numbers(layer, len(layers_of(model.network)))
    labels, fields = read_inputs(model, inputs)
    columns = (
        Column("layer", "integer"),
        Column("input", "text"),
        Column("pc1", "real", digits=7),
        Column("pc2", "real", digits=7),
    )
    with stops_tidily(), writing(out.parent), table_file(out, columns) as append:
        for number, values in activations(model, fields, numbers).items():
            found = project(values, number)
            pc1, pc2 = found.points.T
            append({"layer": [number] * len(labels), "input": labels, "pc1": pc1, "pc2": pc2})
            shares = " + ".join(f"{100 * share:.1f} %" for share in found.explained)
            say(f"layer {number:>3}, {found.units:>5} units: {shares} of the variance")
    say(f"{len(labels):,} inputs, {len(numbers)} layers: {out}")


def _numbers(text: str, count: int) -> tuple[int, ...]:
    from dmi_hpc.errors import DataError

    if text == "all":
        return tuple(range(1, count + 1))
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise DataError(f"--layer: found '{text}', expected all, or numbers from 1 to {count}")
    return tuple(dict.fromkeys(map(int, parts)))
