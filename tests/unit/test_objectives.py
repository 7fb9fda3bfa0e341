"""Costs in the units of limits, and what evolution compares."""

import pytest
import torch

from dmi_hpc.models.build import build
from dmi_hpc.models.cost import cost
from dmi_hpc.models.objectives import broken, known_costs, others
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec, Norm
from search.trials.objectives import latency_s, measured


def network(units):
    return NetworkSpec(
        input_shape=(8,), layers=(Dense(units=units), Norm(op="batch"), Activation())
    )


def test_costs_by_hand():
    spec = NetworkSpec(input_shape=(10,), layers=(Dense(units=5),))
    found = known_costs(spec, batch_size=2)
    assert found["parameters"] == 10 * 5 + 5 + 5 + 1
    assert found["flops"] == 2 * (10 * 5 + 5)
    assert found["memory_GB"] == cost(spec).memory_bytes(2) / 1e9
    words = found["parameters"] + 2 * (10 + 5)
    assert found["energy_J"] == pytest.approx(found["flops"] * 2.3e-12 + words * 640e-12)


def test_every_cost_grows_with_the_network():
    small, large = known_costs(network(8), 16), known_costs(network(512), 16)
    assert all(small[name] < large[name] for name in small)


def test_others_are_in_the_order_of_the_objectives():
    measures = {"parameters": 3.0, "flops": 7.0, "epochs": 2.0}
    assert others(["error", "flops", "parameters"], measures) == (7.0, 3.0)
    assert others(["error"], measures) == ()


def test_broken_limits_are_named_with_both_numbers():
    costs = {"parameters": 150.0, "flops": 30.0}
    assert broken({"parameters": 150.0, "flops": 31.0}, costs) == ""
    said = broken({"parameters": 100.0, "flops": 1.0, "latency_s": 1e-9}, costs)
    assert said == "parameters is 150, allowed is 100; flops is 30, allowed is 1"


def test_latency_is_measured_only_where_it_is_wanted():
    device = torch.device("cpu")
    assert measured(network(8), 4, ["flops"], device) == known_costs(network(8), 4)
    assert measured(network(8), 4, {"error", "latency_s"}, device)["latency_s"] > 0


def test_latency_is_of_a_whole_pass_and_leaves_the_network_as_it_was():
    module = build(network(16)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert 0 < latency_s(module, torch.zeros(1, 8)) < 10
    assert module.training
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
