"""A training that starts from another one, by real `dmi` processes."""

import json
import signal

import pytest
import torch
from runner import UNHURRIED, dmi, ended, epochs_told, start, toy_data, toy_recipe, wait_for

from dmi_hpc import checkpoint
from dmi_hpc.config import DataConfig
from dmi_hpc.data.build import Alone
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import BuildContext
from dmi_hpc.transfer import read_source

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run trained on many rows."""
    folder = tmp_path_factory.mktemp("source")
    train = "epochs = 12"
    data = small_data(folder / "data", rows=2000, validation=0.05, test=0.05)
    dmi("train", toy_recipe(folder / "toy.toml", data, train=train), "--out", "run", cwd=folder)
    return folder / "run"


def small_data(target, rows, validation, test):
    config = DataConfig(rows_per_shard=512, validation=validation, test=test)
    context = BuildContext(config, 3, Alone(), 1, lambda rows: None)
    make_task({"name": "toy_task:Toy", "samples": rows}).build_data(target, context)
    return target


def trained(folder, name, data, train):
    """(what was told, best validation error, weights) of a run."""
    recipe = toy_recipe(folder / f"{name}.toml", data, train=train)
    told = dmi("train", recipe, "--out", name, cwd=folder)
    status = json.loads((folder / name / "train" / "status.json").read_text())
    weights = read_source(folder / name, print).module.state_dict()
    return told.stdout + told.stderr, status["best_error"], weights


def test_few_rows_are_learnt_from_a_related_training(source, tmp_path):
    data = small_data(tmp_path / "data", rows=400, validation=0.2, test=0.7)
    start_here = f'epochs = 6\nstart = {{ path = "{source}" }}'
    _, alone, _ = trained(tmp_path, "alone", data, "epochs = 30")
    told, best, weights = trained(
        tmp_path, "transfer", data, f'{start_here}\nfreeze = ["0.*"]\nlayer_decay = 0.5'
    )
    assert best < 0.7 * alone
    assert f"weights from {source / 'train' / 'checkpoints'}" in " ".join(told.split())
    assert "last layer 2: rescaled" in told
    theirs = read_source(source, print).module.state_dict()
    for name in ("0.weight", "0.bias"):
        assert torch.equal(weights[name], theirs[name])
    assert not torch.equal(weights["2.weight"], theirs["2.weight"])


def test_it_goes_on_without_its_source_once_it_has_a_checkpoint(source, tmp_path):
    data = toy_data(tmp_path / "data")
    away = tmp_path / "away"
    newest = checkpoint.all_in(source / "train" / "checkpoints")[-1]
    away.mkdir()
    for file in newest.iterdir():
        (away / file.name).write_bytes(file.read_bytes())
    train = f'epochs = 6\naverage = 0.9\nstart = {{ path = "{away}" }}'
    recipe = toy_recipe(tmp_path / "toy.toml", data, 'fault = "slow"', train=train)
    process = start("train", recipe, "--out", "run", cwd=tmp_path, **UNHURRIED)
    wait_for(lambda: bool(epochs_told(tmp_path / "run")), process)
    process.send_signal(signal.SIGTERM)
    ended(process, 75)
    away.rename(tmp_path / "elsewhere")
    dmi("train", recipe, "--out", "run", "--resume", cwd=tmp_path)
    gone = dmi("train", recipe, "--out", "another", cwd=tmp_path, code=2)
    assert "nothing to start from; expected a run folder" in " ".join(gone.stderr.split())
    assert "Traceback" not in gone.stderr
