"""Weights to start from, frozen weights, rates by layer."""

import numpy as np
import pytest
import torch
from torch import nn

from dmi_hpc import checkpoint
from dmi_hpc.config import StartConfig
from dmi_hpc.errors import CheckpointError, RecipeError
from dmi_hpc.export import export
from dmi_hpc.models.build import build
from dmi_hpc.models.spec import Activation, Conv, Dense, Dropout, NetworkSpec, Norm, Readout
from dmi_hpc.predict import Model
from dmi_hpc.targets import TargetScale
from dmi_hpc.tasks import make_task
from dmi_hpc.transfer import freeze, layer_scales, read_source, start_from, train_mode

OLD = TargetScale(transform="identity", mean=-1.5, std=0.8)
NEW = TargetScale(transform="identity", mean=2.0, std=3.0)


def spec(*units, inputs=6):
    layers = [part for n in units for part in (Dense(units=n), Norm(), Activation())]
    return NetworkSpec(input_shape=(inputs,), layers=tuple(layers))


def network(chosen, seed):
    torch.manual_seed(seed)
    module = build(chosen)
    module(torch.randn(20, *chosen.input_shape))  # statistics of its own
    return module


def saved(folder, chosen, seed=0, step=1, mae=0.1, scale=OLD):
    """A checkpoint as a training writes it; returns its folder and the network."""
    module = network(chosen, seed)
    meta = checkpoint.Meta(
        step=step,
        epoch=0,
        network=chosen,
        scale=scale,
        task={"name": "toy_task:Toy"},
        metrics={"validation_error": mae},
    )
    state = {"counters": {}, "optimizer": {}, "order": {}, "ranks": []}
    checkpoint.save(folder, meta, module.state_dict(), state)
    return folder / f"step-{step:08d}", module


def predictions(module, scale, inputs=6):
    x = torch.randn(9, inputs, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return scale.unscale(module.eval()(x).squeeze(1).numpy())


def test_the_same_network_predicts_the_same_in_the_targets_unit(tmp_path):
    path, old = saved(tmp_path, spec(8, 5))
    new = network(spec(8, 5), seed=1)
    report = start_from(new, StartConfig(path=path), NEW, print)
    np.testing.assert_allclose(predictions(new, NEW), predictions(old, OLD), rtol=1e-5)
    assert len(report.copied) == len(new.state_dict())
    assert not (report.new or report.left_out or report.unused)
    assert "last layer 6: rescaled from mean -1.5, deviation 0.8 to 2, 3" in str(report)


def test_a_target_on_a_log_scale_is_rescaled_there(tmp_path):
    there, here = (scale.model_copy(update={"transform": "log"}) for scale in (OLD, NEW))
    path, old = saved(tmp_path, spec(8), scale=there)
    new = network(spec(8), seed=1)
    start_from(new, StartConfig(path=path), here, print)
    np.testing.assert_allclose(predictions(new, here), predictions(old, there), rtol=1e-5)


def test_without_rescaling_the_output_is_the_same(tmp_path):
    path, old = saved(tmp_path, spec(8))
    new = network(spec(8), seed=1)
    start_from(new, StartConfig(path=path, rescale_head=False), NEW, print)
    for name, tensor in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], tensor), name


def test_what_fits_is_copied_and_the_rest_is_reported(tmp_path):
    path, old = saved(tmp_path, spec(8, 5))
    new = network(spec(8, 7, 4), seed=1)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    report = start_from(new, StartConfig(path=path), NEW, print)
    first = {name for name in old.state_dict() if name[0] in "01"}
    assert first < set(report.copied)
    assert report.left_out["3.weight"] == ((5, 8), (7, 8))
    assert report.left_out["6.weight"] == ((1, 5), (4, 7))
    assert set(report.new) == {n for n in before if n[0] in "79"}
    for name, tensor in new.state_dict().items():
        assert torch.equal(tensor, (old if name in report.copied else new).state_dict()[name])
        assert name in report.copied or torch.equal(tensor, before[name])
    lines = str(report).splitlines()
    assert lines[2].startswith(
        "  left out, other shape: 3.weight (5 x 8 there, 7 x 8 here), 3.bias"
    )
    assert "  last layer 9: begins anew" in lines


