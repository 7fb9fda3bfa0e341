"""The loss of each row, in network units."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dmi_hpc.config import TrainConfig
from dmi_hpc.models.graphs import EnergyForces, Graphs, Inputs, Output
from dmi_hpc.targets import Scale, TargetScale


def row_losses(
    config: TrainConfig,
    scale: Scale,
    output: Output,
    targets: Tensor,
    inputs: Inputs,
) -> Tensor:
    """(n,) of outputs (n, k) and targets (n,), or (n, k) with nan where a target is not known."""
    if isinstance(output, EnergyForces):
        assert isinstance(inputs, Graphs) and isinstance(scale, TargetScale)
        energy = _elementwise(config, output.energy.squeeze(1), targets)
        forces = _of_forces(config, scale, output.forces, inputs)
        return torch.lerp(energy, forces, config.force_weight)
    if isinstance(scale, TargetScale):
        return _of_head(config, scale, output, targets)
    known = ~targets.isnan()
    filled = torch.where(known, targets, 0.0)
    each = torch.stack(
        [
            _of_head(config, head, output[:, k : k + 1], filled[:, k])
            for k, head in enumerate(scale.heads)
        ],
        dim=1,
    )
    return torch.where(known, each, 0.0).sum(1) / known.sum(1).clamp(min=1)


def _of_head(config: TrainConfig, head: TargetScale, output: Tensor, targets: Tensor) -> Tensor:
    if head.transform == "category":
        return functional.cross_entropy(output, targets.long(), reduction="none")
    values = output.squeeze(1)
    if head.transform == "logit":
        return functional.binary_cross_entropy_with_logits(values, targets, reduction="none")
    return _elementwise(config, values, targets)


def _of_forces(config: TrainConfig, scale: TargetScale, forces: Tensor, graphs: Graphs) -> Tensor:
    """Mean over the atoms and axes of each graph."""
    assert graphs.forces is not None
    each = _elementwise(config, forces, graphs.forces / scale.std).mean(1)
    total = each.new_zeros(len(graphs)).index_add(0, graphs.graph_of_node, each)
    return total / graphs.sizes


def _elementwise(config: TrainConfig, output: Tensor, target: Tensor) -> Tensor:
    match config.loss:
        case "mse":
            return functional.mse_loss(output, target, reduction="none")
        case "mae":
            return functional.l1_loss(output, target, reduction="none")
        case "huber":
            return functional.huber_loss(output, target, reduction="none")
