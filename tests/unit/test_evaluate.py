"""Scores: equal to plain numpy, streamed, and every row once at any number of ranks."""

import json
import math
import sys
from subprocess import PIPE, Popen

import numpy as np
import pytest
import torch
from runner import environment, toy_data

from dmi_hpc.errors import DataError
from dmi_hpc.evaluate import Predictor, evaluate_rows
from dmi_hpc.models.build import build
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec, Norm
from dmi_hpc.problem import Problem
from dmi_hpc.scores import Scorer, score
from dmi_hpc.tasks import make_task
from dmi_hpc.world import World

NETWORK = NetworkSpec(input_shape=(8,), layers=(Dense(units=16), Norm(), Activation()))


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    path = toy_data(tmp_path_factory.mktemp("toy") / "data")
    return Problem.open(make_task({"name": "toy_task:Toy"}), path)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    return build(NETWORK).eval()


def by_hand(problem, network, rows):
    """(predictions, truths) in one go, without any of the code under test."""
    fields = problem.shards.fields(("x", "y"), rows)
    with torch.no_grad():
        output = network(torch.from_numpy(fields["x"]))[:, 0].numpy()
    return output.astype(np.float64) * problem.scale.std + problem.scale.mean, fields["y"]


def numpy_scores(predicted, truth):
    error = predicted - truth
    return (
        np.abs(error).mean(),
        np.sqrt((error**2).mean()),
        1 - (error**2).sum() / ((truth - truth.mean()) ** 2).sum(),
        100 * np.abs(error).mean() / np.abs(truth).mean(),
    )


def values(scores):
    return scores.mae, scores.rmse, scores.r2, scores.mae_percent


@pytest.mark.parametrize("split", ["train", "validation", "test", "all"])
def test_scores_are_numpy_s(problem, network, split):
    rows = problem.shards.rows(split)
    predicted, truth = by_hand(problem, network, rows)
    expected = numpy_scores(predicted, truth)
    assert values(score(predicted, truth)) == pytest.approx(expected, rel=1e-12)
    found = evaluate_rows(problem, network, rows, 7, World())
    assert values(found) == pytest.approx(expected, rel=1e-6)
    predictor = Predictor(problem.task, problem.scale, network, 7)
    predicted = predictor.of_fields(problem.shards.fields(("x",), rows))
    assert values(found) == pytest.approx(numpy_scores(predicted, truth), rel=1e-12)


def test_metrics_take_many_batches_at_once_without_a_difference(problem, network, monkeypatch):
    rows = problem.shards.rows("all")
    whole = evaluate_rows(problem, network, rows, 7, World())
    monkeypatch.setattr("dmi_hpc.scores._HELD_ROWS", 10)
    assert values(evaluate_rows(problem, network, rows, 7, World())) == pytest.approx(
        values(whole), rel=1e-12
    )


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_row_is_on_one_rank_and_sums_of_ranks_add_up(problem, network, size):
    """29 rows in batches of 4: some ranks have less in the last batch, some nothing."""
    rows = np.asarray(problem.shards.rows("all"))[:29]
    predicted, truth = by_hand(problem, network, rows)
    predictor, places, shares = Predictor(problem.task, problem.scale, network, 4), [], []
    for rank in range(size):
        scorer = Scorer()
        for part in predictor.of_rows(problem.shards, rows, World(rank, size), carry=("y",)):
            places += part.positions.tolist()
            np.testing.assert_array_equal(part.rows, rows[part.positions])
            np.testing.assert_array_equal(part.fields["y"], truth[part.positions])
            np.testing.assert_allclose(part.values, predicted[part.positions], rtol=1e-5)
            scorer.update(part.values, part.fields["y"])
        scorer.scores(lambda sums: shares.append(sums) or sums + 1.0)
    assert sorted(places) == list(range(len(rows)))
    total = Scorer().scores(lambda sums: torch.stack(shares).sum(0))
    assert values(total) == pytest.approx(numpy_scores(predicted, truth), rel=1e-5)


def test_a_rank_without_rows_knows_the_scores_of_all(problem, network):
    rows = np.asarray(problem.shards.rows("test"))[:2]
    predictor, shares = Predictor(problem.task, problem.scale, network, 4), []
    for rank in range(3):
        scorer = Scorer()
        for part in predictor.of_rows(problem.shards, rows, World(rank, 3), carry=("y",)):
            scorer.update(part.values, part.fields["y"])
        scorer.scores(lambda sums: shares.append(sums) or sums + 1.0)
    assert [float(share.sum()) == 0 for share in shares] == [False, False, True]
    expected = numpy_scores(*by_hand(problem, network, rows))
    found = Scorer().scores(lambda sums: sum(shares))
    assert values(found) == pytest.approx(expected, rel=1e-5)