def test_a_new_head_by_exclusion(tmp_path):
    path, old = saved(tmp_path, spec(8))
    new = network(spec(8), seed=1)
    head = new[3].weight.clone()
    report = start_from(new, StartConfig(path=path, exclude=("3.*",)), NEW, print)
    assert torch.equal(new[3].weight, head)
    assert torch.equal(new[0].weight, old[0].weight)
    assert report.new == ("3.weight", "3.bias")


def test_layers_are_renamed_by_whole_parts(tmp_path):
    """A network with one more block in front: the old layers move, 1 is not the beginning of 10."""
    path, old = saved(tmp_path, spec(6, 5, 4, 3))
    new = network(spec(6, 6, 5, 4, 3), seed=1)
    rename = {str(n): str(n + 3) for n in range(13) if n % 3 != 2}  # those with weights
    report = start_from(new, StartConfig(path=path, rename=rename), NEW, print)
    for n in range(13):
        for key, tensor in old[n].state_dict().items():
            if n < 12:  # the head was rescaled
                assert torch.equal(new[n + 3].state_dict()[key], tensor)
    assert {name.split(".")[0] for name in report.new} == {"0", "1"}
    assert "last layer 15: rescaled" in str(report)


def test_layers_are_matched_whatever_stands_between(tmp_path):
    """Dropout and other activations shift the numbers of layers, a norm is one more with weights."""
    layers = (Dense(units=6), Activation(), Dense(units=6), Activation(), Dense(units=6))
    path, old = saved(tmp_path, NetworkSpec(input_shape=(6,), layers=layers))
    between = (Norm(), Activation(), Dropout(rate=0.1))
    wider = [part for layer in layers if layer.kind == "dense" for part in (layer, *between)]
    new = network(NetworkSpec(input_shape=(6,), layers=tuple(wider)), seed=1)
    report = start_from(new, StartConfig(path=path, rescale_head=False), NEW, print)
    for there, here in ((0, 0), (2, 4), (4, 8), (5, 12)):
        assert torch.equal(new[here].weight, old[there].weight)
    assert {name.split(".")[0] for name in report.new} == {"1", "5", "9"}
    assert "  layers moved: 2 to 4, 4 to 8, 5 to 12" in str(report).splitlines()


def test_a_deeper_source_leaves_layers_unused(tmp_path):
    path, old = saved(tmp_path, spec(8, 8, 8, 8))
    new = network(spec(8, 8), seed=1)
    report = start_from(new, StartConfig(path=path), NEW, print)
    assert torch.equal(new[3].weight, old[3].weight)
    assert report.left_out["6.weight"] == ((8, 8), (1, 8))
    assert {name.split(".")[0] for name in report.unused} == {"7", "9", "10", "12"}


def test_a_prefix_is_added_and_taken_away(tmp_path):
    path, old = saved(tmp_path, spec(8))
    wrapped = nn.ModuleDict({"net": network(spec(8), seed=1)})
    start_from(wrapped, StartConfig(path=path, rename={"": "net"}, rescale_head=False), NEW, print)
    assert torch.equal(wrapped["net"][0].weight, old[0].weight)


def test_a_hidden_layer_that_becomes_the_last_one_is_not_rescaled(tmp_path):
    path, old = saved(tmp_path, spec(8, 1, 3))
    new = network(spec(8), seed=1)
    report = start_from(new, StartConfig(path=path), NEW, print)
    assert torch.equal(new[3].weight, old[3].weight)
    assert "not rescaled" in report.head
    assert "9.weight" in report.unused


def test_a_run_gives_its_best_checkpoint(tmp_path):
    run = tmp_path / "run"
    best, module = saved(run / "train" / "checkpoints", spec(8), seed=0, step=5, mae=0.1)
    saved(run / "train" / "checkpoints", spec(8), seed=1, step=9, mae=0.2)
    (run / "run.json").write_text("{}")
    source = read_source(run, print)
    assert source.path == best
    assert source.scale == OLD
    assert torch.equal(source.module[0].weight, module[0].weight)


