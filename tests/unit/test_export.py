"""Exported networks: field units, any number of rows, checked when written, refused if damaged."""

import json
import sys

import numpy as np
import pytest
import torch

from dmi_hpc import export as module
from dmi_hpc import load
from dmi_hpc.cli.export import app
from dmi_hpc.errors import CheckpointError, DataError, DMIError, FormatVersionError, RunError
from dmi_hpc.export import FORMATS, SPEC, export, load_export, read_spec
from dmi_hpc.models.build import build
from dmi_hpc.models.spec import (
    Activation,
    Conv,
    Dense,
    Dropout,
    NetworkSpec,
    Norm,
    Pool,
    Readout,
)
from dmi_hpc.predict import Model
from dmi_hpc.targets import TargetScale
from dmi_hpc.tasks import make_task

LOG = TargetScale(transform="log", mean=1.5, std=0.5)
PLAIN = TargetScale(transform="identity", mean=-2.0, std=0.25)
VECTOR = NetworkSpec(
    input_shape=(86,),
    layers=(Dense(units=12), Norm(), Activation(), Dropout(rate=0.3), Dense(units=4)),
)
VOLUME = NetworkSpec(
    input_shape=(1, 8, 8, 8),
    layers=(
        Conv(filters=8, padding="circular"),
        Norm(op="group"),
        Activation(function="silu"),
        Pool(op="mean"),
        Conv(filters=8, stride=2),
        Activation(function="gelu"),
        Pool(),
        Readout(op="mean"),
        Dense(units=6),
        Activation(function="elu"),
    ),
)
TASKS = {
    "vector": ({"name": "elemnet"}, VECTOR, PLAIN),
    "volume": ({"name": "homogenization", "voxels": 8}, VOLUME, LOG),
}


@pytest.fixture(params=TASKS)
def model(request):
    return model_of(request.param)


def model_of(name):
    options, network, scale = TASKS[name]
    torch.manual_seed(0)
    net = build(network)
    for layer in net:
        if isinstance(layer, torch.nn.BatchNorm1d):  # as after a training
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return Model(
        make_task(options), scale, net.eval(), 16, network, "step-00000007", "abcd", {"mae": 0.1}
    )


def inputs_of(model, rows):
    rng = np.random.default_rng(5)
    return rng.normal(size=(rows, *model.network.input_shape)).astype(np.float32)


def wanted(model, inputs):
    with torch.no_grad():
        output = model.module(torch.from_numpy(inputs))[:, 0].double().numpy()
    values = output * model.scale.std + model.scale.mean
    return np.exp(values) if model.scale.transform == "log" else values


def test_torch_programs_predict_in_field_units(model, tmp_path):
    export(model, tmp_path / "out", "torch")
    network = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for rows in (1, 2, 9):
        inputs = inputs_of(model, rows)
        with torch.no_grad():
            found = network(torch.from_numpy(inputs)).numpy()
        assert found.shape == (rows,)
        np.testing.assert_allclose(found, wanted(model, inputs), rtol=1e-4)


def test_onnx_predicts_in_field_units(model, tmp_path, capfd):
    onnxruntime = pytest.importorskip("onnxruntime")
    export(model, tmp_path / "out", "onnx")
    said = capfd.readouterr()
    assert said.out == said.err == ""
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for rows in (1, 2, 9):
        inputs = inputs_of(model, rows)
        [found] = session.run(["prediction"], {"inputs": inputs})
        assert found.shape == (rows,)
        np.testing.assert_allclose(found, wanted(model, inputs), rtol=1e-4)


