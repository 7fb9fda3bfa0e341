"""``dmi screen``: compositions of chosen elements, ranked by their distance to the convex hull."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dmi_hpc.cli.options import new_app, stops_tidily
from dmi_hpc.cli.predict import Trained, require_one_process
from dmi_hpc.watch import console, progress_bar, say

if TYPE_CHECKING:
    from dmi_hpc.predict import Model
    from dmi_hpc.screening.options import Screening
    from dmi_hpc.screening.run import Screened

app = new_app()

SUMMARY = "screening.json"  # of a folder
_SHOWN = 10  # candidates in the terminal


@app.command()
def screen(
    run: Trained,
    screening: Annotated[
        Path, typer.Argument(help="screening file (TOML): elements, known compounds, what is kept")
    ],
    out: Annotated[Path, typer.Option(help="folder for candidates.csv and screening.json")],
) -> None:
    """Predict the formation energy of every composition; rank the best by the convex hull.

    Compositions are made and predicted in blocks, on the GPU if there is one; the best are kept. A
    folder of an earlier screening is replaced.
    """
    from dmi_hpc.predict import load
    from dmi_hpc.screening.enumerate import count
    from dmi_hpc.screening.known import read_known
    from dmi_hpc.screening.options import read_screening
    from dmi_hpc.screening.run import screen as run_screening
    from dmi_hpc.table import check_suffix

    require_one_process("screen")
    what = read_screening(screening)
    _check_folder(out)
    check_suffix(Path(f"candidates.{what.candidates.table}"))
    model, total = load(run), count(what.compositions)
    known = read_known(what.candidates)
    say(f"{total:,} compositions on {model.device}; {len(known):,} known compounds")
    bar = progress_bar(console())
    with stops_tidily(), bar:
        line = bar.add_task("screening", total=total, note="")
        result = run_screening(model, what, known, lambda done: bar.update(line, completed=done))
        _write(out, model, what, result, {"compositions": total, "known": len(known)})
    _show(result, out)


def _check_folder(out: Path) -> None:
    """Raises DataError if there is something else, which would be replaced."""
    from dmi_hpc.errors import DataError

    if out.exists() and not (out / SUMMARY).exists():
        raise DataError(f"{out}: exists and is no earlier screening ({SUMMARY}): choose another")


def _write(
    out: Path, model: Model, what: Screening, result: Screened, counts: dict[str, int]
) -> None:
    from dmi_hpc.files import atomic_folder, write_json, writing
    from dmi_hpc.screening.rank import COLUMNS
    from dmi_hpc.table import table_file

    summary: dict[str, Any] = {
        "screening": what.model_dump(mode="json"),
        "checkpoint": model.checkpoint,
        "data": model.data,
        "metrics": dict(model.metrics),
        "device": str(model.device),
        **counts,
        "predicted": result.predicted,
        "within": result.within,
        "kept": len(result.rows["formula"]),
        "seconds": result.seconds,
    }
    with writing(out.parent), atomic_folder(out) as folder:
        with table_file(folder / f"candidates.{what.candidates.table}", COLUMNS) as append:
            append(result.rows)
        write_json(folder / SUMMARY, summary)


def _show(result: Screened, out: Path) -> None:
    rows, kept = result.rows, len(result.rows["formula"])
    say(
        f"{result.predicted:,} predicted in {result.seconds:.1f} s "
        f"({result.predicted / result.seconds:,.0f}/s); {result.within:,} near enough to the hull, "
        f"the best {kept:,} in {out}"
    )
    for i in range(min(kept, _SHOWN)):
        say(
            f"  {rows['formula'][i]:<16} {rows['formation_energy'][i]:8.3f} eV/atom, "
            f"{rows['above_known_hull'][i]:+.3f} from {rows['decomposes_into'][i]}"
        )
