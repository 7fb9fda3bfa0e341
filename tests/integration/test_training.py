"""Training by real processes: ranks, engines, signals, kills, and a loss that is not a number."""

import json
import signal

import pytest
from runner import (
    UNHURRIED,
    assert_gone,
    dmi,
    ended,
    epochs_told,
    family,
    members,
    start,
    toy_data,
    toy_recipe,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # several trainings in a row


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """An uninterrupted training with DeepSpeed on one rank."""
    folder = tmp_path_factory.mktemp("whole")
    dmi("train", toy_recipe(folder / "toy.toml", data), "--out", folder / "run", cwd=folder)
    return folder / "run"


def status(run):
    return json.loads((run / "train" / "status.json").read_text())


def losses(run):
    """By epoch; killed before its checkpoint, an epoch is told once more: the last one counts."""
    lines = {line["epoch"]: line for line in epochs_told(run)}
    assert sorted(lines) == list(range(6))
    return [x for e in range(6) for x in (lines[e]["train_loss"], lines[e]["validation_error"])]


def epochs(run):
    return len(epochs_told(run))


def test_two_ranks_and_both_engines_give_the_same_losses(data, whole, tmp_path):
    """The global batch decides: neither the ranks that share it nor the engine."""
    recipe = toy_recipe(tmp_path / "toy.toml", data)
    dmi("launch", "train", recipe, "--out", tmp_path / "two", "-n", 2, cwd=tmp_path)
    assert (status(tmp_path / "two")["ranks"], status(tmp_path / "two")["launcher"]) == (
        2,
        "torchrun",
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), rel=1e-6)
    plain = toy_recipe(tmp_path / "plain.toml", data, train='epochs = 6\nengine = "torch"')
    dmi("train", plain, "--out", tmp_path / "plain", cwd=tmp_path)
    assert losses(tmp_path / "plain") == pytest.approx(losses(whole), rel=1e-6)


def test_stopped_or_killed_and_resumed_gives_the_weights_of_an_uninterrupted_run(
    data, whole, tmp_path
):
    recipe, run = toy_recipe(tmp_path / "toy.toml", data, 'fault = "slow"'), tmp_path / "run"
    process = start("train", recipe, "--out", run, cwd=tmp_path, **UNHURRIED)
    wait_for(lambda: epochs(run) >= 1, process)
    process.send_signal(signal.SIGTERM)
    assert "interrupted: stopped at epoch" in ended(process, 75)
    assert status(run) == {"state": "interrupted"}
    assert (
        "--resume continues it" in dmi("train", recipe, "--out", run, cwd=tmp_path, code=2).stderr
    )
    before = epochs(run)
    process = start("train", recipe, "--out", run, "--resume", cwd=tmp_path, **UNHURRIED)
    wait_for(lambda: epochs(run) > before, process)
    process.kill()
    ended(process, -signal.SIGKILL)
    assert status(run) == {"state": "running"}
    dmi("train", recipe, "--out", run, "--resume", cwd=tmp_path)
    assert losses(run) == losses(whole)
    assert status(run)["weights_xxh3"] == status(whole)["weights_xxh3"]


def test_ranks_stop_together_and_a_dead_rank_ends_the_job(data, tmp_path):
    recipe = toy_recipe(tmp_path / "toy.toml", data, 'fault = "slow"', train="epochs = 1000")
    run = tmp_path / "run"
    arguments = ("launch", "train", recipe, "--out", run, "-n", 2)
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: epochs(run) >= 1, process)
    ranks = family(process)
    process.send_signal(signal.SIGTERM)
    told = ended(process, 75)
    assert "the same dmi launch continues" in told
    assert "--resume" not in told
    assert_gone(ranks)
    assert status(run) == {"state": "interrupted"}
    before = epochs(run)
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: epochs(run) > before, process)
    ranks = family(process)
    members(process, lambda member: member.environ().get("RANK") == "1")[0].kill()
    assert "rank 1 of 2 was killed by signal 9" in ended(process, 2)
    assert_gone(ranks)


def test_a_loss_that_is_not_finite_is_a_typed_failure(data, tmp_path):
    recipe = toy_recipe(tmp_path / "toy.toml", data, 'fault = "nan"')
    done = dmi("train", recipe, "--out", tmp_path / "run", cwd=tmp_path, code=1)
    assert "\nfailed (nan): loss or gradient is not finite at epoch 0 step 0, rank 0" in done.stderr
    assert "Traceback" not in done.stderr
    state = status(tmp_path / "run")
    assert (state["state"], state["failure"]) == ("failed", "nan")
    assert "epoch 0" in state["message"]
