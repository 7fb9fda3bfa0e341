"""The complete DeepSpeed configuration of a recipe, with the user's own keys merged and checked.

DeepSpeed ignores unknown keys at its top level and in several sections, and sections that our
optimiser, loader and checkpoints take the place of. Here each is an error that names it.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic
from torch import nn

from dmi_hpc.config import TrainConfig
from dmi_hpc.engine.gradients import norm_needed
from dmi_hpc.engine.library import import_deepspeed
from dmi_hpc.engine.stages import bucket_of
from dmi_hpc.errors import RecipeError
from dmi_hpc.world import World

# DeepSpeed's keys that follow from the recipe -> the recipe's key
_RECIPE = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulation",
    "gradient_accumulation_steps": "train.accumulation",
    "managed_gradient_accumulation": "train.accumulation",
    "gradient_clipping": "train.clip_norm",
    "gradient_allreduce_op": "train.learning_rate",  # gradients are means over ranks
    "zero_optimization.stage": "train.zero_stage",
    "zero_optimization.compute_grad_norm": "train.clip_norm and train.not_finite",
    "zero_optimization.offload_optimizer.device": "train.offload",
    "zero_optimization.offload_param.device": "train.offload",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "activation_checkpointing": "train.activation_checkpointing",
    "compile": "train.compile",
    "zero_allow_untested_optimizer": "train.optimizer",
}
# sections of DeepSpeed that a training here never reaches
_UNUSED = {
    "checkpoint",
    "data_efficiency",
    "dataloader_drop_last",
    "datastates",
    "pipeline",
    "autotuning",
    "hybrid_engine",
    "tensor_parallel",
    "expert_parallel",
    "sequence_parallel_size",
    "use_data_before_expert_parallelism",
    "weight_quantization",
    "vocabulary_size",
}


def deepspeed_config(
    module: nn.Module, config: TrainConfig, world: World, stage: int, *, on_cpu: bool
) -> dict[str, Any]:
    """What DeepSpeed gets; every default that changes numbers or memory is written.

    Left out, gradient_clipping is 1.0 since DeepSpeed 0.19, and the buckets take 2 GB a trial.
    Raises RecipeError for a key of `config.deepspeed` that would do nothing or contradicts.
    """
    made = _generated(module, config, world, stage, on_cpu=on_cpu)
    if not config.deepspeed:
        return made
    import_deepspeed()
    own = _with_aliases(config.deepspeed)
    for path, value in _leaves(own):
        _require_free(path, value, made)
    merged = _merged(made, own)
    _require_read(merged, own)
    return merged


def _zero(numel: int, config: TrainConfig, stage: int, *, on_cpu: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": stage == 3 and not on_cpu,
        "reduce_bucket_size": bucket_of(numel),
        "allgather_bucket_size": bucket_of(numel),
        "round_robin_gradients": False,
        "ignore_unused_parameters": True,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
            "sub_group_size": 1_000_000_000,
        }
    if stage in (1, 2):
        zero["compute_grad_norm"] = norm_needed(config) or config.offload != "none"
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": not on_cpu}
    if config.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": not on_cpu}
    return zero


def _generated(
    module: nn.Module, config: TrainConfig, world: World, stage: int, *, on_cpu: bool
) -> dict[str, Any]:
    numel = sum(p.numel() for p in module.parameters())
    share = -(-config.batch_size // world.size)
    micro = -(-share // config.accumulation)
    return {
        "train_batch_size": micro * config.accumulation * world.size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.accumulation,
        # at stage 0 the engine clips, for DeepSpeed would keep the norm to itself
        "gradient_clipping": config.clip_norm if stage else 0.0,
        "zero_optimization": _zero(numel, config, stage, on_cpu=on_cpu),
        "communication_data_type": "fp32",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        # autocast and loss scale are the engine's: see network.py and gradients.py
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        "memory_breakdown": False,
    }


def _leaves(mapping: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        path = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _require_free(path: str, value: Any, made: Mapping[str, Any]) -> None:
    """Raise RecipeError if a key is the recipe's, has no effect here, or says nothing."""
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        start = ".".join(parts[:depth])
        if start in _RECIPE and value != _at(made, parts):
            raise RecipeError(
                f"train.deepspeed: {path} is {value!r}, but that follows from the recipe: set "
                f"{_RECIPE[start]} instead"
            )
    if parts[0] in _UNUSED:
        raise RecipeError(
            f"train.deepspeed: {path} has no effect in this training; leave out {parts[0]}"
        )
    if value == "auto":
        raise RecipeError(
            f'train.deepspeed: {path} is "auto", which DeepSpeed drops without a word (it is of '
            "Hugging Face's trainer); give a value or leave it out"
        )


