"""``dmi predict``: a trained network on a user's inputs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from dmi_hpc.cli.options import new_app, stops_tidily
from dmi_hpc.watch import console, progress_bar, say

if TYPE_CHECKING:
    from dmi_hpc.data.manifest import SplitName
    from dmi_hpc.predict import Table
    from dmi_hpc.table import Append, Block

app = new_app()

Trained = Annotated[
    Path, typer.Argument(metavar="RUN", help="run, checkpoint, or folder exported as safetensors")
]


@app.command()
def predict(
    run: Trained,
    inputs: Annotated[
        Path, typer.Argument(help="what the task reads (formulas.csv, phases.npy), or a shard set")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="file to write: .csv, .parquet, .h5; default: CSV to the terminal"),
    ] = None,
    split: Annotated[
        str, typer.Option(help="of a shard set: all | train | validation | test")
    ] = "all",
) -> None:
    """Predict with the best checkpoint; one row per input, in the quantity's unit.

    A shard set may be larger than memory, and so may be what is written.
    """
    from dmi_hpc.predict import load, predict_inputs
    from dmi_hpc.table import check_suffix

    require_one_process("predict")
    if out is not None:
        check_suffix(out)
    model = load(run)
    table = predict_inputs(model, inputs, cast("SplitName | Literal['all']", split))
    with stops_tidily(), _destination(table, out) as append:
        bad = _write(table, append, shown=out is not None)
    if bad:
        console().print(f"{bad:,} of {table.rows:,} predictions are not finite")
    if out is not None:
        say(f"{table.rows:,} predictions in {out}")


def require_one_process(command: str) -> None:
    """Raises LaunchError among several ranks: each would do all the work, and write over the others."""
    from dmi_hpc.errors import LaunchError
    from dmi_hpc.world import detect

    world = detect()
    if world.size > 1:
        raise LaunchError(
            f"dmi {command} is one process, found {world.size} ranks ({world.source}): start it "
            "without mpirun, torchrun or srun"
        )


@contextmanager
def _destination(table: Table, out: Path | None) -> Iterator[Append]:
    from dmi_hpc.files import writing
    from dmi_hpc.table import csv_rows, table_file

    if out is None:
        text = io.StringIO()
        with csv_rows(text, table.columns) as append:

            def show(block: Block) -> None:
                append(block)
                _say_all(text)

            yield show
        _say_all(text)  # the header of a table without rows
        return
    with writing(out.parent), table_file(out, table.columns) as append:
        yield append


def _say_all(text: io.StringIO) -> None:
    if lines := text.getvalue():
        say(lines.removesuffix("\n"))
        text.seek(0)
        text.truncate()


def _write(table: Table, append: Append, *, shown: bool) -> int:
    """Write all rows; how many predictions are not finite. shown: progress, on a terminal."""
    import numpy as np

    result, written, bad = table.columns[-1].name, 0, 0
    bar = progress_bar(console())
    bar.disable |= not shown
    with bar:
        line = bar.add_task("predicting", total=table.rows, note="")
        for block in table.blocks:
            append(block)
            written += len(block[result])
            bad += int((~np.isfinite(block[result])).sum())
            bar.update(line, completed=written)
    assert written == table.rows, f"{written} of {table.rows} rows were written"
    return bad