def test_onnx_of_large_networks_keeps_its_weights_beside_it(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(module, "_ONE_FILE", 0)
    export(model_of("vector"), tmp_path / "out", "onnx")  # and checks what it wrote
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size > 0


def test_safetensors_are_the_network(model, tmp_path):
    spec = export(model, tmp_path / "out", "safetensors")
    assert spec == read_spec(tmp_path / "out")
    again, network = load_export(tmp_path / "out")
    assert (again.scale, again.network) == (model.scale, model.network)
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    loaded = load(tmp_path / "out")
    assert loaded.task.recipe_options() == model.task.recipe_options()
    assert (loaded.checkpoint, loaded.data, loaded.metrics) == (
        "step-00000007", "abcd", {"mae": 0.1},
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_the_folder_explains_itself(model, tmp_path, kind):
    export(model, tmp_path / "out", kind)
    text = (tmp_path / "out" / "README.txt").read_text()
    shape = ", ".join(map(str, model.network.input_shape))
    assert f"(n, {shape})" in text
    assert f"(n,) in {model.task.quantity.unit}" in text
    assert model.task.input_fields[0] in text
    assert all(len(line) < 120 for line in text.splitlines())
    raw = json.loads((tmp_path / "out" / SPEC).read_text())
    assert raw["unit"] == model.task.quantity.unit
    assert raw["versions"]["torch"] == torch.__version__
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {module.FILES[kind], SPEC, "README.txt"}


def test_the_unscaling_that_the_readme_states_is_right(model, tmp_path):
    export(model, tmp_path / "out", "safetensors")
    text = (tmp_path / "out" / "README.txt").read_text()
    formula = text.partition("prediction = ")[2].splitlines()[0]
    inputs = inputs_of(model, 4)
    with torch.no_grad():
        y = model.module(torch.from_numpy(inputs))[:, 0].double().numpy()
    found = eval(formula, {"y": y, "exp": np.exp})
    np.testing.assert_allclose(found, wanted(model, inputs), rtol=1e-12)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_predicts_something_else_is_not_left(tmp_path, monkeypatch, kind):
    model = model_of("vector")
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    right = module._WRITE[kind]

    def wrong(network, model, path):
        with torch.no_grad():
            next(iter(network.parameters())).add_(0.1)
        right(network, model, path)
        with torch.no_grad():
            next(iter(network.parameters())).sub_(0.1)

    monkeypatch.setattr(module, "_WRITE", {**module._WRITE, kind: wrong})
    with pytest.raises(CheckpointError, match=rf"cannot be exported as {kind}"):
        export(model, tmp_path / "out", kind)
    assert list(tmp_path.iterdir()) == []


def test_the_model_itself_is_left_alone(tmp_path):
    model = model_of("vector")
    model.module.train()
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    export(model, tmp_path / "out", "safetensors")
    assert model.module.training
    assert all(torch.equal(before[n], t) for n, t in model.module.state_dict().items())


def test_what_is_there_is_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="expected a new or empty folder"):
        export(model_of("vector"), tmp_path, "safetensors")
    with pytest.raises(RunError, match="expected a new or empty folder"):
        export(model_of("vector"), tmp_path / "notes.txt", "safetensors")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_damage_is_found(tmp_path):
    export(model_of("vector"), tmp_path / "out", "safetensors")
    spec, weights = tmp_path / "out" / SPEC, tmp_path / "out" / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checksum \w+, expected \w+"):
        load(tmp_path / "out")
    weights.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path / "out")
    text = spec.read_text()
    spec.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(FormatVersionError, match="export format 2, this DMI-HPC reads up to 1"):
        load(tmp_path / "out")
    for damaged in (text[:-20], "[]", text.replace('"kind"', '"kid"')):
        spec.write_text(damaged)
        with pytest.raises(CheckpointError, match="not an exported network"):
            load(tmp_path / "out")


def test_other_formats_are_not_loaded_as_models(tmp_path):
    export(model_of("vector"), tmp_path / "out", "torch")
    with pytest.raises(RunError, match=r"exported as torch, expected safetensors.*README\.txt"):
        load(tmp_path / "out")


def test_a_missing_onnx_is_named(tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"needs onnx .*pip install 'dmi-hpc\[onnx\]'"):
        export(model_of("vector"), tmp_path / "out", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_command_exports_an_export(tmp_path, capsys):
    export(model_of("vector"), tmp_path / "first", "safetensors")
    arguments = [str(tmp_path / "first"), "--out", str(tmp_path / "second"), "--format", "torch"]
    app(arguments, standalone_mode=False)
    assert "formation_enthalpy (eV/atom) from step-00000007" in capsys.readouterr().out
    assert read_spec(tmp_path / "second").kind == "torch"
    with pytest.raises(DMIError, match="found 'tf', expected safetensors, torch, onnx"):
        app([*arguments[:-1], "tf"], standalone_mode=False)
