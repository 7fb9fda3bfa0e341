"""Several networks as one: means, uncertainty, and files that are whole or refused."""

import json

import numpy as np
import pytest
import torch

from dmi_hpc.ensemble import ENSEMBLE, Calibration, ensemble_of, load_ensemble, save_ensemble
from dmi_hpc.errors import CheckpointError, DMIError, FormatVersionError
from dmi_hpc.export import export
from dmi_hpc.models.build import build
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec, Norm
from dmi_hpc.predict import Model
from dmi_hpc.targets import TargetScale
from dmi_hpc.tasks import make_task

X = np.random.default_rng(0).normal(size=(11, 8)).astype(np.float32)
CALIBRATION = Calibration(scale=2.0, floor=0.5)


def model(seed, transform="identity"):
    """An untrained network; sizes differ from seed to seed."""
    torch.manual_seed(seed)
    network = NetworkSpec(input_shape=(8,), layers=(Dense(units=4 + seed), Norm(), Activation()))
    task = make_task({"name": "toy_task:Toy"})
    scale = TargetScale(transform=transform, mean=2.0, std=3.0)
    metrics = {"validation_error": 0.1 * seed}
    return Model(task, scale, build(network).eval(), 4, network, f"step-{seed}", "abc", metrics)


def members(transform="identity"):
    return {f"network-{seed}": model(seed, transform) for seed in (1, 2, 3)}


@pytest.fixture
def saved(tmp_path):
    save_ensemble(tmp_path / "ensemble", members(), CALIBRATION, {"test": {"mae": 0.25}})
    return tmp_path / "ensemble"


def test_prediction_is_the_mean_and_sigma_the_calibrated_spread():
    ensemble = ensemble_of(list(members().values()), CALIBRATION)
    each = np.stack([m.predict({"x": X}) for m in members().values()])
    mean, sigma = ensemble.predict_with_sigma({"x": X})
    np.testing.assert_allclose(mean, each.mean(0))
    np.testing.assert_allclose(sigma, np.sqrt((2 * each.std(0, ddof=1)) ** 2 + 0.25))
    np.testing.assert_allclose(ensemble.predict({"x": X}), mean, rtol=1e-5)


def test_on_a_log_scale_the_mean_is_geometric():
    ensemble = ensemble_of(list(members("log").values()), CALIBRATION)
    each = np.stack([m.predict({"x": X}) for m in members("log").values()])
    mean, _ = ensemble.predict_with_sigma({"x": X})
    np.testing.assert_allclose(mean, np.exp(np.log(each).mean(0)))
    np.testing.assert_allclose(ensemble.predict({"x": X}), mean, rtol=1e-5)


def test_what_is_saved_is_loaded_and_may_be_moved(saved):
    moved = saved.rename(saved.with_name("elsewhere"))
    loaded = load_ensemble(moved, "cpu")
    expected = ensemble_of(list(members().values()), CALIBRATION)
    for got, wanted in zip(
        loaded.predict_with_sigma({"x": X}), expected.predict_with_sigma({"x": X}), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    assert not loaded.module.training


def test_saving_again_replaces(saved):
    two = {name: member for name, member in members().items() if name != "network-2"}
    save_ensemble(saved, two, CALIBRATION, {})
    assert len(load_ensemble(saved, "cpu").members) == 2
    assert sorted(path.name for path in saved.iterdir()) == [ENSEMBLE, "network-1", "network-3"]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda raw: "{torn", CheckpointError, "not an ensemble"),
        (lambda raw: json.dumps([raw]), CheckpointError, "not an ensemble"),
        (lambda raw: json.dumps({**raw, "version": 99}), FormatVersionError, "reads up to"),
        (lambda raw: json.dumps({**raw, "members": ["network-1"]}), CheckpointError, "at least 2"),
        (lambda raw: json.dumps({**raw, "members": ["../x", "a"]}), CheckpointError, "pattern"),
    ],
)
def test_damaged_files_are_refused(saved, change, error, said):
    path = saved / ENSEMBLE
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(error, match=said):
        load_ensemble(saved, "cpu")


def test_altered_weights_are_refused(saved):
    weights = saved / "network-2" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="checksum"):
        load_ensemble(saved, "cpu")


def test_an_ensemble_is_exported_as_one_graph_and_refused_as_a_list_of_weights(saved, tmp_path):
    ensemble = load_ensemble(saved, "cpu")
    export(ensemble, tmp_path / "graph", "torch")
    program = torch.export.load(tmp_path / "graph" / "model.pt2").module()
    found = program(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(found, ensemble.predict({"x": X}), rtol=1e-4)
    with pytest.raises(DMIError):
        export(ensemble, tmp_path / "weights", "safetensors")
    assert not (tmp_path / "weights").exists()