def test_reading_holds_a_few_batches_only(problem, network, monkeypatch):
    """Of 200 rows in batches of 5, no more than those being read ahead are asked for."""
    read, used = 0, 0
    fields = type(problem.shards).fields

    def counted(self, names, rows, *rest):
        nonlocal read
        read += len(rows)
        return fields(self, names, rows, *rest)

    monkeypatch.setattr(type(problem.shards), "fields", counted)
    monkeypatch.setattr("dmi_hpc.data.loader._CHUNK_BATCHES", 2)
    predictor = Predictor(problem.task, problem.scale, network, 5)
    for part in predictor.of_rows(problem.shards, problem.shards.rows("all"), World()):
        used += len(part.rows)
        assert read - used <= 60
    assert read == used == len(problem.shards)


def test_the_caller_keeps_its_gradients(problem, network):
    """Also between the batches of a stream that is not finished."""
    predictor = Predictor(problem.task, problem.scale, network, 5)
    for _ in predictor.of_rows(problem.shards, problem.shards.rows("test"), World()):
        assert torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_one_row_has_no_r2_and_no_rows_no_predictions(problem, network):
    one = evaluate_rows(problem, network, np.array([3]), 4, World())
    assert math.isnan(one.r2)
    assert one.mae == one.rmse > 0
    predictor = Predictor(problem.task, problem.scale, network, 5)
    assert list(predictor.of_rows(problem.shards, np.array([], dtype=np.int64), World())) == []


def test_r2_is_right_for_quantities_of_any_size():
    """torchmetrics takes sums of squares below 1e-4 for zero."""
    truth = np.linspace(0, 1, 50)
    predicted = truth + 0.3 * np.sin(40 * truth)
    expected = score(predicted, truth).r2
    assert expected == pytest.approx(numpy_scores(predicted, truth)[2], rel=1e-12)
    for unit, offset in ((1e-6, 0), (1e9, 0), (1.0, 1e6)):
        found = score(unit * predicted + offset, unit * truth + offset).r2
        assert found == pytest.approx(expected, rel=1e-6)


def test_nan_is_not_hidden(problem, network):
    assert math.isnan(score(np.array([1.0, math.nan]), np.array([1.0, 2.0])).mae)


def test_inputs_of_another_shape_are_named(problem, network, monkeypatch):
    monkeypatch.setattr(type(problem.task), "inputs", lambda self, fields: fields["x"][:, :3])
    with pytest.raises(DataError, match=r"expected \(rows, 8\), found \(\d+, 3\)"):
        evaluate_rows(problem, network, problem.shards.rows("test"), 4, World())


RANK = """
import json, sys, torch
import numpy as np
from pathlib import Path
from dmi_hpc import collectives
from dmi_hpc.evaluate import evaluate_rows
from dmi_hpc.scores import score
from dmi_hpc.models.build import build
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec, Norm
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.world import detect
world, device = detect(), torch.device("cpu")
with collectives.group(world, device):
    problem = Problem.open(make_task({"name": "toy_task:Toy"}), Path(sys.argv[1]))
    torch.manual_seed(3)
    network = build(
        NetworkSpec(input_shape=(8,), layers=(Dense(units=16), Norm(), Activation()))
    ).eval()
    rows = problem.shards.rows("all")
    found = vars(evaluate_rows(problem, network, rows, 7, world))
    print(json.dumps({name: value for name, value in found.items() if value is not None}))
    if world.is_first:  # scores of one process wait for nobody
        assert score(np.ones(4), np.arange(4)).mae == 1
"""


@pytest.mark.slow
def test_real_ranks_find_the_same_scores(problem, network, tmp_path):
    ranks = [
        Popen(
            [sys.executable, "-c", RANK, str(problem.shards.path)],
            env=environment(
                RANK=str(rank), WORLD_SIZE="3", DMI_RENDEZVOUS=f"file://{tmp_path}/store"
            ),
            stdout=PIPE,
            stderr=PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        told = [rank.communicate(timeout=100) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0, 0], told
    found = [json.loads(out) for out, _ in told]
    assert found[0] == found[1] == found[2]
    alone = evaluate_rows(problem, network, problem.shards.rows("all"), 7, World())
    expected = {name: value for name, value in vars(alone).items() if value is not None}
    assert found[0] == pytest.approx(expected, rel=1e-5)
