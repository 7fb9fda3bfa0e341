"""What `dmi train` refuses before it writes anything, and what it leaves behind."""

import json

import pytest
from runner import toy_data, toy_recipe

from dmi_hpc.cli.train import _state_on_disk, begin, plan_of, train
from dmi_hpc.config import load_recipe
from dmi_hpc.errors import DataError, Interrupted, RunError, TrialFailure
from dmi_hpc.files import exclusive
from dmi_hpc.run import open_run


@pytest.fixture
def run(tmp_path):
    recipe = toy_recipe(
        tmp_path / "toy.toml", toy_data(tmp_path / "data"), train='epochs = 2\nengine = "torch"'
    )
    return open_run(tmp_path / "run", load_recipe(recipe))


def content(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def changed(run, **values):
    """The same run's plan, as another winner of its search would change it."""
    plan = plan_of(run)
    return plan.__class__(plan.run, plan.task, plan.network, plan.config.model_copy(update=values))


def test_a_training_goes_on_with_other_resources_only(run):
    begin(plan_of(run), resume=False)
    assert begin(changed(run, threads=3, keep_checkpoints=9), resume=True) is None
    before = content(run.train)
    with pytest.raises(RunError, match=r"learning_rate: 0.01 there, 0.5 here\n.*another --out"):
        begin(changed(run, learning_rate=0.5), resume=True)
    with pytest.raises(RunError, match="--resume continues it"):
        begin(plan_of(run), resume=False)
    assert content(run.train) == before


def test_another_network_is_refused(run):
    begin(plan_of(run), resume=False)
    record = run.train / "plan.json"
    stored = json.loads(record.read_text())
    stored["network"]["layers"] = stored["network"]["layers"][1:]
    record.write_text(json.dumps(stored))
    with pytest.raises(RunError, match=r"differs in:\n  network\n"):
        begin(plan_of(run), resume=True)


def test_a_finished_training_is_said_to_be_and_not_touched(run, capsys):
    recipe = run.folder.parent / "toy.toml"
    train(recipe, run.folder)
    told = capsys.readouterr().out
    before = content(run.train)
    train(recipe, run.folder, resume=True)
    assert capsys.readouterr().out == told
    assert told.startswith("trained ")
    assert content(run.train) == before


def test_a_second_training_in_the_run_is_refused(run):
    refused = pytest.raises(RunError, match="another training is running here")
    with exclusive(run.train, "training"), refused:
        train(run.folder.parent / "toy.toml", run.folder)


def test_leftovers_of_killed_writers_go_at_the_start(run):
    (run.checkpoints / ".tmp-step-00000001-1-0123abcd").mkdir(parents=True)
    begin(plan_of(run), resume=False)
    assert list(run.checkpoints.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (Interrupted("x"), {"state": "interrupted"}),
        (TrialFailure("nan", "x"), {"state": "failed", "failure": "nan", "message": "x"}),
        (DataError("x"), {"state": "failed", "failure": "exception", "message": "x"}),
    ],
)
def test_how_a_training_ended_is_on_disk(tmp_path, error, state):
    with pytest.raises(type(error)), _state_on_disk(tmp_path / "status.json", first=True):
        raise error
    assert json.loads((tmp_path / "status.json").read_text()) == state
