"""From nothing to the report by `dmi launch all`, twice; and what a user may get wrong on the way."""

import json
import shutil

import pytest
from runner import dmi, epochs_told, toy_data, toy_recipe

from dmi_hpc.files import read_json_lines

MINI = """\
seed = 1
[task]
name = "homogenization"
voxels = 7
samples = 80
[data]
rows_per_shard = 32
processes = 1
[model]
source = "search"
[train]
epochs = 3
batch_size = 16
[search]
evaluations = 4
initial = 3
epochs = 1
workers = 2
"""
FILES = (
    "run.json",
    "data/manifest.json",
    "search/journal.jsonl",
    "search/winner.json",
    "train/network.json",
    "train/metrics.jsonl",
    "train/status.json",
    "train/checkpoints",
    "train/tensorboard",
    "evaluation.json",
    "predictions.csv",
    "gallery/gallery.json",
    "report.html",
)


def weights(run):
    return json.loads((run / "train" / "status.json").read_text())["weights_xxh3"]


def tells(run):
    events = read_json_lines(run / "search" / "journal.jsonl")
    return [event for event in events if event["event"] == "tell"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_from_nothing_to_the_report_and_again(tmp_path):
    recipe, run = tmp_path / "mini.toml", tmp_path / "run"
    recipe.write_text(MINI)
    # a user's own module of that name must not be taken for ours, here or on Ray's workers
    (tmp_path / "search.py").write_text("raise RuntimeError('not this one')")
    first = dmi("launch", "all", recipe, "--out", run, cwd=tmp_path)
    assert [name for name in FILES if not (run / name).exists()] == []
    assert len(tells(run)) == 4
    assert not {"warning", "error"} & set(first.stderr.lower().split())
    assert "Rule of mixtures" in first.stdout
    before = weights(run), tells(run), (run / "evaluation.json").read_text().count("mae")
    assert json.loads((run / "train" / "status.json").read_text())["ranks"] == 2
    dmi("launch", "all", recipe, "--out", run, cwd=tmp_path)
    after = weights(run), tells(run), (run / "evaluation.json").read_text().count("mae")
    assert before == after
    assert len(epochs_told(run)) == 3
    assert "finished" in dmi("info", run, cwd=tmp_path).stdout


def clean(done, *parts):
    """One line for the user, with all `parts` and without a traceback."""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    for part in parts:
        assert str(part) in done.stderr


@pytest.mark.slow
def test_a_damaged_or_newer_data_set_is_named(tmp_path):
    data = toy_data(tmp_path / "data")
    recipe = toy_recipe(tmp_path / "toy.toml", data)
    shard = data / "shard-00001.h5"
    expected = json.loads((data / "manifest.json").read_text())["shards"][1]["xxh3"]
    content = bytearray(shard.read_bytes())
    content[-10] ^= 1
    shard.write_bytes(content)
    done = dmi("train", recipe, "--out", tmp_path / "run", cwd=tmp_path, code=2)
    clean(done, "shard-00001.h5", expected, "found")
    done = dmi("data", "verify", data, cwd=tmp_path, code=2)
    damage, error = done.stderr.splitlines()[0], done.stderr.splitlines()[-1]
    assert "shard-00001.h5: field 'split'" in damage and "Traceback" not in done.stderr
    assert error.startswith("error: ") and "--repair-from COPY" in error
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    done = dmi("train", recipe, "--out", tmp_path / "run", "--resume", cwd=tmp_path, code=2)
    clean(done, "99", "newer")
    shutil.rmtree(data)
    done = dmi("train", recipe, "--out", tmp_path / "run", "--resume", cwd=tmp_path, code=2)
    clean(done, data, "dmi data build")


@pytest.mark.slow
def test_a_wrong_recipe_or_folder_is_one_clean_line(tmp_path):
    recipe = toy_recipe(tmp_path / "toy.toml", train="epoch = 6")
    done = dmi("data", "build", recipe, cwd=tmp_path, code=2)
    clean(done, recipe, "'train.epoch'", "Did you mean 'epochs'?")
    assert done.stderr.count("\n") == 1
    toy_recipe(recipe)
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.tex").write_text("all my work")
    done = dmi("data", "build", recipe, "--out", used, cwd=tmp_path, code=2)
    clean(done, used, "not empty and holds no run")
    assert [path.name for path in used.iterdir()] == ["thesis.tex"]
    dmi("data", "build", recipe, "--out", tmp_path / "run", cwd=tmp_path)
    toy_recipe(recipe, train="epochs = 7")
    done = dmi("data", "build", recipe, "--out", tmp_path / "run", cwd=tmp_path, code=2)
    clean(done, "holds another run", "train.epochs there is 6, here 7")
