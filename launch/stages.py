"""The stages of a recipe, and the `dmi` command of each. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dmi_hpc.config import Recipe

STAGES = ("data", "search", "train", "evaluate", "report")


def stages_of(recipe: Recipe, stage: str) -> tuple[str, ...]:
    """`stage`, or of "all" those that the recipe needs, in order: data from a user is not built, no
    search without need."""
    if stage != "all":
        return (stage,)
    searched = recipe.model.source == "search"
    imported = recipe.data.path is not None
    return tuple(s for s in STAGES if (s != "search" or searched) and (s != "data" or not imported))


def arguments_of(
    stage: str, recipe: Path, folder: Path, *, island: str = "", extra: Sequence[str] = ()
) -> tuple[str, ...]:
    """What follows `dmi`; a stage that an earlier call left goes on. folder: of the run."""
    match stage:
        case "data":
            return ("data", "build", str(recipe), "--out", str(folder), "--resume", *extra)
        case "search" | "train":
            beside = ("--island", island) if island else ()
            return (stage, str(recipe), "--out", str(folder), "--resume", *beside, *extra)
        case _:
            return (stage, str(folder), *extra)
