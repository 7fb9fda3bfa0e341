"""Weights that a child takes over: the function stays where it can, and the report says what became."""

import numpy as np
import pytest
import torch

from dmi_hpc.models.build import build
from dmi_hpc.models.space import FloatRange, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import (
    Activation,
    Conv,
    Dense,
    Dropout,
    NetworkSpec,
    Norm,
    Pool,
    Readout,
    Residual,
)
from search.spaces.genome import decode
from search.spaces.operators import crossover, mutate
from search.spaces.space import random_genome
from search.trials.inherit import inherited

MAP = (2, 6, 6)


def trained(spec, seed=0):
    """A network with statistics of its own, as a training leaves it."""
    torch.manual_seed(seed)
    module = build(spec)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for _ in range(3):
        module(3 * torch.randn(16, *spec.input_shape) + 1)
    return module


def child_of(parent_spec, parent, child_spec, noise=0.0, seed=1):
    torch.manual_seed(seed)
    child = build(child_spec)
    rng = np.random.default_rng(seed)
    weights, report = inherited(
        child_spec, child.state_dict(), parent_spec, parent.state_dict(), rng, noise=noise
    )
    child.load_state_dict(weights)
    return child, report


def difference(first, second, shape, training=False):
    """Largest difference of the outputs, relative to the largest output."""
    x = torch.randn(9, *shape, generator=torch.Generator().manual_seed(5))
    for module in (first, second):
        module.train(training)
    with torch.no_grad():
        a, b = first(x), second(x)
    return float((a - b).abs().max() / a.abs().max())


def convolutional(*blocks, norm="batch", readout="mean", units=(12,), padding="circular"):
    """blocks: (filters, kernel, pool)."""
    layers = []
    for filters, kernel, pool in blocks:
        layers += [Conv(filters=filters, kernel=kernel, padding=padding)]
        layers += ([Norm(op=norm)] if norm else []) + [Activation()]
        layers += [Pool(op=pool)] if pool else []
    layers.append(Readout(op=readout))
    for width in units:
        layers += [Dense(units=width), Activation(), Dropout(rate=0.2)]
    return NetworkSpec(input_shape=MAP, layers=tuple(layers), outputs=2)


PARENT = convolutional((8, 3, "max"), (16, 3, None))


@pytest.mark.parametrize(
    ("parent", "child"),
    [
        (PARENT, PARENT),
        (PARENT, convolutional((12, 3, "max"), (16, 3, None))),
        (PARENT, convolutional((8, 3, "max"), (40, 3, None))),
        (PARENT, convolutional((24, 5, "max"), (32, 3, None), units=(30,))),
        (PARENT, convolutional((8, 3, "max"), (16, 3, None), units=(12, 12))),
        (PARENT, convolutional((8, 3, "max"), (16, 3, None), units=(15, 40))),
        (PARENT, convolutional((8, 3, "max"), (16, 3, None), readout="flatten")),
        (
            convolutional((8, 3, "max"), (16, 3, None), readout="flatten"),
            convolutional((16, 3, "max"), (24, 3, None), readout="flatten"),
        ),
        (
            convolutional((8, 3, "max"), norm=None),
            convolutional((8, 3, "max"), (9, 3, None), norm=None),
        ),
        (convolutional((16, 3, None), norm="group"), convolutional((32, 3, None), norm="group")),
    ],
)
def test_wider_deeper_and_read_otherwise_it_computes_the_same(parent, child):
    module = trained(parent)
    found, report = child_of(parent, module, child)
    assert report.exact
    assert report.share == 1.0
    assert difference(module, found, MAP) < 1e-5


def test_repeated_channels_have_equal_statistics_while_training_too():
    wider = convolutional((12, 3, "max"), (20, 3, None), units=())
    parent = convolutional((8, 3, "max"), (16, 3, None), units=())
    module = trained(parent)
    found, report = child_of(parent, module, wider)
    assert report.exact
    assert difference(module, found, MAP, training=True) < 1e-4


@pytest.mark.parametrize(
    "child",
    [
        convolutional((6, 3, "max"), (16, 3, None)),  # narrower
        convolutional((8, 1, "max"), (16, 3, None)),  # smaller kernel
        convolutional((8, 3, "mean"), (16, 3, None)),  # other pool
        convolutional((8, 3, "max"), (16, 3, None), norm="group"),
        convolutional((8, 3, "max")),  # shallower
        convolutional((8, 3, "max"), (16, 3, None), padding="zeros"),
        convolutional((8, 3, "max"), (16, 3, None), units=()),
    ],
)
def test_what_changes_the_function_is_not_called_exact(child):
    module = trained(PARENT)
    found, report = child_of(PARENT, module, child)
    assert not report.exact
    assert 0 < report.share <= 1
    assert difference(module, found, MAP) > 1e-3