def test_an_exported_folder_is_a_source(tmp_path):
    path, old = saved(tmp_path, spec(8))
    meta = checkpoint.read_meta(path)
    task = make_task({"name": "toy_task:Toy"})
    model = Model(task, OLD, old.eval(), 10, spec(8), path.name, "", meta.metrics)
    export(model, tmp_path / "exported", "safetensors")
    new = network(spec(8), seed=1)
    report = start_from(new, StartConfig(path=tmp_path / "exported"), NEW, print)
    np.testing.assert_allclose(predictions(new, NEW), predictions(old, OLD), rtol=1e-5)
    assert report.source == tmp_path / "exported"


def test_reading_a_source_draws_no_random_numbers(tmp_path):
    path, _ = saved(tmp_path, spec(8))
    before = torch.get_rng_state()
    read_source(path, print)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_to_copy_is_an_error(tmp_path):
    path, _ = saved(tmp_path, spec(8))
    other = network(spec(9, inputs=4), seed=1)
    with pytest.raises(CheckpointError, match="no weight of it fits") as error:
        start_from(other, StartConfig(path=path), NEW, print)
    assert "0.weight 8 x 6" in str(error.value)
    assert "0.weight 9 x 4" in str(error.value)


def test_what_cannot_be_meant_is_an_error(tmp_path):
    path, _ = saved(tmp_path, spec(8))
    module = network(spec(8), seed=1)

    def refused(match, **changes):
        with pytest.raises(RecipeError, match=match):
            start_from(module, StartConfig(path=path, **changes), NEW, print)

    refused(r"exclude: 'head\.\*' fits no weight; there are 0\.weight", exclude=("head.*",))
    refused("rename: no weight there begins with 'body'", rename={"body": "0"})
    refused(r"rename: 0\.weight and 3\.weight both become 3\.weight", rename={"0": "3"})
    logarithmic = NEW.model_copy(update={"transform": "log"})
    with pytest.raises(RecipeError, match="scale 'identity', here on 'log': set rescale_head"):
        start_from(module, StartConfig(path=path), logarithmic, print)


@pytest.mark.parametrize("fault", ["absent", "empty", "torn"])
def test_no_source_is_an_error(tmp_path, fault):
    path = tmp_path / "step-00000001"
    if fault == "empty":
        path.mkdir()
    if fault == "torn":
        saved(tmp_path, spec(8))
        (path / checkpoint.WEIGHTS).write_bytes(b"short")
    with pytest.raises(CheckpointError, match="checksum" if fault == "torn" else "expected a run"):
        read_source(path, print)


def test_frozen_weights_and_statistics_stay(tmp_path):
    module = network(spec(8, 5), seed=0)
    assert freeze(module, ("0.*", "1.*")) == ("0.weight", "0.bias", "1.weight", "1.bias")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.eval()
    train_mode(module)
    assert module[4].training
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    module(torch.randn(7, 6)).square().sum().backward()
    optimizer.step()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name[0] in "01"), name


@pytest.mark.parametrize("patterns", [("1?.weight",), ("0.*", "7.*")])
def test_a_pattern_that_freezes_nothing_names_what_there_is(patterns):
    with pytest.raises(RecipeError, match=r"fits no weight; there are 0\.weight, 0\.bias, 1\."):
        freeze(network(spec(8), seed=0), patterns)


def test_something_must_be_left_to_train():
    module = network(spec(8), seed=0)
    with pytest.raises(RecipeError, match="nothing to train"):
        freeze(module, ("*",))
    assert all(p.requires_grad for p in module.parameters())


def test_rates_fall_with_the_distance_from_the_output():
    layers = (Conv(filters=4), Norm(), Activation(), Readout(op="mean"), Dense(units=5), Norm())
    module = build(NetworkSpec(input_shape=(2, 6, 6), layers=layers))
    assert layer_scales(module, 0.5) == {
        **{"0.weight": 0.25, "0.bias": 0.25, "1.weight": 0.25, "1.bias": 0.25},
        **{"4.weight": 0.5, "4.bias": 0.5, "5.weight": 0.5, "5.bias": 0.5},
        **{"6.weight": 1.0, "6.bias": 1.0},
    }
    assert set(layer_scales(module, 1.0).values()) == {1.0}
    assert list(layer_scales(module, 0.9)) == [name for name, _ in module.named_parameters()]
