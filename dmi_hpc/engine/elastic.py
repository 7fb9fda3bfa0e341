"""Rank 0's engine state, brought to all ranks tensor by tensor: no rank holds all of it twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dmi_hpc import collectives
from dmi_hpc.engine.base import EngineState
from dmi_hpc.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]


def require_names(state: EngineState | None, expected: Shapes) -> None:
    """Collective: raise CheckpointError everywhere unless rank 0's weights are the network's."""
    found = {n: tuple(t.shape) for n, t in state.weights.items()} if state is not None else None
    shared: Shapes = collectives.gather_objects(found)[0]
    wrong = [
        f"{name}: found {shared.get(name, 'nothing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted({*shared, *expected})
        if shared.get(name) != expected.get(name)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"weights are of another network: {'; '.join(wrong[:3])}{more}")


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a whole module's weights and buffers."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def kept(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as a state holds it: a weight itself, which only an update changes; of a buffer, which
    a forward pass may change (running statistics), a copy."""
    return tensor.detach() if isinstance(tensor, nn.Parameter) else tensor.clone()


def shared_tensors(
    tensors: Mapping[str, torch.Tensor] | None, device: torch.device
) -> Iterator[tuple[str, torch.Tensor]]:
    """Collective: (name, tensor on `device`) of rank 0's `tensors`; on rank 0 it may be its own."""
    own = None if tensors is None else {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}
    for name, (shape, dtype) in collectives.gather_objects(own)[0].items():
        if tensors is None:
            tensor = torch.empty(shape, dtype=dtype, device=device)
        else:
            tensor = tensors[name].detach().to(device).contiguous()
        collectives.from_first_([tensor])
        yield name, tensor


def shared_states(
    states: Mapping[str, Mapping[str, torch.Tensor]] | None, device: torch.device
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Collective: (parameter, key, tensor on `device`) of rank 0's optimiser states."""
    flat = None
    if states is not None:
        flat = {f"{key} {name}": t for name, own in states.items() for key, t in own.items()}
    for joint, tensor in shared_tensors(flat, device):
        key, _, name = joint.partition(" ")
        yield name, key, tensor