def _at(mapping: Any, parts: list[str]) -> Any:
    for part in parts:
        mapping = mapping.get(part) if isinstance(mapping, Mapping) else None
    return mapping


def _merged(made: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(made)
    for key, value in own.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result


class _Asked(dict[str, Any]):
    """A configuration that notes which of its keys are asked for: those DeepSpeed knows."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(
            {k: _Asked(v) if isinstance(v, Mapping) else v for k, v in content.items()}
        )
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:  # `name in configuration.keys()` asks too
        return self


def _require_read(merged: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Let DeepSpeed read `merged`; raise RecipeError if it refuses it or leaves out a key of `own`."""
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfigError

    try:
        asked = _read(merged)
    except pydantic.ValidationError as error:
        raise RecipeError(_refused(error, own)) from None
    except (DeepSpeedConfigError, ValueError, AssertionError, TypeError) as error:
        raise RecipeError(f"train.deepspeed: DeepSpeed refuses it: {error}") from None
    for key, value in own.items():
        if key not in asked.asked:
            valid = asked.asked - _UNUSED - _RECIPE.keys() - _REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()
            raise RecipeError(_unknown(key, valid, asked.asked))
        if isinstance(value, Mapping) and not _strict(merged, key):
            section = dict.__getitem__(asked, key)
            for name in value.keys() - section.asked:
                raise RecipeError(_unknown(f"{key}.{name}", section.asked))


def _read(merged: Mapping[str, Any]) -> _Asked:
    """What DeepSpeed asked for when it read `merged`."""
    from deepspeed.runtime.config import DeepSpeedConfig

    # train_batch_size follows from the others and the ranks, and there may be no group yet to ask
    asked = _Asked({k: v for k, v in merged.items() if k != "train_batch_size"})
    DeepSpeedConfig(asked)
    return asked


def _strict(merged: Mapping[str, Any], section: str) -> bool:
    """True if DeepSpeed itself refuses unknown keys in that section."""
    try:
        _read({**merged, section: {**merged[section], "no such key": 0}})
    except pydantic.ValidationError:
        return True
    return False


def _unknown(path: str, valid: set[str], near: set[str] | None = None) -> str:
    names = sorted(near if near is not None else valid)
    close = difflib.get_close_matches(path.split(".")[-1], names, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    return (
        f"train.deepspeed: unknown key '{path}', which means nothing to DeepSpeed.{hint} "
        f"Valid names here: {', '.join(sorted(valid))}"
    )


def _refused(error: Any, own: Mapping[str, Any]) -> str:
    """What a model of DeepSpeed says of a section, with the section's name and valid names."""
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    path = next((p for p, _ in _leaves(own) if p.split(".")[-1] in location[-1:]), "")
    if problem["type"] == "extra_forbidden":
        return _unknown(path, _names_at(error.title, location[:-1]))
    where = f"{path}: " if path else ""
    return f"train.deepspeed: {where}{problem['msg']}; found {str(problem['input'])[:120]}"


def _names_at(title: str, location: list[str]) -> set[str]:
    """Names of the fields of DeepSpeed's model `title`, or of the one it holds at `location`."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    pending, found = [DeepSpeedConfigModel], DeepSpeedConfigModel
    while pending:
        model = pending.pop()
        pending += model.__subclasses__()
        found = model if model.__name__ == title else found
    for part in location:
        annotation = found.model_fields[part].annotation
        parts = (annotation, *typing.get_args(annotation))
        found = next(
            m for m in parts if isinstance(m, type) and issubclass(m, DeepSpeedConfigModel)
        )
    return {
        field.alias or name
        for name, field in found.model_fields.items()
        if not (field.json_schema_extra or {}).get("deprecated")
    }


def _with_aliases(own: Mapping[str, Any]) -> dict[str, Any]:
    """ZeRO's keys by the one name they are generated under; RecipeError for names given up."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = own.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise RecipeError(
            f"train.deepspeed: zero_optimization is {zero!r}, expected a table of its keys"
        )
    fields, renamed = DeepSpeedZeroConfig.model_fields, {}
    for key, value in zero.items():
        extra = (fields[key].json_schema_extra or {}) if key in fields else {}
        if extra.get("deprecated"):
            raise RecipeError(
                f"train.deepspeed: zero_optimization.{key} was given up by DeepSpeed: use "
                f"{'train.offload' if 'offload' in key else extra.get('new_param')} instead"
            )
        renamed[(fields[key].alias or key) if key in fields else key] = value
    return {**own, "zero_optimization": renamed} if zero else dict(own)
