"""A network that a search found, as a recipe of its own: what ``dmi train`` takes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmi_hpc.config import ModelConfig, Recipe, with_train
from dmi_hpc.models.space import HyperValue
from dmi_hpc.models.spec import NetworkSpec
from search.spaces.genome import Genome

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def training_recipe(
    recipe: Recipe, data: Path, network: NetworkSpec, hyper: Mapping[str, HyperValue], seed: int
) -> Recipe:
    """The recipe of a search changed to train `network` in full, on the set at `data`."""
    # every network is another one: nothing of another training fits
    changes = {"start": None, "freeze": (), **hyper}
    update = {
        "seed": seed,
        "data": recipe.data.model_copy(update={"path": data.resolve()}),
        "model": ModelConfig(source="layers", layers=network.layers),
        "train": with_train(recipe, changes, where="hyper-parameters of the search"),
    }
    return recipe.model_copy(update=update)


def trained_with(genome: Genome, metrics: Mapping[str, Any]) -> dict[str, HyperValue]:
    """[train] keys of an evaluated network: its hyper-parameters, and in how many parts memory let a
    batch be computed, if in more than the recipe says. metrics: those of its trial."""
    parts = metrics.get("accumulation")
    return {**dict(genome.hyper), **({} if parts is None else {"accumulation": int(parts)})}


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every key with its value; its [search] is left out."""
    whole = recipe.model_dump(mode="json", exclude_none=True, exclude={"search"})
    tables = {key: value for key, value in whole.items() if isinstance(value, dict)}
    lines = _assignments({key: value for key, value in whole.items() if key not in tables})
    for name, table in tables.items():
        lines += ["", f"[{_key(name)}]", *_assignments(table)]
    return "\n".join(lines) + "\n"


def _assignments(table: Mapping[str, Any]) -> list[str]:
    return [f"{_key(key)} = {_value(value)}" for key, value in table.items()]


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(_assignments(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    # strings, numbers and booleans are written alike in both, but for one control character
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")
