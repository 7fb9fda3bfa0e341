"""The space of a recipe: that of its task, with what ``[search.space]`` changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmi_hpc.config import Recipe, parse
from dmi_hpc.errors import RecipeError
from dmi_hpc.models.space import NetworkSpace, SearchSpace
from dmi_hpc.tasks.base import Task

WHERE = "search.space"
NONE = "none"  # TOML has no null
OF_THE_TASK = ("input_shape", "outputs", "map_output", "graph")


def recipe_space(recipe: Recipe, task: Task) -> SearchSpace:
    """What the search varies. Raises RecipeError naming the key that makes no sense."""
    space, changes = task.space(), recipe.search.space
    if changes is None:
        return space
    if fixed := [name for name in OF_THE_TASK if name in changes.network]:
        raise RecipeError(
            f"{WHERE}.network: {', '.join(fixed)}: the task decides that; leave it out"
        )
    if strange := [n for n, p in changes.hyper.items() if p is False and n not in space.hyper]:
        raise RecipeError(
            f"{WHERE}.hyper: {', '.join(strange)} = false, but the task's search does not vary that; "
            f"it varies: {', '.join(space.hyper)}"
        )
    merged = {**space.network.model_dump(), **_with_nulls(changes.network)}
    network = parse(NetworkSpace, merged, where=f"{WHERE}.network")
    varied = {name: p for name, p in {**space.hyper, **changes.hyper}.items() if p is not False}
    founders = [
        founder.model_copy(
            update={"hyper": {n: value for n, value in founder.hyper.items() if n in varied}}
        )
        for founder in (space.founders if changes.founders else ())
    ]
    whole = {"network": network, "hyper": varied, "founders": founders}
    return parse(SearchSpace, whole, where=WHERE)


def _with_nulls(changes: Mapping[str, Any]) -> dict[str, Any]:
    """ "none" in a list of choices is None: "without"."""
    return {
        name: [None if each == NONE else each for each in value]
        if isinstance(value, list)
        else value
        for name, value in changes.items()
    }
