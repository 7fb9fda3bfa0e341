"""The recipe's optimiser, and its state by name of parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dmi_hpc.config import TrainConfig
from dmi_hpc.errors import RecipeError
from dmi_hpc.transfer import layer_scales

OptimizerState = dict[str, dict[str, torch.Tensor]]


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are not frozen, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def parameter_groups(module: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters by their factor of the learning rate, `lr_scale`, the input's first."""
    parameters = trainable(module)
    if not parameters:
        raise RecipeError("train.freeze: every weight is frozen; expected some left to train")
    scales = layer_scales(module, config.layer_decay)
    by_scale: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        by_scale.setdefault(scales[name], []).append(parameter)
    return [
        {"params": group, "lr": config.learning_rate * scale, "lr_scale": scale}
        for scale, group in by_scale.items()
    ]


def make_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The recipe's optimiser, fused where torch has it. Never DeepSpeed's: its "Adam" is AdamW."""
    groups, rate, decay = (
        parameter_groups(module, config),
        config.learning_rate,
        config.weight_decay,
    )
    match config.optimizer:
        case "adam":
            return torch.optim.Adam(groups, rate, weight_decay=decay, fused=True)
        case "adamw":
            return torch.optim.AdamW(groups, rate, weight_decay=decay, fused=True)
        case "sgd":
            return torch.optim.SGD(
                groups, rate, momentum=config.momentum, weight_decay=decay, fused=True
            )
        case "lamb" | "lars":
            return _large_batch_optimizer(groups, config)


def _large_batch_optimizer(
    groups: list[dict[str, Any]], config: TrainConfig
) -> torch.optim.Optimizer:
    """LAMB (arXiv:1904.00962) or LARS (arXiv:1708.03888)."""
    try:
        from pytorch_optimizer import LARS, Lamb
    except ImportError:
        raise RecipeError(
            f'train.optimizer = "{config.optimizer}" needs the package pytorch-optimizer, which is '
            "not installed: pip install dmi-hpc[optimizers]"
        ) from None
    made: torch.optim.Optimizer
    if config.optimizer == "lamb":
        made = Lamb(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
    else:
        made = LARS(
            groups,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
        )
    return made


def state_by_name(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> OptimizerState:
    """State of an optimiser of whole parameters; {} before its first step."""
    # some count steps once a group
    steps = {p: g["step"] for g in optimizer.param_groups if "step" in g for p in g["params"]}
    state: OptimizerState = {}
    for name, parameter in parameters.items():
        own = optimizer.state.get(parameter, {})
        kept = {key: value for key, value in own.items() if isinstance(value, torch.Tensor)}
        if parameter in steps:
            kept["step"] = torch.tensor(float(steps[parameter]))
        if kept:
            state[name] = kept
    return state


def set_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, key: str, value: torch.Tensor
) -> None:
    """Set one tensor of a parameter's state to a copy of `value`."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    if key == "step" and not group.get("fused"):
        group["step"] = int(value)
    else:
        optimizer.state[parameter][key] = value.to(parameter.device, copy=True)
