"""``dmi rank``: compounds by substitution of elements, ranked by a trained classifier of sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from dmi_hpc.cli.options import RunFolder, new_app, stops_tidily
from dmi_hpc.watch import console, progress_bar, say

app = new_app()
_METHODS = {
    "rank": "network",
    "rank_new": "network, known compounds left out",
    "by_type": "frequency in the structure type",
    "by_frequency": "frequency",
}


@app.command()
def rank(
    run_folder: RunFolder,
    split: Annotated[str, typer.Option(help="held-out compounds: test | validation")] = "test",
    elements: Annotated[
        str | None,
        typer.Option(help="a chemical system instead, such as Mg,Cr,O: its candidates"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="of --elements: file to write: .csv, .parquet, .h5")
    ] = None,
) -> None:
    """Rank all assignments of elements to the structures of a split, or to known structure types.

    Held-out compounds: ranking.json, ranking.csv (a line each, with the best new candidates),
    elements.csv and elements.png (what was learnt about the elements) in the run folder.
    """
    from dmi_hpc.cli.predict import require_one_process
    from dmi_hpc.data.manifest import SplitName
    from dmi_hpc.errors import DMIError
    from dmi_hpc.files import writing
    from dmi_hpc.run import open_run
    from dmi_hpc.substitution import run as substitution
    from dmi_hpc.table import check_suffix

    require_one_process("rank")
    if split not in ("test", "validation"):
        raise DMIError(f"--split: found '{split}', expected test or validation")
    if (elements is None) != (out is None):
        raise DMIError("--elements and --out belong together: a system, and the file to write")
    run = open_run(run_folder.resolve())
    if elements is not None and out is not None:
        check_suffix(out)
        wanted = [symbol.strip() for symbol in elements.split(",")]
        with stops_tidily(), writing(out.parent), _progress() as progress:
            found = substitution.system(run, wanted, out, progress)
        say(f"{len(found):,} candidates of {'-'.join(wanted)} in {out}, the most probable first")
        return
    with stops_tidily(), writing(run.folder), _progress() as progress:
        result = substitution.rank(run, cast(SplitName, split), progress)
    _show(result)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    with progress_bar(console()) as bar:
        lines: dict[str, Any] = {}

        def advance(what: str, rows: int, total: int) -> None:
            if what not in lines:
                lines[what] = bar.add_task(what, total=total, note="sites")
            bar.update(lines[what], advance=rows)

        yield advance


def _show(result: dict[str, Any]) -> None:
    sites, elements = result["sites"], result["elements"]
    say(f"{result['split']} split, {sites['rows']:,} sites")
    say(
        f"  accuracy {sites['accuracy']:.4f}, most frequent element {sites['most_frequent']:.4f}; "
        f"macro error {sites['macro_error']:.4f}, balanced {sites['macro_error_balanced']:.4f}"
    )
    wrong = sites["confusion"]
    say(
        f"  errors of the same group {wrong['group']:.4f} (chance {wrong['group_chance']:.4f}), of the "
        f"same row {wrong['row']:.4f} ({wrong['row_chance']:.4f})"
    )
    if elements:
        say(
            f"  nearest weights of the same group {elements['nearest_of_same_group']:.4f} (chance "
            f"{elements['chance']:.4f}), without group 3 {elements['without_group_3']:.4f}"
        )
    if result["known"]:
        say(
            f"{result['known']:,} compositions of this split are in the training rows, too: import the "
            "data again with --group formula"
        )
    for kind, found in result["compounds"].items():
        say(f"held-out compounds, {kind}: {found['compounds']:,}")
        for method, label in _METHODS.items():
            one = found[method]
            say(
                f"  {label:<36} first {one['first']:.4f}  top 10 {one['top_10']:.4f}  "
                f"median rank {one['median']:,.0f}"
            )
