import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from dmi_hpc.errors import NetworkError, TrialFailure
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import cost, require_fit
from dmi_hpc.models.spec import (
    Activation,
    Conv,
    Dense,
    Dropout,
    NetworkSpec,
    Norm,
    Pool,
    Readout,
    shapes,
)
from dmi_hpc.tasks import make_task

LAYER = st.one_of(
    st.builds(
        Conv,
        filters=st.integers(1, 20),
        kernel=st.sampled_from([1, 3, 5]),
        stride=st.integers(1, 2),
        padding=st.sampled_from(["zeros", "circular"]),
    ),
    st.builds(Pool, op=st.sampled_from(["max", "mean"]), size=st.integers(1, 3)),
    st.builds(Norm, op=st.sampled_from(["batch", "group"])),
    st.builds(Activation, function=st.sampled_from(["relu", "leaky_relu", "gelu", "tanh"])),
    st.builds(Dropout, rate=st.floats(0, 0.9)),
    st.builds(Readout, op=st.sampled_from(["flatten", "mean"])),
    st.builds(Dense, units=st.integers(1, 20)),
)


@settings(deadline=None, max_examples=150)
@given(
    axes=st.integers(0, 3),
    layers=st.lists(LAYER, max_size=5),
    end=st.booleans(),
)
def test_inferred_shapes_and_parameters_are_those_of_the_module(axes, layers, end):
    spec = NetworkSpec(
        input_shape=(3, *(6, 5, 7)[:axes]),
        layers=(*layers, Readout()) if end else tuple(layers),
        outputs=2,
    )
    try:
        expected = shapes(spec)
    except NetworkError:
        with pytest.raises(NetworkError):
            build(spec)
        return
    module = build(spec)
    x = torch.zeros(2, *spec.input_shape)
    for layer, shape in zip(module, expected, strict=False):
        x = layer(x)
        assert tuple(x.shape[1:]) == shape
    assert module[-1](x).shape == (2, 2)
    assert cost(spec).parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((Dense(units=3),), "layer 1 .dense.: a dense layer needs a readout"),
        ((Readout(), Conv(filters=2)), "layer 2 .conv.: needs a map over space"),
        ((Pool(size=9), Readout()), "layer 1 .pool.: pooling by 9"),
        ((Conv(filters=2),), "add a readout"),
    ],
)
def test_a_network_that_cannot_be_built_names_its_layer(layers, message):
    with pytest.raises(NetworkError, match=message):
        shapes(NetworkSpec(input_shape=(1, 4, 4, 4), layers=layers))


def test_published_networks_have_their_published_sizes():
    yang = make_task({"name": "homogenization", "voxels": 51}).published_network()
    assert cost(yang).parameters == 3_801_505  # Yang 2018: 3.80 M
    assert sum(isinstance(layer, Pool) for layer in yang.layers) == 5
    elemnet = make_task({"name": "elemnet"}).published_network()
    assert cost(elemnet).parameters == 4_631_361
    assert sum(isinstance(layer, Dense) for layer in elemnet.layers) + 1 == 17


def test_small_volumes_lose_poolings_not_parameters():
    small = make_task({"name": "homogenization", "voxels": 15}).published_network()
    assert cost(small).parameters == 3_801_505


def test_a_network_that_does_not_fit_is_a_typed_failure():
    spec = NetworkSpec(input_shape=(8,), layers=(Dense(units=100_000), Dense(units=100_000)))
    with pytest.raises(TrialFailure, match="GB") as caught:
        require_fit(spec, 32, 1e9)
    assert caught.value.kind == "memory"


def test_circular_network_with_mean_readout_ignores_translations():
    spec = NetworkSpec(
        input_shape=(1, 6, 6, 6),
        layers=(
            Conv(filters=4, padding="circular"),
            Activation(function="silu"),
            Readout(op="mean"),
        ),
    )
    torch.manual_seed(0)
    module = build(spec)
    x = torch.randn(2, 1, 6, 6, 6)
    moved = torch.roll(x, (1, 2, 3), (2, 3, 4))
    np.testing.assert_allclose(
        module(x).detach().numpy(), module(moved).detach().numpy(), atol=1e-6
    )