def test_an_added_norm_keeps_the_function_in_evaluation_only():
    parent, child = (convolutional(*[(8, 3, None)] * depth, units=()) for depth in (1, 2))
    module = trained(parent)
    found, report = child_of(parent, module, child)
    assert not report.exact
    assert report.fates[3] == "identity"
    assert difference(module, found, MAP) < 1e-4 < difference(module, found, MAP, training=True)


def test_group_norm_of_other_groups_is_not_called_exact():
    parent, child = (convolutional((n, 3, None), norm="group") for n in (16, 24))
    _, report = child_of(parent, trained(parent), child)
    assert not report.exact


def test_the_report_names_each_layer():
    child = convolutional((12, 3, "max"), (16, 3, None), units=(12, 12, 4))
    _, report = child_of(PARENT, trained(PARENT), child)
    dense = [at for at, layer in enumerate(child.layers) if isinstance(layer, Dense)]
    assert [report.fates[at] for at in (0, 4)] == ["resized", "resized"]
    assert [report.fates[at] for at in dense] == ["copied", "identity", "new"]
    assert report.fates[len(child.layers)] == "resized"
    assert 0.5 < report.share < 1


def test_repeated_units_part_by_the_noise():
    child = convolutional((16, 3, "max"), (16, 3, None))
    module = trained(PARENT)
    found, report = child_of(PARENT, module, child, noise=0.01)
    first = found[0].weight
    assert torch.equal(first[:8], module[0].weight)
    assert not torch.equal(first[8:], first[:8])
    assert 0 < difference(module, found, MAP) < 0.05
    assert report.exact


def test_layers_of_layers_are_copied_whole_or_not_at_all():
    def network(*units):
        inner = (Dense(units=8), Activation())
        layers = [layer for n in units for layer in (Dense(units=n), Activation())]
        return NetworkSpec(
            input_shape=(5,), layers=(*layers, Residual(layers=inner), Dense(units=4))
        )

    parent = network(8)
    module = trained(parent)
    found, report = child_of(parent, module, network(8))
    assert report.exact
    assert difference(module, found, (5,)) == 0
    _, report = child_of(parent, module, network(6))
    assert not report.exact
    assert "new" in report.fates.values()


def test_after_a_new_layer_that_narrows_only_channels_of_the_parent_count():
    def network(*more):
        return NetworkSpec(input_shape=(30,), layers=(Dense(units=16), Activation(), *more))

    wide = (Dense(units=24), Activation(), Dense(units=20), Activation(function="tanh"))
    parent, child = network(), network().model_copy(update={"layers": wide})
    _, report = child_of(parent, trained(parent), child)
    assert report.fates == {0: "resized", 2: "new", 4: "resized"}
    assert not report.exact


SPACES = {
    "map": NetworkSpace(
        input_shape=(1, 6, 6),
        conv_blocks=(1, 4),
        filters=(8, 16, 24, 32),
        dense_blocks=(0, 3),
        units=(16, 32, 64),
    ),
    "vector": NetworkSpace(input_shape=(7,), dense_blocks=(1, 6), units=(4, 8, 12, 16)),
    "volume": NetworkSpace(
        input_shape=(1, 5, 5, 5),
        conv_blocks=(1, 3),
        filters=(4, 8),
        dense_blocks=(0, 2),
        units=(8, 16),
    ),
}


@pytest.mark.parametrize("name", SPACES)
def test_any_child_of_any_parents_can_begin_and_exact_means_equal(name):
    network, exact = SPACES[name], 0
    space = SearchSpace(network=network, hyper={"learning_rate": FloatRange(low=0.1, high=1.0)})
    for seed in range(40):
        rng = np.random.default_rng(seed)
        genomes = [random_genome(space, rng) for _ in range(2)]
        genome = mutate(genomes[:1], space, rng) if seed % 4 else crossover(genomes, space, rng)
        parent, child = decode(genomes[0], network), decode(genome, network)
        module = trained(parent, seed)
        found, report = child_of(parent, module, child, seed=seed)
        assert 0 <= report.share <= 1
        assert all(torch.isfinite(tensor).all() for tensor in found.state_dict().values())
        if report.exact:
            exact += 1
            assert difference(module, found, network.input_shape) < 1e-4, seed
    assert exact >= 5
