"""A trained run and its data belong together: evaluation, its files, refusals; empty splits."""

import collections
import json
import math
import shutil

import numpy as np
import pytest
from runner import start, toy_data
from silent import Silent

from dmi_hpc import assess as module
from dmi_hpc import knobs
from dmi_hpc.assess import assess
from dmi_hpc.config import DataConfig, Recipe, TrainConfig
from dmi_hpc.data.build import Alone
from dmi_hpc.data.manifest import read_manifest
from dmi_hpc.errors import DataError, LaunchError
from dmi_hpc.problem import Problem
from dmi_hpc.report import write_report
from dmi_hpc.run import Run, open_run
from dmi_hpc.scores import score
from dmi_hpc.targets import TargetScale
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import BuildContext, Picture
from dmi_hpc.train import Job, fit

CONFIG = TrainConfig(epochs=2, batch_size=20, learning_rate=1e-2, engine="torch", threads=1)


def build(target, seed=3, **config):
    context = BuildContext(
        DataConfig(rows_per_shard=64, **config), seed, Alone(), 1, lambda n: None
    )
    make_task({"name": "toy_task:Toy"}).build_data(target, context)


def train(run, resume=False):
    problem = Problem.open(make_task(run.recipe.task), run.data)
    network = problem.task.published_network()
    job = Job(problem, network, CONFIG, seed=1, checkpoints=run.checkpoints)
    return fit(job, Silent(), resume=resume, warn=print)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    recipe = Recipe.model_validate({"name": "a", "task": {"name": "toy_task:Toy"}})
    run = open_run(tmp_path_factory.mktemp("assess") / "run", recipe)
    build(run.data)
    train(run)
    return run


@pytest.fixture
def run(trained, tmp_path):
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    return Run(folder, trained.recipe)


def swap(run):
    shutil.rmtree(run.data)
    build(run.data, seed=4)


def test_other_data_than_those_of_the_training_are_refused(run):
    before = read_manifest(run.data).identity
    swap(run)
    now = read_manifest(run.data).identity
    for attempt in (lambda: assess(run, "test"), lambda: train(run, resume=True)):
        with pytest.raises(DataError, match=f"made from data set {before}, found data set {now}"):
            attempt()
    assert not (run.folder / "evaluation.json").exists()


def test_a_checkpoint_from_before_identities_is_evaluated(run):
    for path in run.checkpoints.glob("*/checkpoint.json"):
        meta = json.loads(path.read_text())
        del meta["data"]
        path.write_text(json.dumps(meta))
    swap(run)
    assert assess(run, "test")["data"] == read_manifest(run.data).identity


def test_the_identity_is_the_content_s(tmp_path):
    for name, changes in {"a": {}, "same": {}, "b": {"seed": 4}, "c": {"test": 0.3}}.items():
        build(tmp_path / name, **changes)
    found = {name: read_manifest(tmp_path / name).identity for name in ("a", "same", "b", "c")}
    assert found["a"] == found["same"]
    assert len(set(found.values())) == 3


def test_other_splits_leave_the_test_evaluation_alone(run, monkeypatch):
    task = type(make_task(run.recipe.task))
    pictures = [Picture("one", "of the test split", b"png")]
    monkeypatch.setattr(task, "pictures", lambda *arguments: tuple(pictures))
    assess(run, "test")
    names = ("evaluation.json", "predictions.csv", "gallery/gallery.json")
    before = {name: (run.folder / name).read_bytes() for name in names}
    pictures[0] = Picture("two", "of another split", b"png")
    for split in ("validation", "train"):
        assert assess(run, split)["split"] == split
        assert json.loads((run.folder / f"evaluation-{split}.json").read_text())["split"] == split
        assert (run.folder / f"predictions-{split}.csv").exists()
    assert before == {name: (run.folder / name).read_bytes() for name in names}


def test_a_quantity_that_is_zero_has_no_percent(run, monkeypatch):
    assert score(np.ones(3), np.zeros(3)).mae_percent is None
    monkeypatch.setattr(Problem, "target", lambda self, fields: np.zeros(len(fields["y"])))
    evaluation = assess(run, "test")
    assert all(method["mae_percent"] is None for method in evaluation["methods"])
    assert write_report(run.folder).exists()


