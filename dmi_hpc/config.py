"""A recipe: the whole run in one TOML file, typed and frozen.

``load_recipe`` turns TOML into a ``Recipe``; every unknown or mistyped key is a ``RecipeError`` that
names the file, the key, what was expected and the valid names. Fields carry their unit and default.
"""

from __future__ import annotations

import difflib
import json
import os
import tomllib
import typing
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import xxhash
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from dmi_hpc.errors import RecipeError
from dmi_hpc.models.objectives import CostName, ObjectiveName
from dmi_hpc.models.space import Parameter
from dmi_hpc.models.spec import Layer


class Config(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def cores_per_rank(local_size: int) -> int:
    """Cores this process may use, shared among the ranks of its machine; at least one."""
    return max(1, len(os.sched_getaffinity(0)) // local_size)


class DataConfig(Config):
    """Where the shard set lies and how it is cut."""

    # absolute from the start: a run is continued, evaluated and reported from any folder
    path: Annotated[Path, AfterValidator(Path.resolve)] | None = Field(
        None, description="shard set; default: RUN/data"
    )
    rows_per_shard: int = Field(512, ge=1)
    validation: float = Field(0.15, gt=0, lt=1, description="share of rows")
    test: float = Field(0.15, gt=0, lt=1, description="share of rows")
    processes: int | Literal["auto"] = Field("auto", description="per MPI rank; auto: its cores")
    backend: Literal["auto", "mmap", "pread", "direct", "ram"] = Field(
        "auto", description="how training reads; auto: what suits the storage"
    )
    shuffle: Literal["auto", "global", "block"] = Field(
        "auto", description="of training; auto: block where random access is slow"
    )
    train_rows: int | None = Field(
        None, ge=2, description="learn from so many training rows; fewer are part of more"
    )

    @model_validator(mode="after")
    def _some_left(self) -> DataConfig:
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation + test is {self.validation + self.test:g}, expected less than 1: the "
                "rest is for training"
            )
        return self


class ModelConfig(Config):
    """Which network is trained."""

    source: Literal["published", "search", "layers"] = Field(
        "published", description="the task's published network, the search's winner, or `layers`"
    )
    layers: tuple[Layer, ...] = ()

    @model_validator(mode="after")
    def _layers_if_asked_for(self) -> ModelConfig:
        if self.layers and self.source != "layers":
            raise ValueError(
                f'layers are given, but source is "{self.source}": set source = "layers" to train '
                "them, or leave them out"
            )
        if not self.layers and self.source == "layers":
            raise ValueError('source is "layers", but none are given: expected layers = [...]')
        return self


class StartConfig(Config):
    """Weights to start from: what fits by name and shape is taken over."""

    path: Annotated[Path, AfterValidator(Path.resolve)] = Field(
        description="run folder, checkpoint folder or exported folder"
    )
    rename: Mapping[str, str] = Field({}, description="beginnings of names there = names here")
    exclude: tuple[str, ...] = Field(
        (), description="patterns of names that begin anew: a new head"
    )
    rescale_head: bool = Field(
        True, description="fit the last layer to the new target's mean and deviation"
    )


class TrainConfig(Config):
    """One training. A search may vary any of these as a hyper-parameter."""

    epochs: int = Field(100, ge=1)
    batch_size: int = Field(32, ge=1, description="global: over all ranks")
    accumulation: int = Field(1, ge=1, description="parts that a rank computes its share in")
    optimizer: Literal["adam", "adamw", "sgd", "lamb", "lars"] = "adamw"
    learning_rate: float = Field(1e-3, gt=0)
    reference_batch: int | None = Field(
        None, ge=1, description="batch size that learning_rate is of; default: batch_size"
    )
    batch_scaling: Literal["linear", "sqrt"] = Field(
        "linear", description="how the rate grows from reference_batch to batch_size"
    )
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd and lars")
    schedule: Literal["constant", "cosine", "one_cycle", "step", "plateau"] = "cosine"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of all steps with rising rate")
    decay: float = Field(0.1, gt=0, lt=1, description="factor of step and plateau")
    decay_epochs: int = Field(
        30, ge=1, description="step: between drops; plateau: epochs without a better validation"
    )
    loss: Literal["mse", "mae", "huber"] = Field(
        "mse", description="of numbers; classes have their cross entropy"
    )
    force_weight: float = Field(
        0.9,
        ge=0,
        le=1,
        description="of the forces' loss, where a task has them; the energy's: the rest",
    )
    clip_norm: float = Field(0.0, ge=0, description="largest gradient norm; 0 = no clipping")
    not_finite: Literal["fail", "skip"] = Field(
        "fail", description="what becomes of a step whose loss or gradient is not finite"
    )
    augment: bool = Field(True, description="random symmetries of the task in each epoch")
    patience: int | None = Field(None, ge=1, description="epochs without a better validation loss")
    noise_scale: bool = Field(
        False, description="measure the gradient noise scale; ranks or accumulation above 1"
    )
    average: float | None = Field(
        None, gt=0, lt=1, description="decay of a running mean of the weights, which is then used"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="bf16, fp16: autocast")
    device: Literal["auto", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one, else the CPU; cuda: a GPU, or an error"
    )
    engine: Literal["auto", "deepspeed", "torch"] = Field(
        "auto", description="auto: torch where ZeRO is not needed, as it is faster there"
    )
    zero_stage: Literal["auto", 0, 1, 2, 3] = Field(
        "auto", description="what ranks share of optimiser, gradients, weights; auto: what fits"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="to the host's memory; all: weights too, stage 3"
    )
    deepspeed: Mapping[str, Any] = Field(
        {}, description="merged into the DeepSpeed configuration that is made"
    )
    activation_checkpointing: bool = Field(
        False, description="compute activations twice instead of keeping them"
    )
    compile: bool = Field(False, description="torch.compile; needs a compiler")
    reproducible: bool = Field(False, description="deterministic kernels, or an error")
    freeze: tuple[str, ...] = Field((), description="patterns of weights that stay as they are")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor of the rate from each layer to the one before it"
    )
    start: StartConfig | None = Field(None, description="weights to start from")
    threads: int | Literal["auto"] = Field("auto", description="CPU threads of a rank")
    loader_threads: int = Field(2, ge=0, description="that read ahead; 0: the step itself reads")
    keep_checkpoints: int = Field(2, ge=1, description="newest ones kept, besides the best")
    checkpoint_s: float | None = Field(
        None, gt=0, description="seconds between checkpoints within an epoch"
    )
    time_limit_s: float | None = Field(
        None, gt=0, description="stop before; a Slurm job's end is known anyway"
    )

    def threads_of_rank(self, local_size: int) -> int:
        """CPU threads of one of `local_size` ranks: as said, or OMP_NUM_THREADS, or its share."""
        if self.threads != "auto":
            return self.threads
        given = os.environ.get("OMP_NUM_THREADS", "")
        return int(given) if given.isdigit() and int(given) > 0 else cores_per_rank(local_size)


