"""A recipe: the whole run in one TOML file, typed and frozen.

``load_recipe`` turns TOML into a ``Recipe``; every unknown or mistyped key is a ``RecipeError`` that
names the file, the key, what was expected and the valid names. Fields carry their unit and default.
"""

from __future__ import annotations

import difflib
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dmi_hpc.errors import RecipeError
from dmi_hpc.models.spec import Layer


class Config(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def cores_per_rank(local_size: int) -> int:
    """Cores this process may use, shared among the ranks of its machine; at least one."""
    return max(1, len(os.sched_getaffinity(0)) // local_size)


class DataConfig(Config):
    """Where the shard set lies and how it is cut."""

    path: Path | None = Field(None, description="shard set; default: RUN/data")
    rows_per_shard: int = Field(512, ge=1)
    validation: float = Field(0.15, gt=0, lt=1, description="share of rows")
    test: float = Field(0.15, gt=0, lt=1, description="share of rows")
    processes: int | Literal["auto"] = Field("auto", description="per MPI rank; auto: its cores")


class ModelConfig(Config):
    """Which network is trained."""

    source: Literal["published", "search", "layers"] = Field(
        "published", description="the task's published network, the search's winner, or `layers`"
    )
    layers: tuple[Layer, ...] = ()


class TrainConfig(Config):
    """One training. A search may vary any of these as a hyper-parameter."""

    epochs: int = Field(100, ge=1)
    batch_size: int = Field(32, ge=1, description="global: over all ranks")
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    schedule: Literal["constant", "cosine", "one_cycle"] = "cosine"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of all steps with rising rate")
    loss: Literal["mse", "mae", "huber"] = "mse"
    clip_norm: float = Field(0.0, ge=0, description="largest gradient norm; 0 = no clipping")
    augment: bool = Field(True, description="random symmetries of the task in each epoch")
    patience: int | None = Field(None, ge=1, description="epochs without a better validation loss")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast")
    engine: Literal["deepspeed", "torch"] = "deepspeed"
    threads: int | Literal["auto"] = Field("auto", description="CPU threads of a rank")
    keep_checkpoints: int = Field(2, ge=1, description="newest ones kept, besides the best")

    def threads_of_rank(self, local_size: int) -> int:
        """CPU threads of one of `local_size` ranks: as said, or OMP_NUM_THREADS, or its share."""
        if self.threads != "auto":
            return self.threads
        given = os.environ.get("OMP_NUM_THREADS", "")
        return int(given) if given.isdigit() and int(given) > 0 else cores_per_rank(local_size)


class SearchConfig(Config):
    """An asynchronous genetic search for the network and its training hyper-parameters."""

    evaluations: int = Field(64, ge=1)
    workers: int | Literal["auto"] = Field("auto", description="trials at once")
    epochs: int = Field(10, ge=1, description="of one trial")
    population: int = Field(16, ge=2)
    initial: int = Field(12, ge=1, description="founders and random networks before breeding")
    surrogate: bool = Field(True, description="SVM screening of children")
    time_limit_s: float | None = Field(None, gt=0, description="no new trial after it")
    trial_time_limit_s: float | None = Field(None, gt=0, description="a slower trial fails")
    max_flops: float | None = Field(
        None, gt=0, description="of one forward pass of one sample; costlier networks are not tried"
    )
    trial_memory_GB: float = Field(2.0, gt=0, description="a larger network is not started")
    trial_threads: int = Field(1, ge=1)
    train: Mapping[str, Any] = Field({}, description="[train] keys that differ in trials")


class LaunchConfig(Config):
    """How the recipe's training is started."""

    ranks: int | Literal["auto"] = Field(
        "auto", description="auto: one per GPU, else 2 if cores allow"
    )


class Recipe(Config):
    """The whole run. `task` holds the task's name and its own options."""

    name: str = Field(min_length=1)
    seed: int = Field(0, ge=0)
    task: Mapping[str, Any]
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    search: SearchConfig = SearchConfig()
    launch: LaunchConfig = LaunchConfig()

    def fingerprint(self) -> str:
        """Identity of the run: equal recipes, equal fingerprints."""
        return xxhash.xxh3_128_hexdigest(self.model_dump_json().encode())


def load_recipe(path: Path) -> Recipe:
    """Read and check a TOML recipe. Raises RecipeError naming file, key and valid names."""
    try:
        with path.open("rb") as stream:
            raw = tomllib.load(stream)
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such recipe. Recipes of the project: recipes/*.toml"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from None
    raw.setdefault("name", path.stem)
    recipe = parse(Recipe, raw, where=str(path))
    if "name" not in recipe.task:
        raise RecipeError(f'{path}: task.name is missing: expected e.g. name = "homogenization"')
    with_train(recipe, recipe.search.train, where=f"{path}: search.train")
    return recipe


def with_train(recipe: Recipe, changes: Mapping[str, Any], *, where: str) -> TrainConfig:
    """The recipe's [train] with some keys changed, checked like the recipe itself."""
    return parse(TrainConfig, {**recipe.train.model_dump(), **changes}, where=where)


C = typing.TypeVar("C", bound=BaseModel)


def parse(model: type[C], raw: Mapping[str, Any], *, where: str) -> C:
    """Validate `raw` as `model`; a RecipeError lists every problem, one per line."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        lines = [_explain(model, dict(problem)) for problem in error.errors()]
        raise RecipeError("\n".join(f"{where}: {line}" for line in lines)) from None


def _explain(model: type[BaseModel], problem: dict[str, Any]) -> str:
    location = tuple(problem["loc"])
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        names = _field_names(model, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"unknown key '{key}'.{hint} Valid names here: {', '.join(names)}"
    if problem["type"] == "missing":
        return f"key '{key}' is missing"
    found = repr(problem["input"])
    return f"key '{key}': {problem['msg']}; found {found[:120]}"


def _field_names(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the (nested) model at `location`."""
    current: type[BaseModel] = model
    for part in location:
        field = current.model_fields.get(str(part))
        nested = _model_in(field.annotation) if field else None
        if nested is None:
            return sorted(current.model_fields)
        current = nested
    return sorted(current.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        models = [m for m in map(_model_in, typing.get_args(annotation)) if m is not None]
        return models[0] if len(models) == 1 else None
    return None
