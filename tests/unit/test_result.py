"""What comes of a search: its front, its best networks, and which of them make an ensemble."""

import numpy as np
import pytest
from runner import toy_data
from search_runs import searched_run

from dmi_hpc.errors import RunError
from dmi_hpc.scores import NUMBERS
from search.evolution.evolve import Success
from search.records.history import Evaluation
from search.results.result import Predictions, front_of, members_of, selected


@pytest.fixture
def run(tmp_path):
    return searched_run(tmp_path, toy_data(tmp_path / "data"))


def test_members_are_the_best_or_the_named_each_from_every_seed(run):
    names = [member.name for member in members_of(run, top=2, seeds=2)]
    assert names == [f"network-{n}-seed-{s}" for n in (3, 1) for s in (3, 4)]
    named = members_of(run, top=1, seeds=1, networks=["0", "2", "0"])
    assert [member.found.id for member in named] == [0, 2]
    with pytest.raises(RunError, match="network 9: no successful evaluation"):
        members_of(run, top=1, seeds=1, networks=["2", "9"])


def test_a_search_without_success_is_named(run):
    (run.search / "journal.jsonl").write_text(
        (run.search / "journal.jsonl").read_text().splitlines()[0] + "\n"
    )
    with pytest.raises(RunError, match="no evaluation has succeeded"):
        members_of(run, top=2, seeds=2)


def evaluation(number, fitness, **metrics):
    outcome = Success(fitness)
    return Evaluation(
        "main", number, {}, str(number), "random", (), 0.0, 0.0, outcome, 1.0, metrics
    )


def test_front_of_error_and_costs():
    found = [
        evaluation(0, 0.1, flops=100.0),
        evaluation(1, 0.2, flops=50.0),
        evaluation(2, 0.3, flops=60.0),
        evaluation(3, 0.4, flops=10.0),
        evaluation(4, 0.05),
    ]
    assert [e.id for e in front_of(found, ["flops"])] == [0, 1, 3]
    assert [e.id for e in front_of(found, [])] == [4]
    assert front_of([], ["flops"]) == []


def test_members_that_make_the_ensemble_worse_are_left_out():
    truth = np.linspace(0, 1, 50)
    errors = np.array([0.1, -0.1, 0.0, 5.0])[:, None] + np.zeros(50)
    assert sorted(selected(Predictions(truth + errors, truth, NUMBERS))) == [0, 1, 2]
    truth = np.linspace(0, 1, 2000)
    errors = np.random.default_rng(0).normal(size=(4, 2000))
    assert set(selected(Predictions(truth + errors, truth, NUMBERS))) == {0, 1, 2, 3}
