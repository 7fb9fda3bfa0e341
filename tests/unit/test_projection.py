"""Activations of layers and their principal components."""

import csv

import numpy as np
import pytest
import torch
from runner import toy_data
from toy_task import Toy

from dmi_hpc.cli.project import app
from dmi_hpc.errors import DataError
from dmi_hpc.export import export
from dmi_hpc.models.build import build
from dmi_hpc.models.spec import (
    Activation,
    Conv,
    Dense,
    Dropout,
    GraphConv,
    GraphInput,
    GraphReadout,
    NetworkSpec,
    Norm,
    Parallel,
    Readout,
    Residual,
)
from dmi_hpc.predict import Model
from dmi_hpc.projection import activations, layers_of, project, read_inputs
from dmi_hpc.targets import TargetScale
from dmi_hpc.tasks import make_task

LAYERS = (
    Dense(units=6),
    Norm(),
    Activation(),
    Dropout(rate=0.5),
    Residual(layers=(Dense(units=6), Activation())),
    Activation(function="tanh"),
    Dense(units=1),
)
X = np.random.default_rng(0).normal(size=(11, 8)).astype(np.float32)


def model_of(layers=LAYERS, batch_size=4, task="toy_task:Toy", shape=(8,)):
    torch.manual_seed(0)
    network = NetworkSpec(input_shape=shape, layers=layers)
    scale = TargetScale(transform="identity", mean=0.0, std=1.0)
    module = build(network).eval()
    return Model(make_task({"name": task}), scale, module, batch_size, network, "untrained", "", {})


def test_layers_end_with_what_follows_them():
    assert layers_of(model_of().network) == (3, 5, 6)


def test_of_a_map_or_a_graph_the_readout_is_the_first_layer():
    volume = (Conv(filters=4), Activation(), Readout(), Activation(), Dense(units=3))
    assert layers_of(NetworkSpec(input_shape=(1, 8, 8), layers=volume)) == (3, 4)
    graph = NetworkSpec(
        input_shape=(5, 10),
        layers=(GraphConv(channels=4), Dense(units=4), GraphReadout(), Dense(units=3), Norm()),
        graph=GraphInput(edge_features=2, edges=40),
    )
    assert layers_of(graph) == (2, 4)
    branches = (Parallel(branches=((), (Dense(units=3),))), Norm())
    assert layers_of(NetworkSpec(input_shape=(8,), layers=branches)) == (1,)


def test_activations_are_those_of_the_network_in_any_batches():
    model = model_of()
    found = activations(model, {"x": X}, (1, 2, 3))
    with torch.no_grad():
        for layer, place in ((1, 3), (2, 5), (3, 6)):
            expected = model.module[: place + 1](torch.from_numpy(X)).numpy()
            np.testing.assert_allclose(found[layer], expected, atol=1e-6)
    assert not any(module._forward_hooks for module in model.module)


def test_hooks_are_gone_after_an_error():
    model = model_of()
    with pytest.raises(DataError, match=r"expected \(rows, 8\)"):
        activations(model, {"x": X[:, :3]}, (1,))
    assert not any(module._forward_hooks for module in model.module)


def test_layers_that_are_not_there_are_named():
    for layer in (0, 4):
        with pytest.raises(DataError, match=f"layer {layer}: the network has 3 layers"):
            activations(model_of(), {"x": X}, (1, layer))


def test_the_plane_is_that_of_most_variance():
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.normal(size=(20, 2)))[0]
    places = rng.normal(size=(200, 2)) * [5.0, 2.0]
    values = places @ plane.T + rng.normal(size=(200, 20)) * 0.1 + 3.0
    found = project(values, 7)
    assert (found.layer, found.units) == (7, 20)
    np.testing.assert_allclose(found.points.mean(axis=0), 0, atol=1e-9)
    centred = places - places.mean(axis=0)
    for mine, true in zip(found.points.T, centred.T, strict=True):
        assert abs(np.corrcoef(mine, true)[0, 1]) > 0.99
    assert found.explained.sum() > 0.98 and found.explained[0] > 4 * found.explained[1]


def test_a_layer_of_one_unit_has_one_component():
    found = project(X[:, :1])
    assert found.explained.tolist() == pytest.approx([1.0, 0.0])
    assert (found.points[:, 1] == 0).all()
    with pytest.raises(DataError, match="2 inputs: principal components need at least 3"):
        project(X[:2])


def test_a_shard_set_is_an_input_too(tmp_path):
    data = toy_data(tmp_path / "data")
    labels, fields = read_inputs(model_of(), data)
    assert labels == [str(row) for row in range(len(fields["x"]))]
    assert activations(model_of(), fields, (3,))[3].shape == (len(labels), 1)


@pytest.mark.parametrize(("layer", "expected"), [("all", {1, 2}), ("2", {2}), ("2,1,2", {1, 2})])
def test_the_command_writes_one_row_an_input_and_layer(tmp_path, capsys, layer, expected):
    layers = (Dense(units=6), Activation(), Dense(units=4))
    model = model_of(layers, task="elemnet", shape=(86,))
    export(model, tmp_path / "network", "safetensors")
    (tmp_path / "formulas.csv").write_text("formula\nNaCl\nMgO\nFe2O3\nNaN\n")
    out = tmp_path / "projection.csv"
    arguments = [str(tmp_path / "network"), str(tmp_path / "formulas.csv"), "--out", str(out)]
    app([*arguments, "--layer", layer], standalone_mode=False)
    with out.open() as stream:
        rows = list(csv.DictReader(stream))
    assert {int(row["layer"]) for row in rows} == expected
    assert [row["input"] for row in rows] == ["NaCl", "MgO", "Fe2O3", "NaN"] * len(expected)
    fields = model.task.read_inputs(tmp_path / "formulas.csv")[1]
    for number in expected:
        points = project(activations(model, fields, (number,))[number]).points
        written = [float(row["pc1"]) for row in rows if int(row["layer"]) == number]
        np.testing.assert_allclose(written, points[:, 0], atol=1e-5)
    told = capsys.readouterr().out
    assert f"4 inputs, {len(expected)} layers" in told and "of the variance" in told


@pytest.mark.parametrize("layer", ["first", "-1", "1,", ""])
def test_layers_that_are_no_numbers_are_refused(tmp_path, layer):
    model = model_of((Dense(units=6),), task="elemnet", shape=(86,))
    export(model, tmp_path / "network", "safetensors")
    arguments = [str(tmp_path / "network"), "formulas.csv", "--out", str(tmp_path / "p.csv")]
    with pytest.raises(DataError, match="expected all, or numbers from 1 to 1"):
        app([*arguments, "--layer", layer], standalone_mode=False)


def test_an_ensemble_has_no_layers_of_its_own():
    from dmi_hpc.ensemble import Calibration, ensemble_of

    members = [model_of(), model_of()]
    both = ensemble_of(members, Calibration())
    assert isinstance(both.task, Toy)
    with pytest.raises(DataError, match="mean of 2 networks has no layers of its own"):
        activations(both, {"x": X}, (1,))
