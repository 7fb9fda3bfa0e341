"""Run folders: whose they are, and which network a recipe trains."""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from dmi_hpc.config import Recipe
from dmi_hpc.errors import DataError, RunError
from dmi_hpc.models.spec import Dense, NetworkSpec
from dmi_hpc.run import network_to_train, open_run, record_command

PUBLISHED = NetworkSpec(input_shape=(8,), layers=(Dense(units=4),))


def recipe(**tables):
    return Recipe.model_validate({"name": "a", "task": {"name": "toy_task:Toy"}, **tables})


def test_a_new_run_records_itself_and_opens_again(tmp_path):
    run = open_run(tmp_path / "run", recipe(seed=5))
    content = json.loads((run.folder / "run.json").read_text())
    assert content["seed"] == 5
    assert content["fingerprint"] == recipe(seed=5).fingerprint()
    assert content["versions"]["torch"] != "absent"
    assert content["hardware"]["host_cores"] >= 1
    assert open_run(run.folder).recipe == open_run(run.folder, recipe(seed=5)).recipe == run.recipe


def test_data_lie_in_the_run_or_where_the_recipe_says(tmp_path):
    assert open_run(tmp_path / "a", recipe()).data == tmp_path / "a" / "data"
    elsewhere = recipe(data={"path": str(tmp_path / "set")})
    assert open_run(tmp_path / "b", elsewhere).data == tmp_path / "set"


def test_another_recipe_is_refused_with_the_difference(tmp_path):
    open_run(tmp_path / "run", recipe(train={"epochs": 3}))
    with pytest.raises(RunError) as caught:
        open_run(tmp_path / "run", recipe(train={"epochs": 4}))
    assert "train.epochs there is 3, here 4" in str(caught.value)
    assert "seed" not in str(caught.value)


def test_resources_may_differ_and_the_given_ones_hold(tmp_path):
    first = open_run(tmp_path / "run", recipe())
    given = recipe(
        data={"processes": 2},
        train={"threads": 3, "keep_checkpoints": 4},
        search={"workers": 5, "time_limit_s": 6, "evaluations": 7},
        launch={"ranks": 8},
    )
    assert given.fingerprint() == first.recipe.fingerprint()
    record_command(first)
    assert open_run(first.folder, given).recipe == given
    assert open_run(first.folder).recipe == given
    assert len(json.loads((first.folder / "run.json").read_text())["commands"]) == 1


def test_data_stay_where_they_are_when_the_working_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_run(tmp_path / "run", recipe(data={"path": "sets/a"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_run(tmp_path / "run").data == tmp_path / "sets" / "a"
    open_run(tmp_path / "run", recipe(data={"path": "../sets/a"}))  # the same set
    with pytest.raises(RunError, match="another run: data"):
        open_run(tmp_path / "run", recipe(data={"path": "sets/a"}))


def test_folders_that_hold_no_run_are_refused_and_left_alone(tmp_path):
    with pytest.raises(RunError, match="no run here"):
        open_run(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunError, match="not empty and holds no run"):
        open_run(tmp_path, recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_newer_run_is_refused(tmp_path):
    run = open_run(tmp_path / "run", recipe())
    identity = run.folder / "run.json"
    identity.write_text(json.dumps({**json.loads(identity.read_text()), "version": 9}))
    with pytest.raises(RunError, match="newer DMI-HPC"):
        open_run(run.folder)


def test_commands_are_recorded_once(tmp_path, monkeypatch):
    run = open_run(tmp_path / "run", recipe())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for arguments in (["train", "my recipe.toml"], ["train", "my recipe.toml"], ["evaluate"]):
        monkeypatch.setattr(sys, "argv", ["/bin/dmi", *arguments])
        record_command(run)
    monkeypatch.setenv("PYTHONPATH", "/my tasks")
    record_command(run)
    commands = json.loads((run.folder / "run.json").read_text())["commands"]
    assert commands == [
        f"cd {tmp_path} && dmi train 'my recipe.toml'",
        f"cd {tmp_path} && dmi evaluate",
        f"cd {tmp_path} && PYTHONPATH='/my tasks' dmi evaluate",
    ]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"version": 1}', '{"version": 1, "recipe": 2, "commands": []}']
)
def test_a_damaged_run_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunError, match=r"run\.json: damaged"):
        open_run(tmp_path)


def test_the_network_is_published_given_or_found(tmp_path):
    run = open_run(tmp_path / "a", recipe())
    assert network_to_train(run, PUBLISHED) == (PUBLISHED, {})
    given = recipe(model={"source": "layers", "layers": [{"kind": "dense", "units": 7}]})
    network, changes = network_to_train(open_run(tmp_path / "b", given), PUBLISHED)
    assert (network.layers, changes) == ((Dense(units=7),), {})
    searched = open_run(tmp_path / "c", recipe(model={"source": "search"}))
    with pytest.raises(RunError, match="First: dmi search"):
        network_to_train(searched, PUBLISHED)
    winner = NetworkSpec(input_shape=(8,), layers=(Dense(units=9),))
    searched.search.mkdir()
    searched.winner.write_text(
        json.dumps({"network": winner.model_dump(mode="json"), "hyper": {"batch_size": 8}})
    )
    assert network_to_train(searched, PUBLISHED) == (winner, {"batch_size": 8})


def test_a_winner_found_on_other_data_is_not_trained(tmp_path, monkeypatch):
    searched = open_run(tmp_path, recipe(model={"source": "search"}))
    content = {"network": PUBLISHED.model_dump(mode="json"), "hyper": {}, "data": "old"}
    searched.search.mkdir()
    searched.winner.write_text(json.dumps(content))
    for identity, refused in (("old", False), ("new", True)):
        manifest = SimpleNamespace(identity=identity)
        monkeypatch.setattr("dmi_hpc.run.read_manifest", lambda folder, found=manifest: found)
        with pytest.raises(DataError, match="data set old") if refused else nullcontext():
            assert network_to_train(searched, PUBLISHED) == (PUBLISHED, {})