class SpaceConfig(Config):
    """What differs from the search space of the task."""

    network: Mapping[str, Any] = Field({}, description="choices of `NetworkSpace`")
    hyper: Mapping[str, Parameter | Literal[False]] = Field(
        {}, description="[train] keys and their ranges; false: not varied"
    )
    founders: bool = Field(True, description="begin with the task's known good networks")


class SearchConfig(Config):
    """An asynchronous genetic search for the network and its training hyper-parameters."""

    evaluations: int = Field(64, ge=1)
    workers: int | Literal["auto"] = Field("auto", description="trials at once")
    epochs: int = Field(10, ge=1, description="of one trial")
    population: int = Field(16, ge=2)
    initial: int = Field(16, ge=1, description="founders and random networks before breeding")
    surrogate: bool = Field(True, description="SVM screening of children")
    adaptive: bool = Field(
        False, description="kinds of change get their shares by what they lately brought"
    )
    replacement: Literal["worst", "age"] = Field(
        "worst", description="who makes room in the population: the worst, or the oldest"
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="results without improvement before a population of like ones restarts",
    )
    least_epochs: int | None = Field(
        None, ge=1, description="a trial pauses after so many; only the best go on, up to `epochs`"
    )
    rungs: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="or: a trial pauses after each of these, ascending; then trains to its end"
    )
    rung_unit: Literal["epochs", "samples", "seconds"] = Field(
        "epochs", description="of `rungs`; a trial pauses after the epoch that reaches one"
    )
    reduction: int = Field(3, ge=2, description="of so many trials that paused, one goes on")
    extrapolate: bool = Field(
        False, description="who goes on is decided by the errors expected at the next rung"
    )
    inherit: bool = Field(
        False,
        description="a child begins with a parent's weights if they are worth it, and then trains half "
        "of `epochs`",
    )
    objectives: tuple[ObjectiveName, ...] = Field(
        ("error",), description="what is minimised: error, and costs to be traded for it"
    )
    limits: Mapping[CostName, Annotated[float, Field(gt=0)]] = Field(
        {}, description="a network that costs more is not trained"
    )
    time_limit_s: float | None = Field(None, gt=0, description="no new trial after it")
    trial_time_limit_s: float | None = Field(None, gt=0, description="a slower trial fails")
    max_flops: float | None = Field(
        None, gt=0, description="of one forward pass of one sample; costlier networks are not tried"
    )
    trial_memory_GB: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="a larger network is not started; auto: a worker's share"
    )
    trial_threads: int = Field(1, ge=1)
    ranks: int = Field(1, ge=1, description="processes of one trial, each with its own device")
    gpu_share: float = Field(
        1.0, gt=0, le=1, description="of a GPU for one rank; several small networks share it"
    )
    train: Mapping[str, Any] = Field({}, description="[train] keys that differ in trials")
    space: SpaceConfig | None = Field(None, description="what differs from the task's space")

    @model_validator(mode="after")
    def _error_first(self) -> SearchConfig:
        if self.objectives[:1] != ("error",) or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(
                f"objectives are {', '.join(self.objectives) or 'none'}; expected error first, then "
                "different costs"
            )
        return self

    @model_validator(mode="after")
    def _comparable(self) -> SearchConfig:
        if self.least_epochs is not None and self.least_epochs >= self.epochs:
            raise ValueError(
                f"least_epochs is {self.least_epochs}, expected fewer than epochs = {self.epochs}"
            )
        if self.ranks > 1 and "latency_s" in self.limits:
            raise ValueError(
                f"ranks = {self.ranks} with limits.latency_s: ranks measure different times and would "
                "not agree on a network; leave out one of the two"
            )
        if self.ranks > 1 and self.inherit:
            raise ValueError(
                f"ranks = {self.ranks} with inherit: trials of several ranks do not inherit; leave out "
                "one of the two"
            )
        return self

    @property
    def pauses(self) -> bool:
        """Whether trials pause at rungs."""
        return self.least_epochs is not None or bool(self.rungs)

    @model_validator(mode="after")
    def _rungs_rise(self) -> SearchConfig:
        if self.least_epochs is not None and self.rungs:
            raise ValueError("least_epochs and rungs both say when trials pause; leave out one")
        if any(a >= b for a, b in pairwise(self.rungs)):
            raise ValueError(f"rungs are {', '.join(map(str, self.rungs))}; expected to rise")
        if self.rungs and self.rung_unit == "epochs" and self.rungs[-1] >= self.epochs:
            raise ValueError(
                f"the last of rungs is {self.rungs[-1]:g}, expected fewer than epochs = {self.epochs}"
            )
        if self.extrapolate and not self.pauses:
            raise ValueError("extrapolate = true, but no trial pauses: set least_epochs or rungs")
        return self


