"""Predictions of files and shard sets, written whole or not at all; loading by three lines."""

import csv
import json
import shutil
import sys

import h5py
import numpy as np
import pytest
import torch
from pyarrow import parquet
from runner import toy_data
from toy_task import Toy

from dmi_hpc import checkpoint, load
from dmi_hpc.cli.export import app as export_app
from dmi_hpc.cli.predict import app as predict_app
from dmi_hpc.config import DataConfig, Recipe
from dmi_hpc.data import ShardSet
from dmi_hpc.data.build import Alone
from dmi_hpc.errors import CheckpointError, DataError, DMIError, LaunchError, RunError
from dmi_hpc.export import export
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import BYTES, cost
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec, Norm
from dmi_hpc.predict import BATCH_BYTES, batch_size_of, predict_inputs
from dmi_hpc.run import open_run
from dmi_hpc.table import Column, table_file
from dmi_hpc.targets import TargetScale
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import BuildContext

NETWORK = NetworkSpec(input_shape=(8,), layers=(Dense(units=16), Norm(), Activation()))
SCALE = TargetScale(transform="identity", mean=2.0, std=3.0)
X = np.random.default_rng(0).normal(size=(11, 8)).astype(np.float32)


def save_checkpoint(folder, seed, mae, step=1):
    """A checkpoint as a training leaves it; returns its network."""
    torch.manual_seed(seed)
    network = build(NETWORK).eval()
    meta = checkpoint.Meta(
        step=step,
        epoch=0,
        network=NETWORK,
        scale=SCALE,
        task=make_task({"name": "toy_task:Toy"}).recipe_options(),
        data="0123456789abcdef",
        metrics={"validation_error": mae},
    )
    checkpoint.save(folder, meta, network.state_dict(), {})
    return network


