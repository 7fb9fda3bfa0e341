"""Which engine and ZeRO stage a training gets, from an estimate of a rank's memory. Pure.

Stages (Rajbhandari et al., arXiv:1910.02054): ranks share 1 the optimiser's states, 2 also the
gradients, 3 also the weights. Weights, gradients and states are float32 (autocast computes in half).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dmi_hpc.config import TrainConfig
from dmi_hpc.errors import RecipeError, counted

SHARE = 0.5  # of a device's memory, for these; the rest is for activations and the libraries
BUCKETS = (1_000_000, 50_000_000)  # elements reduced at once: a whole network of our usual size
_STATES = {"adam": 2, "adamw": 2, "lamb": 2, "lars": 1, "sgd": 1}  # numbers a weight
_WHOLE_ONLY = ("lamb", "lars")

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Plan:
    """The decision, and its reason in one sentence."""

    engine: Literal["torch", "deepspeed"]
    stage: Stage
    reason: str


def bucket_of(parameters: int) -> int:
    """Elements that ZeRO reduces at once; it holds so many besides. DeepSpeed refuses odd numbers."""
    least, most = BUCKETS
    return min(max(parameters, least), most) // 2 * 2


def bytes_of_rank(stage: int, config: TrainConfig, parameters: int, ranks: int) -> int:
    """Device memory of a rank for weights, gradients and optimiser states; no activations.

    Stages 1 and 2 keep a float32 master of a rank's part beside the weights, stage 3 of its part
    only; all keep a bucket. Autocast adds a half-precision copy of the weights.
    """
    states = _STATES[config.optimizer] if config.momentum or config.optimizer != "sgd" else 0
    offloaded = config.offload != "none"
    part = parameters / ranks
    weights = part if stage == 3 else parameters
    gradients = part if stage >= 2 else parameters
    optimizer = 0.0 if offloaded else states * (parameters if stage == 0 else part)
    master = 0.0 if stage == 0 or offloaded else part
    if config.offload == "all":
        weights = gradients = 0.0
    half = 2 * parameters if config.precision != "fp32" else 0
    bucket = bucket_of(parameters) if stage else 0
    return int(4 * (weights + gradients + optimizer + master + bucket)) + half


def plan(config: TrainConfig, parameters: int, ranks: int, memory: int) -> Plan:
    """Engine and stage for that many parameters; memory: of a rank's device, in bytes.

    `auto` takes the lowest stage that fits, for it is the fastest, and plain torch where that is 0.
    Raises RecipeError if the recipe contradicts itself.
    """
    allowed = [stage for stage in STAGES if _obstacle(stage, config, ranks) is None]
    if config.zero_stage != "auto":
        stage: Stage = config.zero_stage
        obstacle = _obstacle(stage, config, None)
        if obstacle:
            raise RecipeError(f"train.zero_stage is {stage}, but {obstacle}")
        fit = "as the recipe says"
    elif not allowed:
        raise RecipeError(f"train.zero_stage = auto finds no stage: {_obstacle(3, config, ranks)}")
    else:
        fitting = [
            s for s in allowed if bytes_of_rank(s, config, parameters, ranks) <= SHARE * memory
        ]
        stage = fitting[0] if fitting else allowed[-1]
        fit = "the lowest that fits" if fitting else "though it may not fit"
    return Plan(
        _engine(config, stage), stage, _reason(stage, fit, config, (parameters, ranks, memory))
    )


def _obstacle(stage: Stage, config: TrainConfig, ranks: int | None) -> str | None:
    """Why a stage cannot be; ranks: where it would be pointless as well."""
    if stage > 0 and config.engine == "torch":
        return 'train.engine is "torch", which has stage 0 only: set engine to auto or deepspeed'
    if stage > 0 and config.optimizer in _WHOLE_ONLY:
        # ZeRO gives the optimiser one flat vector of all layers
        return (
            f'train.optimizer is "{config.optimizer}", which needs the norm of each whole layer: '
            "expected stage 0"
        )
    if stage == 0 and config.offload != "none":
        return f'train.offload is "{config.offload}": expected stage 1, 2 or 3'
    if stage < 3 and config.offload == "all":
        return 'train.offload is "all": expected stage 3'
    if stage == 3 and config.compile:
        return "train.compile is true: expected stage 0, 1 or 2"
    if stage > 0 and ranks == 1 and config.offload == "none":
        return "there is one rank: nothing to share"
    return None


def _engine(config: TrainConfig, stage: Stage) -> Literal["torch", "deepspeed"]:
    if config.engine != "auto":
        if config.engine == "torch" and config.deepspeed:
            raise RecipeError(
                'train.engine is "torch", but train.deepspeed holds '
                f"{', '.join(sorted(config.deepspeed))}: set engine to deepspeed, or leave them out"
            )
        return config.engine
    return "torch" if stage == 0 and not config.deepspeed else "deepspeed"


def _reason(stage: Stage, fit: str, config: TrainConfig, sizes: tuple[int, int, int]) -> str:
    parameters, ranks, memory = sizes
    need = bytes_of_rank(stage, config, parameters, ranks)
    return (
        f"ZeRO stage {stage}, {fit}: {need / max(1, parameters):.3g} bytes x {parameters / 1e6:.3g} M "
        f"parameters = {need / 1e9:.3g} GB a rank ({counted(ranks, 'rank')}), of "
        f"{memory / 1e9:.3g} GB"
    )
