"""The running mean of the weights against its definition."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from dmi_hpc.average import Average, steps_between
from dmi_hpc.errors import CheckpointError


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def move(module):
    """As a training step does: other weights, other statistics."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    module(torch.randn(5, 4))


def whole(module):
    """As an engine gives its module."""
    return partial(nullcontext, module)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.97, 0.999])
def test_the_mean_is_the_recursion(decay):
    module = network()
    average, every = Average(module, decay), steps_between(decay)
    expected = module[0].weight.detach().double().clone()
    for n in range(1, 41):
        move(module)
        average.update(whole(module))
        if n % every == 0:
            kept = min(decay, (1 + n) / (10 + n)) ** every
            expected = kept * expected + (1 - kept) * module[0].weight.detach().double()
    torch.testing.assert_close(average.weights()["0.weight"].double(), expected)


def test_the_steps_between_follow_the_memory():
    assert [steps_between(d) for d in (0.1, 0.5, 0.9, 0.95, 0.98, 0.99, 0.9999)] == [
        *(1, 1, 1, 2, 5, 10, 10)
    ]


@pytest.mark.parametrize("decay", [0.98, 0.99, 0.999])
def test_few_updates_give_what_many_do(decay):
    """The mean over its memory of a slow drift with noise; each 10 steps or each one."""
    module = nn.Linear(1, 1)
    average, fine = Average(module, decay), module.weight.detach().clone()
    torch.manual_seed(1)
    for n in range(1, 2001):
        with torch.no_grad():
            module.weight.fill_(n / 1000 + 0.1 * torch.randn(()).item())
            fine.lerp_(module.weight, 1 - min(decay, (1 + n) / (10 + n)))
        average.update(whole(module))
    found = average.weights()["weight"]
    assert abs(float(found - fine)) < 0.05


def test_weights_that_stand_still_are_their_mean():
    module = network()
    average = Average(module, 0.9)
    for _ in range(20):
        average.update(whole(module))
    for name, mean in average.weights().items():
        torch.testing.assert_close(mean, module.state_dict()[name])


def test_applied_swaps_weights_in_place_and_back_and_keeps_statistics():
    module = network()
    average = Average(module, 0.9)
    for _ in range(10):
        move(module)
        average.update(whole(module))
    before, places = snapshot(module), [p.data_ptr() for p in module.parameters()]
    means = {name: mean.clone() for name, mean in average.weights().items()}
    with average.applied(module) as applied:
        assert applied is module
        inside = snapshot(module)
        assert [p.data_ptr() for p in module.parameters()] == places
    for name, tensor in inside.items():
        assert torch.equal(tensor, means.get(name, before[name])), name
    assert not torch.equal(inside["0.weight"], before["0.weight"])
    assert all(torch.equal(t, before[n]) for n, t in snapshot(module).items())
    with pytest.raises(RuntimeError, match="evaluation"), average.applied(module):
        raise RuntimeError("evaluation")
    assert all(torch.equal(t, before[n]) for n, t in snapshot(module).items())


def test_frozen_weights_have_no_mean():
    module = network()
    module[0].weight.requires_grad_(False)
    average = Average(module, 0.9)
    assert set(average.weights()) == {"0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}


def test_a_mean_continues_exactly_where_it_was_saved():
    module, decay = network(), 0.98
    uncut, first = Average(module, decay), Average(module, decay)
    torch.manual_seed(2)
    for n in range(37):
        move(module)
        uncut.update(whole(module))
        if n < 13:
            first.update(whole(module))
        if n == 12:
            saved, steps = copy.deepcopy(first.weights()), first.steps
            second = Average(network(seed=3), decay)
            second.load(saved, steps)
        if n > 12:
            second.update(whole(module))
    assert second.steps == uncut.steps == 37
    assert all(torch.equal(m, uncut.weights()[n]) for n, m in second.weights().items())


def test_the_module_is_gathered_only_when_it_is_time():
    module, gathered = network(), []

    def gather():
        gathered.append(average.steps)
        return nullcontext(module)

    average = Average(module, 0.98)
    for _ in range(12):
        average.update(gather)
    assert gathered == [5, 10]


def test_a_mean_of_other_weights_is_refused():
    average = Average(network(), 0.9)
    with pytest.raises(CheckpointError, match=r"0\.bias, 0\.weight, 1\.bias, .* differ"):
        Average(nn.Sequential(nn.Linear(3, 9)), 0.9).load(average.weights(), 3)


def test_bfloat16_weights_have_a_float32_mean():
    module = nn.Linear(3, 2).bfloat16()
    average = Average(module, 0.9)
    average.update(whole(module))
    assert all(mean.dtype == torch.float32 for mean in average.weights().values())
    with average.applied(module):
        assert module.weight.dtype == torch.bfloat16
