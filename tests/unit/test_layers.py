"""Layers that hold layers, recurrent ones and maps as output: their shapes, modules and costs."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dmi_hpc.errors import NetworkError
from dmi_hpc.models.build import Branches, RecurrentLayer, SkipConnection, build
from dmi_hpc.models.cost import cost, training_flops
from dmi_hpc.models.spec import (
    LAYERS,
    Activation,
    Conv,
    Dense,
    Dropout,
    NetworkSpec,
    Norm,
    Parallel,
    Pool,
    Readout,
    Recurrent,
    Residual,
    Upsample,
    shapes,
)

LEAF = st.one_of(
    st.builds(
        Conv,
        filters=st.integers(1, 4),
        kernel=st.sampled_from([1, 3]),
        stride=st.integers(1, 2),
        padding=st.sampled_from(["zeros", "circular"]),
    ),
    st.builds(Pool, op=st.sampled_from(["max", "mean"])),
    st.builds(Activation, function=st.sampled_from(["relu", "tanh"])),
    st.builds(Readout, op=st.sampled_from(["flatten", "mean"])),
    st.builds(Dense, units=st.integers(1, 4)),
    st.builds(Upsample, size=st.sampled_from([(5,), (6, 4), (3, 5, 7)])),
    st.builds(
        Recurrent,
        cell=st.sampled_from(["gru", "lstm"]),
        units=st.integers(1, 4),
        bidirectional=st.booleans(),
        last=st.booleans(),
    ),
)


def nested(layer):
    row = st.lists(layer, max_size=2).map(tuple)
    return st.one_of(
        st.builds(Residual, layers=st.lists(layer, min_size=1, max_size=2).map(tuple)),
        st.builds(
            Parallel,
            branches=st.lists(row, min_size=2, max_size=3).map(tuple),
            merge=st.sampled_from(["concat", "sum"]),
        ),
    )


LAYER = st.recursive(LEAF, nested, max_leaves=6)


@settings(deadline=None, max_examples=250)
@given(
    axes=st.integers(0, 3),
    layers=st.lists(LAYER, min_size=1, max_size=4),
    ending=st.sampled_from(["as it is", "readout", "map"]),
)
def test_what_is_inferred_of_nested_layers_is_true_of_their_module(axes, layers, ending):
    spec = NetworkSpec(
        input_shape=(2, *(6, 5, 7)[:axes]),
        layers=(*layers, Readout()) if ending == "readout" else tuple(layers),
        outputs=3,
        map_output=ending == "map",
    )
    try:
        expected = shapes(spec)
    except NetworkError:
        with pytest.raises(NetworkError):
            build(spec)
        return
    module, rows = build(spec).double(), 2
    assert len(module) == len(spec.layers) + 1
    x = torch.zeros(rows, *spec.input_shape, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        y = x
        for layer, shape in zip(module[:-1], expected, strict=True):
            y = layer(y)
            assert y.shape == (rows, *shape)
        y = module[-1](y)
        y.sum().backward()
    space = expected[-1][1:] if spec.map_output else ()
    assert y.shape == (rows, 3, *space)
    assert cost(spec).parameters == sum(p.numel() for p in module.parameters())
    assert counter.get_total_flops() == rows * training_flops(spec)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    assert counter.get_total_flops() == rows * cost(spec).flops


NESTED = NetworkSpec(
    input_shape=(2, 9, 6),
    layers=(
        Residual(layers=(Conv(filters=4, stride=2), Norm(), Activation())),
        Parallel(branches=((), (Conv(filters=3),), (Conv(filters=2, kernel=5), Activation()))),
        Parallel(branches=((), (Pool(), Conv(filters=4), Upsample(size=(5, 3))))),
        Readout(op="mean"),
        Residual(layers=(Dense(units=7), Activation(), Dropout(rate=0.1))),
        Parallel(branches=((Dense(units=3),), (Dense(units=3),)), merge="sum"),
    ),
)


def test_activations_are_the_numbers_that_the_layers_put_out():
    module, found = build(NESTED), []
    whole = (SkipConnection, Branches, nn.Sequential, nn.ModuleList, nn.Identity)
    for part in module.modules():
        if not isinstance(part, whole) or isinstance(part, SkipConnection | Branches):
            part.register_forward_hook(lambda _part, _inputs, output: found.append(output.numel()))
    module(torch.zeros(2, *NESTED.input_shape))
    head = 2 * NESTED.outputs
    assert sum(found) - head + 2 * 2 * 9 * 6 == 2 * cost(NESTED).activations


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("both", [False, True])
def test_activations_of_recurrent_layers_are_what_torch_keeps(cell, both):
    layers = (Recurrent(cell=cell, units=16, bidirectional=both), Readout())
    spec = NetworkSpec(input_shape=(5, 20), layers=layers)
    module, kept = build(spec).double(), {}
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // 8
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(torch.randn(4, 5, 20, dtype=torch.float64))
    assert sum(kept.values()) / 4 == pytest.approx(cost(spec).activations, rel=0.15)


def test_plain_data_of_nested_layers_comes_back():
    assert NetworkSpec.model_validate_json(NESTED.model_dump_json()) == NESTED
    assert "map_output" not in NESTED.model_dump()
    map_spec = NetworkSpec(input_shape=(1, 4), layers=(), map_output=True)
    assert map_spec.model_dump()["map_output"]
    table = {"kind": "residual", "layers": [{"kind": "conv", "filters": 2}]}
    assert LAYERS.validate_python([table]) == (Residual(layers=(Conv(filters=2),)),)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((Residual(layers=(Upsample(size=(7,)),)),), r"layer 1 .residual.: no stride leads"),
        ((Residual(layers=(Readout(),)),), r"\(2, 5\) to its output \(10,\)"),
        (
            (Activation(), Parallel(branches=((), (Activation(), Dense(units=2))))),
            r"layer 2 .parallel.: branch 2: layer 2 .dense.: a dense layer needs a readout",
        ),
        ((Parallel(branches=((), (Pool(),))),), r"different extents: \(2, 5\), \(2, 2\)"),
        (
            (Parallel(branches=((), (Conv(filters=3),)), merge="sum"),),
            r"different shapes: \(2, 5\), \(3, 5\)",
        ),
        ((Upsample(size=(5, 5)),), r"size \(5, 5\) of a map \(5,\)"),
        ((Readout(), Recurrent(units=2)), "layer 2 .recurrent.: needs a map over space"),
    ],
)
def test_nested_layers_that_cannot_follow_are_named(layers, message):
    with pytest.raises(NetworkError, match=message):
        shapes(NetworkSpec(input_shape=(2, 5), layers=layers))


def test_recurrent_layers_need_a_sequence_and_maps_an_end():
    with pytest.raises(NetworkError, match="needs a sequence"):
        shapes(NetworkSpec(input_shape=(2, 5, 5), layers=(Recurrent(units=2),)))
    with pytest.raises(NetworkError, match="map_output needs a map"):
        shapes(NetworkSpec(input_shape=(2, 5), layers=(Readout(),), map_output=True))


def test_a_residual_layer_without_weights_left_is_the_identity():
    module = build(
        NetworkSpec(input_shape=(2, 5), layers=(Residual(layers=(Conv(filters=2),)), Readout()))
    )
    for parameter in module[0].layers.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(3, 2, 5)
    assert torch.equal(module[0](x), x)


def test_the_final_state_of_a_recurrent_layer_has_seen_every_step():
    torch.manual_seed(0)
    layers = (Recurrent(units=4, bidirectional=True, last=True),)
    layer = build(NetworkSpec(input_shape=(2, 6), layers=layers))[0]
    assert isinstance(layer, RecurrentLayer)
    x = torch.randn(1, 2, 6, requires_grad=True)
    for unit in range(8):
        (gradient,) = torch.autograd.grad(layer(x)[0, unit], x)
        assert (gradient.abs().sum(dim=1) > 0).all()


def test_a_u_net_gives_every_voxel_its_outputs():
    inner = (Pool(), Conv(filters=8), Activation(), Upsample(size=(7, 5)))
    layers = (Conv(filters=4), Activation(), Parallel(branches=((), inner)), Conv(filters=4))
    spec = NetworkSpec(input_shape=(1, 7, 5), layers=layers, outputs=3, map_output=True)
    assert shapes(spec)[2] == (12, 7, 5)
    torch.manual_seed(0)
    x = torch.randn(2, 1, 7, 5, requires_grad=True)
    output = build(spec)(x)
    assert output.shape == (2, 3, 7, 5)
    (far,) = torch.autograd.grad(output[0, 0, 0, 0], x)
    assert far[0, 0, 4, 3] != 0  # beyond two kernels of 3: only the lower level sees as far
