"""Arguments that several sub-commands share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from dmi_hpc.config import Recipe, load_recipe
from dmi_hpc.errors import EXIT_INTERRUPTED, STOP_SIGNALS
from dmi_hpc.run import Run, open_run
from dmi_hpc.watch import console

RecipeFile = Annotated[Path, typer.Argument(help="recipe (TOML): the whole run in one file")]
Out = Annotated[Path | None, typer.Option(help="run folder; default: runs/NAME of the recipe")]
Resume = Annotated[bool, typer.Option("--resume", help="continue what an earlier call left")]
RunFolder = Annotated[Path, typer.Argument(help="run folder")]


def new_app() -> typer.Typer:
    """A sub-command's app, alike in all."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def recipe_of(recipe_file: Path) -> Recipe:
    """The recipe, with everything checked that can be without its data."""
    from dmi_hpc.tasks import check_recipe

    recipe = load_recipe(recipe_file)
    check_recipe(recipe, where=str(recipe_file))
    return recipe


def run_of(recipe_file: Path, out: Path | None) -> Run:
    """The run of a recipe, in `out` or its default folder."""
    recipe = recipe_of(recipe_file)
    return open_run((out or Path("runs") / recipe.name).resolve(), recipe)


@contextmanager
def stops_tidily(then: str = "repeat the command") -> Iterator[None]:
    """A stop signal ends the block as an error does: what is half done is removed; exit code 75.

    then: what the user may do. Once a signal has come only a second Ctrl-C cuts the tidying short.
    """
    came: list[signal.Signals] = []

    def leave(number: int, frame: FrameType | None) -> None:
        came.append(signal.Signals(number))
        for other in before:
            signal.signal(other, signal.SIG_IGN)
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        raise SystemExit(EXIT_INTERRUPTED)

    # under nohup a closed terminal is no reason to stop
    before = {n: old for n in STOP_SIGNALS if (old := signal.getsignal(n)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            console().print(f"stopped by {came[0].name}: {then}")