class LaunchConfig(Config):
    """How the recipe's training is started."""

    ranks: int | Literal["auto"] = Field(
        "auto", description="auto: one per GPU, else 2 if cores allow"
    )


# With what, and how far, a run is computed, not what: it may go on with other values of these.
RESOURCES: Final[Mapping[str, set[str]]] = {
    "data": {"processes", "backend"},
    "train": {
        *("threads", "loader_threads", "keep_checkpoints", "checkpoint_s", "time_limit_s"),
        *("engine", "zero_stage", "offload", "deepspeed", "activation_checkpointing", "compile"),
        *("noise_scale", "device"),
    },
    "search": {"workers", "gpu_share", "time_limit_s", "evaluations", "trial_memory_GB"},
    "launch": {"ranks"},
}


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

    def identity(self) -> dict[str, Any]:
        """Everything that decides what is computed, as plain data: all but `RESOURCES`."""
        return self.model_dump(mode="json", exclude=dict(RESOURCES))

    def fingerprint(self) -> str:
        """Equal identities, equal fingerprints."""
        return xxhash.xxh3_128_hexdigest(json.dumps(self.identity(), sort_keys=True).encode())


def load_recipe(path: Path) -> Recipe:
    """Read and check a TOML recipe. Raises RecipeError naming file, key and valid names."""
    try:
        with path.open("rb") as stream:
            raw = tomllib.load(stream)
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such recipe. Recipes of the project: recipes/*.toml"
        ) from None
    except OSError as error:
        raise RecipeError(f"{path}: not a readable recipe: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
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
    if problem["type"] == "value_error":  # our own validators say what they found
        return f"key '{key}': {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
    found = repr(problem["input"])
    return f"key '{key}': {problem['msg']}; found {found[:120]}"


def _field_names(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the model at `location`: field names, indices and kinds in a union."""
    found = [model]
    for part in location:
        fields = [m.model_fields[part] for m in found if part in m.model_fields]
        nested = [inner for field in fields for inner in _models_in(field.annotation)]
        of_kind = [m for m in found if "kind" in m.model_fields and _kind(m) == part]
        found = of_kind or nested or found
    return sorted({name for m in found for name in m.model_fields})


def _kind(model: type[BaseModel]) -> Any:
    return model.model_fields["kind"].default


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in _models_in(inner)]