def test_predictions_that_are_not_finite_are_refused(run, monkeypatch):
    monkeypatch.setattr(TargetScale, "unscale", lambda self, output: np.full(len(output), math.nan))
    with pytest.raises(DataError, match=r"network: \d+ of \d+ predictions are not finite"):
        assess(run, "test")


def files_of(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_the_network_alone_needs_no_rows_in_memory(run, monkeypatch):
    both = assess(run, "test")
    written = (run.folder / "predictions.csv").read_text().splitlines()
    free = collections.namedtuple("Memory", "available")(1000)
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: free)
    with pytest.raises(DataError, match=r"baselines need \d+ rows in memory.*--network-only"):
        assess(run, "test")
    alone = assess(run, "test", network_only=True)
    assert [method["name"] for method in alone["methods"]] == ["network"]
    kept = ("mae", "rmse", "r2", "mae_percent")
    for key in kept:
        assert alone["methods"][0][key] == both["methods"][0][key]
    header, *lines = (run.folder / "predictions.csv").read_text().splitlines()
    assert header == "row,label,truth,network"
    assert lines == [line.rpartition(",")[0] for line in written[1:]]


def evaluate_on_ranks(run, size):
    """(ended processes, what each wrote to stdout and stderr)"""
    ranks = [
        start(
            *("evaluate", run.folder),
            cwd=run.folder,
            RANK=str(rank),
            WORLD_SIZE=str(size),
            DMI_RENDEZVOUS=f"file://{run.folder.parent}/store",
        )
        for rank in range(size)
    ]
    try:
        return ranks, [rank.communicate(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.slow
def test_ranks_write_what_one_process_writes(run):
    """Three ranks for 3 rows of a batch and more: predictions in order, files by rank 0 alone."""
    expected = assess(run, "test")
    table = (run.folder / "predictions.csv").read_text()
    before = files_of(run.folder)
    (run.folder / "predictions.csv").unlink()
    ranks, told = evaluate_on_ranks(run, 3)
    assert [rank.returncode for rank in ranks] == [0, 0, 0], told
    assert [bool(out) for out, _ in told] == [True, False, False]
    found = json.loads((run.folder / "evaluation.json").read_text())
    for one, other in zip(expected["methods"], found["methods"], strict=True):
        assert one["name"] == other["name"]
        for key in ("mae", "rmse", "r2", "mae_percent"):
            assert one[key] == pytest.approx(other[key], rel=1e-5)
    again = (run.folder / "predictions.csv").read_text()
    assert np.loadtxt(again.splitlines()[1:], delimiter=",") == pytest.approx(
        np.loadtxt(table.splitlines()[1:], delimiter=","), rel=1e-5
    )
    assert files_of(run.folder) == before


@pytest.mark.slow
def test_an_error_of_one_rank_ends_all(run):
    swap(run)
    ranks, told = evaluate_on_ranks(run, 2)
    assert [rank.returncode for rank in ranks] == [2, 2], told
    assert all("made from data set" in err for _, err in told)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_empty_split_is_named(tmp_path, split):
    build(tmp_path / "data", **{split: 1e-9})
    with pytest.raises(DataError, match=f"the {split} split is empty, of 200 rows.*'{split}'"):
        Problem.open(make_task({"name": "toy_task:Toy"}), tmp_path / "data")


def test_a_choice_that_leaves_no_training_rows_is_named(tmp_path, monkeypatch):
    task, data = make_task({"name": "toy_task:Toy"}), toy_data(tmp_path / "data")
    monkeypatch.setattr(task, "in_training", lambda target: np.zeros(len(target), dtype=bool))
    with pytest.raises(DataError, match=r"0 training rows \(\d+ before .* wider train_range"):
        Problem.open(task, data)


@pytest.mark.parametrize("text", ["abc", "", "nan", "inf", "0", "-3"])
def test_a_timeout_that_is_none_is_named(monkeypatch, text):
    monkeypatch.setenv(knobs.COLLECTIVE_TIMEOUT_S, text)
    with pytest.raises(LaunchError, match=f"TIMEOUT_S: found '{text}', expected seconds"):
        knobs.collective_timeout_s()
