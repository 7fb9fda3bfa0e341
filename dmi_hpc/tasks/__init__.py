"""Published systems as tasks. A task is looked up by name, or as "module:Class" of the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from dmi_hpc.config import Recipe, parse
from dmi_hpc.errors import NetworkError, RecipeError
from dmi_hpc.models.spec import shapes
from dmi_hpc.tasks.base import Task

TASKS: dict[str, str] = {
    "chemixnet": "dmi_hpc.tasks.chemixnet:CheMixNet",
    "crystals": "dmi_hpc.tasks.crystals:Crystals",
    "elemnet": "dmi_hpc.tasks.elemnet:ElemNet",
    "heat_capacity": "dmi_hpc.tasks.heat_capacity:HeatCapacity",
    "homogenization": "dmi_hpc.tasks.homogenization:Homogenization",
    "mpnn": "dmi_hpc.tasks.mpnn:MPNN",
    "oxides": "dmi_hpc.tasks.oxides:Oxides",
    "roost": "dmi_hpc.tasks.roost:Roost",
    "schnet": "dmi_hpc.tasks.schnet:SchNet",
    "sites": "dmi_hpc.tasks.sites:Sites",
}


def make_task(table: Mapping[str, Any]) -> Task:
    """The task of a recipe's [task] table, its options checked. Raises RecipeError."""
    options = {k: v for k, v in table.items() if k != "name"}
    name = str(table["name"])
    found = task_class(name)
    return found(name, parse(found.Options, options, where="task"))


def task_class(name: str) -> type[Task]:
    """Raises RecipeError if there is none of that name."""
    target = TASKS.get(name, name)
    module_name, _, class_name = target.partition(":")
    if not class_name:
        raise RecipeError(
            f"task.name: found '{name}', expected one of {', '.join(sorted(TASKS))}, "
            "or 'module:Class' of your own task"
        )
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"task.name '{name}': {error}. Is its folder on PYTHONPATH?") from error
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise RecipeError(f"task.name '{name}': expected a subclass of dmi_hpc.tasks.base.Task")
    return found


def check_recipe(recipe: Recipe, *, where: str) -> None:
    """Check what only the task knows: its name, its options, and that the layers fit its input.

    Raises RecipeError, each line beginning with `where`.
    """
    key = ""
    try:
        network = make_task(recipe.task).published_network()
        if recipe.model.layers:
            key, network = "model: ", network.model_copy(update={"layers": recipe.model.layers})
        shapes(network)
    except (RecipeError, NetworkError) as error:
        lines = str(error).splitlines()
        raise RecipeError("\n".join(f"{where}: {key}{line}" for line in lines)) from error
