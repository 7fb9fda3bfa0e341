"""`dmi search refine`: trainings in processes of their own, stopped, failing, continued."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from runner import LIMIT_S, SUPPORT, UNHURRIED, epochs_told, toy_data, toy_recipe
from search_runs import searched_run

from dmi_hpc.ensemble import load_ensemble
from dmi_hpc.errors import Interrupted, RunError
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from search.results.result import members_of, refine
from search.results.training_process import trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # several processes in a row


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))  # of the processes that train
    return searched_run(tmp_path, data)


def test_refinement_trains_all_once_leaves_failures_out_and_its_ensemble_predicts(run):
    members = members_of(run, top=2, seeds=2)[:3]
    heard: list[str] = []
    scores = refine(run, members, heard.append)
    assert sum("failed and is left out" in line for line in heard) == 1  # batches of 16 rows
    assert [(m["network"], m["seed"]) for m in scores["members"]] == [("3", 3), ("3", 4)]
    ensemble = load_ensemble(run.search / "ensemble", "cpu")
    problem = Problem.open(make_task(run.recipe.task), run.data)
    fields, truth = problem.split("test")
    mean, sigma = ensemble.predict_with_sigma(fields)
    assert np.abs(mean - truth).mean() == pytest.approx(scores["test"]["mae"], rel=1e-5)
    within = float((np.abs(mean - truth) <= sigma).mean())
    assert within == pytest.approx(scores["test"]["coverage_1"])
    stored = json.loads((run.search / "ensemble" / "ensemble.json").read_text())["scores"]
    assert stored == scores
    place = run.search / "refined" / "network-3-seed-3"
    assert len(epochs_told(place)) == 3  # of [train], not of the search's trials
    assert refine(run, members, heard.append) == scores
    assert len(epochs_told(place)) == 3


def test_a_stop_signal_is_handed_on_and_the_same_call_continues(run, monkeypatch):
    recipe = run.search / "slow.toml"
    toy_recipe(recipe, run.data, 'fault = "slow"', train="epochs = 6", seed=5)
    place = run.search / "slow"

    def stop():
        end = time.monotonic() + LIMIT_S
        while not epochs_told(place) and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with monkeypatch.context() as patch:
        for name, value in UNHURRIED.items():
            patch.setenv(name, value)
        with pytest.raises(Interrupted, match="the same command continues"):
            trained(recipe, place)
    thread.join()
    before = len(epochs_told(place))
    assert 1 <= before < 6
    assert trained(recipe, place) is None
    assert sorted(line["epoch"] for line in epochs_told(place)) == list(range(6))


def test_a_training_that_cannot_start_is_no_failure_of_the_network(run):
    recipe = run.search / "wrong.toml"
    toy_recipe(recipe, run.search / "nowhere")
    with pytest.raises(RunError, match="does not start"):
        trained(recipe, run.search / "wrong")
