"""Arguments that several sub-commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dmi_hpc.config import Recipe, load_recipe
from dmi_hpc.run import Run, open_run

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
