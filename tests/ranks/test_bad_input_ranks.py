"""Sizes that do not divide are exact on ranks; bad input ends all of them, with one message each."""

import numpy as np
import pytest
from ranks import ranks
from runner import LIMIT_S, start, toy_recipe
from silent import Silent
from toy_disk import read_only, small_disk

from dmi_hpc.config import TrainConfig
from dmi_hpc.data.manifest import BuildPlan, Field, SplitRule
from dmi_hpc.data.writer import ShardWriter
from dmi_hpc.errors import EXIT_USER_ERROR
from dmi_hpc.job import Job
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.train import fit
from dmi_hpc.world import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

TASK = {"name": "toy_task:Toy"}
NETWORK = NetworkSpec(input_shape=(8,), layers=(Dense(units=16), Activation()))
FEW = 6  # rows in all
# (rows of the set, global batch size, accumulation): nothing divides, and batches beyond the set
SIZES = [(60, 7, 1), (60, 5, 4), (60, 1, 1), (60, 1000, 3), (FEW, 4, 2), (FEW, 100, 1)]


def build(folder, rows, width=8):
    """A set of so many rows, of inputs of that width."""
    plan = BuildPlan(
        task=TASK["name"],
        rows_per_shard=64,
        fields=(
            Field(name="x", dtype="float32", shape=(width,), unit="", description=""),
            Field(name="y", dtype="float64", unit="", description=""),
        ),
        split_rule=SplitRule(seed=1, validation=0.2, test=0.2, key="row"),
        seed=0,
    )
    x = np.random.default_rng(3).normal(size=(rows, width)).astype(np.float32)
    with ShardWriter(folder, plan) as writer:
        writer.append({"x": x, "y": np.sin(x[:, 0].astype(np.float64))})
    return folder


def losses(data, batch_size, accumulation, world):
    """Training loss and validation error of each epoch, one after the other."""
    config = TrainConfig(
        epochs=2, batch_size=batch_size, accumulation=accumulation, learning_rate=1e-2, threads=1
    )
    job = Job(Problem.open(make_task(TASK), data), NETWORK, config, seed=1, world=world)
    history = fit(job, Silent(), resume=False, warn=pytest.fail).history
    return [x for epoch in history for x in (epoch.train_loss, epoch.validation_error)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Set by number of rows, and what one process alone finds for each of `SIZES`."""
    folder = tmp_path_factory.mktemp("sets")
    made = {rows: build(folder / str(rows), rows) for rows in {rows for rows, _, _ in SIZES}}
    return made, [losses(made[rows], b, a, World()) for rows, b, a in SIZES]


@ranks(2, 5)
def test_any_batch_size_and_any_number_of_ranks_is_the_same_training(world, sets):
    """Shares are padded at weight 0: 5 ranks learn from 4 rows, and are judged by one."""
    made, alone = sets
    problem = Problem.open(make_task(TASK), made[FEW])
    rows = len(problem.train_rows), len(problem.shards.rows("validation"))
    assert rows == (4, 1)
    for (count, batch_size, accumulation), expected in zip(SIZES, alone, strict=True):
        found = losses(made[count], batch_size, accumulation, world)
        assert found == pytest.approx(expected, rel=1e-5), (batch_size, accumulation)


def on_two_ranks(tmp_path, recipe, out):
    """What each of two ranks of `dmi train` says, once both have ended with a user's error."""
    rendezvous = tmp_path / "store"
    rendezvous.unlink(missing_ok=True)
    processes = [
        start(
            *("train", recipe, "--out", out),
            cwd=tmp_path,
            RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE="2",
            DMI_RENDEZVOUS=f"file://{rendezvous}",
            DMI_COLLECTIVE_TIMEOUT_S="30",
        )
        for rank in range(2)
    ]
    try:
        told = [process.communicate(timeout=LIMIT_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [EXIT_USER_ERROR] * 2, told
    return told


def assert_one_message(told, message):
    """Rank 0, whose error it is, says it, and no other: no traceback, no warning, nothing else."""
    errors = [[line for line in text.splitlines() if "error" in line] for text in told]
    assert [len(lines) for lines in errors] == [1, 0], told
    assert message in errors[0][0], told
    assert "Traceback" not in "".join(told)


def test_two_ranks_say_what_does_not_fit_the_task(tmp_path):
    recipe = toy_recipe(tmp_path / "toy.toml", build(tmp_path / "data", 40, width=5))
    told = on_two_ranks(tmp_path, recipe, tmp_path / "run")
    expected = "expected (rows, 8), found (1, 5) float32 from x (1, 5) float32"
    for text in told:  # both have looked
        assert text.count(expected) == 1
        assert "Traceback" not in text


def test_two_ranks_say_that_the_run_folder_cannot_be_written(sets, tmp_path):
    data = sets[0][60]
    recipe = toy_recipe(tmp_path / "toy.toml", data)
    (tmp_path / "file").write_text("precious")
    told = on_two_ranks(tmp_path, recipe, tmp_path / "file" / "run")
    assert_one_message(told, f"{tmp_path / 'file' / 'run'}: cannot write: ")
    (tmp_path / "run").mkdir()
    with read_only(tmp_path / "run"):
        told = on_two_ranks(tmp_path, recipe, tmp_path / "run")
    assert_one_message(told, f"{tmp_path / 'run'}: cannot write: [Errno ")


def test_two_ranks_say_that_the_disk_is_full(sets, tmp_path):
    recipe = toy_recipe(tmp_path / "toy.toml", sets[0][60])
    with small_disk(tmp_path / "disk", "32k"):
        told = on_two_ranks(tmp_path, recipe, tmp_path / "disk" / "run")
        assert_one_message(told, "no space left (")
