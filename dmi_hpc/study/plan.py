"""What a study trains: a recipe at each of some points, with each of some seeds."""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmi_hpc.config import Recipe, load_recipe, parse
from dmi_hpc.errors import RecipeError
from dmi_hpc.tasks import check_recipe

Changes = Mapping[str, Any]  # key of the recipe, such as "train.epochs" -> value
_UNSAFE = re.compile(r"[^\w.=+-]+")  # in the name of a folder


@dataclass(frozen=True)
class Point:
    """One choice of the keys that a study varies."""

    changes: Changes

    @property
    def name(self) -> str:
        """Of its folder: "train_rows=250,path=fold0"; "all" if nothing is varied."""
        parts = [f"{key.rpartition('.')[2]}={_short(value)}" for key, value in self.changes.items()]
        return _UNSAFE.sub("_", "+".join(parts)) or "all"


@dataclass(frozen=True)
class Member:
    """One training of a study, and the folder of its run."""

    point: Point
    seed: int
    recipe: Recipe
    folder: Path


def varied(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Texts such as "train.epochs=10,20" -> values of each key, as TOML has them, else as text.

    Raises RecipeError.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not (key and equals and values):
            raise RecipeError(
                f"--vary: found {text!r}, expected KEY=VALUE,VALUE such as train.epochs=10,20"
            )
        found[key] = tuple(_value(part) for part in values.split(","))
    return found


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def points(vary: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination. Raises RecipeError if two would have the same name."""
    found = [
        Point(dict(zip(vary, each, strict=True))) for each in itertools.product(*vary.values())
    ]
    names = [point.name for point in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(
            f"--vary: two points would be called {twice}: name the values differently"
        )
    return found


def members(
    recipe: Path, chosen: Sequence[Point], seeds: Sequence[int], folder: Path
) -> list[Member]:
    """One for each point and seed; runs are below `folder`. Raises RecipeError for a key or a value
    that a recipe cannot have."""
    load_recipe(recipe)  # says what is wrong with the recipe itself
    raw = tomllib.loads(recipe.read_text(encoding="utf-8"))
    raw.setdefault("name", recipe.stem)
    found = []
    for point in chosen:
        changed = _changed(raw, point.changes)
        for seed in seeds:
            where = f"{recipe} ({point.name})"
            made = parse(Recipe, {**changed, "seed": seed}, where=where)
            check_recipe(made, where=where)
            found.append(Member(point, seed, made, folder / point.name / f"seed-{seed}"))
    return found


def _changed(raw: Mapping[str, Any], changes: Changes) -> dict[str, Any]:
    """`raw` with other values of dotted keys; tables on the way to them are copied."""
    new = dict(raw)
    for key, value in changes.items():
        table = new
        *tables, last = key.split(".")
        for name in tables:
            inner = table.get(name, {})
            if not isinstance(inner, Mapping):
                raise RecipeError(f"--vary {key}: {name} is no table of the recipe")
            table[name] = dict(inner)
            table = table[name]
        table[last] = value
    return new


def _short(value: Any) -> str:
    return Path(value).name if isinstance(value, str) else str(value)
