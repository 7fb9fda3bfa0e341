"""``dmi search refine``: from the best networks of a search to a trained ensemble."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dmi_hpc.cli.options import RunFolder
from dmi_hpc.cli.predict import require_one_process
from dmi_hpc.run import open_run, record_command
from dmi_hpc.watch import console, say


def refine(
    run: RunFolder,
    top: Annotated[int, typer.Option(min=1, help="networks, the best ones")] = 5,
    seeds: Annotated[int, typer.Option(min=1, help="trainings of each")] = 3,
    network: Annotated[
        list[str] | None,
        typer.Option(help="name as `top` shows it, instead of the best; may be repeated"),
    ] = None,
    recipes: Annotated[
        bool, typer.Option("--recipes", help="write the recipes of the trainings, start none")
    ] = False,
) -> None:
    """Train the best networks of RUN in full from several seeds, and make an ensemble of them.

    It predicts with an uncertainty, checked on the test split. Called again it continues. The
    trainings may run elsewhere, several at once: --recipes prints their commands.
    """
    from search.results.result import members_of, prepare
    from search.results.result import refine as refined

    require_one_process("search refine")
    opened = open_run(run.resolve())
    members = members_of(opened, top, seeds, network or ())
    if recipes:
        folder = prepare(opened, members)
        for member in members:
            place = folder / member.name
            say(f"dmi train {place}.toml --out {place} --resume")
        return
    record_command(opened)
    scores = refined(opened, members, console().print)
    _tell(scores)
    say(f"ensemble in {opened.search / 'ensemble'}; report: dmi report {run}")


def _tell(scores: dict[str, Any]) -> None:
    """Errors of the members and of the ensemble, and whether its uncertainty can be relied on."""
    unit, test = scores["unit"], scores["test"]
    for member in scores["members"]:
        say(
            f"network {member['network']}, seed {member['seed']}: validation MAE "
            f"{member['validation_mae']:.4g}, test MAE {member['test_mae']:.4g} {unit}"
            + ("" if member["chosen"] else ", not in the ensemble")
        )
    count = sum(member["chosen"] for member in scores["members"])
    say(
        f"ensemble of {count}: test MAE {test['mae']:.4g} {unit}; {100 * test['coverage_1']:.0f} % of "
        f"the errors within sigma, {100 * test['coverage_2']:.0f} % within 2 sigma (normal: 68, 95)"
    )
