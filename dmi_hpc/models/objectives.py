"""What a network costs besides its error: further objectives of a search, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

from dmi_hpc.models.cost import BYTES, Cost, cost
from dmi_hpc.models.spec import NetworkSpec

# parameters: trainable numbers; flops: multiply-adds x 2 of a forward pass of one sample; memory_GB:
# of training; energy_J: of a forward pass of one sample, an estimate; latency_s: of the same, measured
CostName = Literal["parameters", "flops", "memory_GB", "energy_J", "latency_s"]
ObjectiveName = Literal["error", CostName]
K = TypeVar("K", bound=str)

# in 45 nm: a float multiply 3.7 pJ and add 0.9 pJ; a word of 32 bit from DRAM 640 pJ. M. Horowitz,
# ISSCC 2014, 10; S. Han et al., NeurIPS 2015, figure 1. Newer chips need less; the ratio stays
ENERGY_PER_FLOP_J = (3.7e-12 + 0.9e-12) / 2
ENERGY_PER_WORD_J = 640e-12
WORD_BYTES = 4


def known_costs(spec: NetworkSpec, batch_size: int) -> dict[str, float]:
    """All costs but the latency, by `CostName` and by arithmetic: nothing is allocated.

    batch_size: rows that training computes at once. The energy is an estimate for comparing networks,
    not a reading: weights are fetched once, activations written and read once, one sample at a time.
    """
    return named_costs(cost(spec), batch_size)


def named_costs(found: Cost, batch_size: int) -> dict[str, float]:
    """`known_costs` of a network whose cost is known already."""
    words = (found.parameters + 2 * found.activations) * BYTES / WORD_BYTES
    return {
        "parameters": float(found.parameters),
        "flops": float(found.flops),
        "memory_GB": found.memory_bytes(batch_size) / 1e9,
        "energy_J": found.flops * ENERGY_PER_FLOP_J + words * ENERGY_PER_WORD_J,
    }


def others(objectives: Sequence[str], costs: Mapping[str, float]) -> tuple[float, ...]:
    """What is minimised besides the error, in the order of `objectives`."""
    return tuple(float(costs[name]) for name in objectives if name != "error")


def broken(limits: Mapping[K, float], costs: Mapping[str, float]) -> str:
    """Which of the limits the costs exceed, for a message; empty if none. What is not in `costs` is
    not judged."""
    over = [(name, limit) for name, limit in limits.items() if costs.get(name, 0.0) > limit]
    return "; ".join(f"{name} is {costs[name]:.4g}, allowed is {limit:.4g}" for name, limit in over)
