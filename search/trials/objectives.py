"""What a network costs, measured where arithmetic does not tell."""

from __future__ import annotations

import time
from collections.abc import Collection
from statistics import median

import torch
from torch import nn

from dmi_hpc.models.build import build
from dmi_hpc.models.graphs import Inputs, nominal_graphs
from dmi_hpc.models.objectives import known_costs
from dmi_hpc.models.spec import NetworkSpec

LEAST_CALLS, MOST_CALLS, MOST_S = 5, 50, 0.5  # of a measurement


def measured(
    spec: NetworkSpec, batch_size: int, wanted: Collection[str], device: torch.device
) -> dict[str, float]:
    """What `spec` costs, before it is trained: all that is known of its shapes, and its latency on
    `device` if that is among the `wanted`."""
    costs = known_costs(spec, batch_size)
    if "latency_s" in wanted:
        costs["latency_s"] = latency_s(build(spec).to(device), one_sample(spec, device))
    return costs


@torch.no_grad()
def latency_s(network: nn.Module, sample: Inputs) -> float:
    """Seconds of a forward pass of one `sample` on its device: the median, after a warm-up.

    Of this machine as it is, busy neighbours included: for comparing networks of one search. The
    network may be untrained; its mode is kept.
    """
    training = network.training
    network.eval()
    taken: list[float] = []
    try:
        _timed(network, sample)
        while len(taken) < LEAST_CALLS or (len(taken) < MOST_CALLS and sum(taken) < MOST_S):
            taken.append(_timed(network, sample))
    finally:
        network.train(training)
    return median(taken)


def one_sample(spec: NetworkSpec, device: torch.device) -> Inputs:
    """An input of `spec`: zeros, or a graph of its nominal size."""
    if spec.graph is not None:
        return nominal_graphs(spec, 1).to(device)
    return torch.zeros(1, *spec.input_shape, device=device)


def _timed(network: nn.Module, sample: Inputs) -> float:
    started = time.perf_counter()
    network(sample)
    if sample.device.type == "cuda":
        torch.cuda.synchronize(sample.device)
    return time.perf_counter() - started