def by_hand(network, x):
    with torch.no_grad():
        return network(torch.from_numpy(x))[:, 0].numpy().astype(np.float64) * 3.0 + 2.0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run folder, its best network)"""
    folder = tmp_path_factory.mktemp("predict") / "run"
    run = open_run(folder, Recipe.model_validate({"name": "a", "task": {"name": "toy_task:Toy"}}))
    best = save_checkpoint(run.checkpoints, 1, 0.5, step=1)
    save_checkpoint(run.checkpoints, 2, 0.7, step=2)
    return folder, best


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


def test_a_run_a_checkpoint_and_an_export_predict_the_same(trained, tmp_path):
    folder, network = trained
    model = load(folder)
    assert (model.checkpoint, model.data) == ("step-00000001", "0123456789abcdef")
    expected = by_hand(network, X)
    np.testing.assert_allclose(model.predict({"x": X}), expected, rtol=1e-6)
    export(model, tmp_path / "out", "safetensors")
    for path in (
        str(folder),
        folder / "train" / "checkpoints" / model.checkpoint,
        tmp_path / "out",
    ):
        other = load(path)
        np.testing.assert_array_equal(other.predict({"x": X}), model.predict({"x": X}))
        assert other.metrics == {"validation_error": 0.5}
        assert not other.module.training


def test_plain_lists_are_fields_and_no_rows_no_predictions(trained):
    model = load(trained[0])
    np.testing.assert_array_equal(model.predict({"x": X.tolist()}), model.predict({"x": X}))
    assert model.predict({"x": X[:0]}).shape == (0,)


def test_fields_that_do_not_fit_are_named(trained, monkeypatch):
    model = load(trained[0])
    with pytest.raises(DataError, match="expected fields x; missing x, found z"):
        model.predict({"z": X})
    with pytest.raises(DataError, match=r"expected \(rows, 8\), found \(11, 3\)"):
        model.predict({"x": X[:, :3]})
    monkeypatch.setattr(Toy, "input_fields", ("x", "z"))
    with pytest.raises(DataError, match=r"as many rows in each, found \{'x': 11, 'z': 10\}"):
        model.predict({"x": X, "z": X[1:]})


def test_folders_without_a_network_are_named(trained, tmp_path):
    with pytest.raises(RunError, match=r"run\.json.*checkpoint\.json.*model\.json"):
        load(tmp_path)
    folder = shutil.copytree(trained[0], tmp_path / "run")
    shutil.rmtree(folder / "train")
    with pytest.raises(CheckpointError, match="dmi train"):
        load(folder)


def test_batches_are_bounded_in_bytes():
    large = make_task({"name": "homogenization", "voxels": 51}).published_network()
    rows, each = batch_size_of(large), BYTES * cost(large).activations
    assert rows * each <= BATCH_BYTES < (rows + 1) * each


def told(path):
    """column -> values, of any of the formats"""
    if path.suffix == ".csv":
        header, *lines = csv.reader(path.read_text().splitlines())
        values = np.array(lines, dtype=float).reshape(-1, len(header))
        return {name: values[:, k] for k, name in enumerate(header)}
    if path.suffix == ".parquet":
        table = parquet.read_table(path)
        assert table.schema.field("y").metadata == {b"unit": b"m"}
        return {name: table[name].to_numpy() for name in table.column_names}
    with h5py.File(path) as file:
        assert file["y"].attrs["unit"] == "m"
        return {name: values[:] for name, values in file.items()}


def predict(*arguments):
    predict_app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.mark.parametrize("name", ["p.csv", "p.parquet", "p.h5", "p.hdf5"])
@pytest.mark.parametrize("split", ["all", "test"])
def test_a_shard_set_is_predicted_row_by_row(
    trained, data, tmp_path, monkeypatch, capsys, name, split
):
    monkeypatch.setattr("dmi_hpc.predict.BATCH_BYTES", 3000.0)  # many batches
    folder, network = trained
    model = load(folder)
    assert model.batch_size < 32
    predict(folder, data, "--out", tmp_path / name, "--split", split)
    found = told(tmp_path / name)
    with ShardSet.open(data) as shards:
        rows = np.asarray(shards.rows(split))
        expected = by_hand(network, shards.gather("x", rows))
    np.testing.assert_array_equal(found["row"], rows)
    np.testing.assert_allclose(found["y (m)" if "csv" in name else "y"], expected, rtol=2e-6)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert f"{len(rows)} predictions in" in capsys.readouterr().out


def test_a_file_is_predicted_with_its_labels(trained, tmp_path, monkeypatch, capsys):
    labels = ["a", 'b, "c"', "é", *"defghijk"]
    monkeypatch.setattr(Toy, "read_inputs", lambda self, path: (labels, {"x": X}))
    predict(trained[0], "f")
    header, *lines = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["input", "y (m)"]
    assert [label for label, _ in lines] == labels
    np.testing.assert_allclose(
        [float(value) for _, value in lines], by_hand(trained[1], X), rtol=2e-6
    )
    predict(trained[0], "f", "--out", tmp_path / "p.h5")
    with h5py.File(tmp_path / "p.h5") as file:
        assert file["input"].asstr()[:].tolist() == labels


def test_a_set_on_the_terminal_is_told_as_it_comes(trained, data, monkeypatch, capsys):
    monkeypatch.setattr("dmi_hpc.predict.BATCH_BYTES", 3000.0)
    predict(trained[0], data, "--split", "test")
    header, *lines = csv.reader(capsys.readouterr().out.splitlines())
    with ShardSet.open(data) as shards:
        assert header == ["row", "y (m)"]
        assert [int(row) for row, _ in lines] == np.asarray(shards.rows("test")).tolist()


def test_a_split_without_rows_is_a_table_without_rows(trained, tmp_path, capsys):
    context = BuildContext(DataConfig(validation=1e-9), 3, Alone(), 1, lambda rows: None)
    make_task({"name": "toy_task:Toy"}).build_data(tmp_path / "data", context)
    predict(trained[0], tmp_path / "data", "--split", "validation")
    assert capsys.readouterr().out == "row,y (m)\n"
    for name in ("p.csv", "p.parquet", "p.h5"):
        predict(trained[0], tmp_path / "data", "--split", "validation", "--out", tmp_path / name)
        assert all(len(values) == 0 for values in told(tmp_path / name).values())


def test_predictions_that_are_not_finite_are_counted(trained, tmp_path, monkeypatch, capsys):
    bad = X.copy()
    bad[[2, 5]] = np.nan
    monkeypatch.setattr(Toy, "read_inputs", lambda self, path: (list("abcdefghijk"), {"x": bad}))
    predict(trained[0], "f", "--out", tmp_path / "p.csv")
    assert "2 of 11 predictions are not finite" in capsys.readouterr().err


def test_an_error_on_the_way_leaves_what_was_there(trained, data, tmp_path, monkeypatch):
    monkeypatch.setattr("dmi_hpc.predict.BATCH_BYTES", 3000.0)
    calls, inputs = [], Toy.inputs

    def failing(self, fields):
        calls.append(len(fields["x"]))
        if len(calls) > 3:
            raise ZeroDivisionError("the user's own bug")
        return inputs(self, fields)

    monkeypatch.setattr(Toy, "inputs", failing)
    for name in ("p.csv", "p.parquet", "p.h5"):
        (tmp_path / name).write_text("before")
        with pytest.raises(ZeroDivisionError):
            predict(trained[0], data, "--out", tmp_path / name)
        assert (tmp_path / name).read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 3


def test_what_cannot_be_predicted_is_named_before_any_work(trained, data, tmp_path, monkeypatch):
    model = load(trained[0])
    with pytest.raises(DataError, match=r"found suffix '\.txt', expected \.csv, \.parquet"):
        predict(tmp_path / "no run", data, "--out", tmp_path / "p.txt")
    with pytest.raises(DataError, match="found 'tst', expected all, train, validation, test"):
        predict_inputs(model, data, "tst")
    with pytest.raises(DataError, match="--split test is of shard sets"):
        predict_inputs(model, tmp_path / "f.csv", "test")
    monkeypatch.setattr(Toy, "input_fields", ("x", "z"))
    with pytest.raises(DataError, match=r"needs fields z; found split, x, y"):
        predict_inputs(model, data)


def test_an_unwritable_folder_is_named(trained, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DMIError, match="cannot write"):
        predict(trained[0], data, "--out", tmp_path / "file" / "p.csv")


def test_several_ranks_are_refused(trained, data, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        LaunchError, match=r"dmi predict is one process, found 2 ranks \(torchrun\)"
    ):
        predict(trained[0], data, "--out", tmp_path / "p.csv")
    with pytest.raises(LaunchError, match="dmi export is one process"):
        export_app([str(trained[0]), "--out", str(tmp_path / "out")], standalone_mode=False)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_parquet_library_is_named(trained, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match=r"pip install 'dmi-hpc\[import\]'"):
        predict(trained[0], data, "--out", tmp_path / "p.parquet")


def test_parquet_row_groups_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr("dmi_hpc.table._GROUP_ROWS", 100)
    with table_file(tmp_path / "a.parquet", [Column("n", "integer")]) as append:
        for start in range(0, 250, 10):
            append({"n": np.arange(start, start + 10)})
    found = parquet.ParquetFile(tmp_path / "a.parquet")
    assert [found.metadata.row_group(i).num_rows for i in range(3)] == [100, 100, 50]
    assert found.read()["n"].to_pylist() == list(range(250))


def test_numbers_of_csv_are_whole_unless_digits_are_asked_for(tmp_path):
    columns = [Column("a", "real"), Column("b", "real", "K", digits=3), Column("c", "text")]
    with table_file(tmp_path / "t.csv", columns) as append:
        append({"a": np.array([1 / 3]), "b": np.array([1 / 3]), "c": ["x,y"]})
    assert (tmp_path / "t.csv").read_text() == 'a,b (K),c\n0.3333333333333333,0.333,"x,y"\n'


def test_the_metrics_of_a_model_are_plain_data(trained):
    assert json.loads(json.dumps(dict(load(trained[0]).metrics))) == {"validation_error": 0.5}
