"""What a cluster does to jobs: cancelled, preempted, the controller restarted. Nothing is lost."""

import pytest
from cluster_runs import (
    assert_each_told_once,
    follow,
    journal,
    noting_recipe,
    told,
    wait_until,
)
from runner import epochs_told, toy_data, toy_recipe

from dmi_hpc.sessions import sessions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_search_survives_a_restart_of_the_controller_and_scancel(user, tmp_path):
    slurm, run = user.slurm, tmp_path / "run"
    job = user.launch("-N", 4, "-t", 5, "search", noting_recipe(tmp_path, 32), "--out", run)
    wait_until(slurm, run, lambda: len(journal(run, "tell")) >= 2)
    slurm.restart_controller(1)
    wait_until(slurm, run, lambda: len(journal(run, "tell")) >= 10)
    assert slurm.state(job) == "RUNNING", told(slurm, run)
    slurm.run("scancel", job)
    follow(slurm, run)
    [session] = sessions(run)
    assert (session.how, session.next) == ("cancelled", "none"), told(slurm, run)
    before = len(journal(run, "tell"))
    assert before < 32
    user.dmi("launch", "resume", run)
    follow(slurm, run)
    assert [s.how for s in sessions(run)] == ["cancelled", "finished"], told(slurm, run)
    assert_each_told_once(run, 32)


@pytest.mark.parametrize("queue", ["debug", "lowgrace"])
def test_a_preempted_training_goes_on_with_the_same_losses(user, tmp_path, queue):
    """With and without a time of grace. It goes on by itself."""
    slurm, data = user.slurm, toy_data(tmp_path / "data")
    recipe = toy_recipe(tmp_path / "toy.toml", data, 'fault = "slow"', "epochs = 80")
    user.dmi("launch", "train", recipe, "-n", 2, "--out", tmp_path / "whole", TOY_SLOW_S="0")
    run = tmp_path / "run"
    words = ("-N", 2, "-t", 5, "-p", queue, "--chain", "requeue", "train", recipe, "--out", run)
    job = user.launch(*words, TOY_SLOW_S="0.02")
    wait_until(slurm, run, lambda: len(told_epochs(run)) >= 10)
    slurm.run("srun", "-p", "high", "-N4", "sleep", "1")
    follow(slurm, run)
    found = sessions(run)
    assert len(found) >= 2, told(slurm, run)
    assert found[-1].how == "finished", told(slurm, run)
    assert {s.job for s in found} == {job}
    whole, parts = epochs_told(tmp_path / "whole"), {e["epoch"]: e for e in epochs_told(run)}
    assert sorted(parts) == list(range(80))
    losses = [parts[k]["train_loss"] for k in sorted(parts)]
    assert losses == pytest.approx([e["train_loss"] for e in whole], rel=1e-6)
    if queue == "lowgrace":  # there was time to save: no epoch is done twice
        assert len(epochs_told(run)) == 80
        assert found[0].how == "interrupted"


def told_epochs(run):
    return epochs_told(run) if (run / "train" / "metrics.jsonl").exists() else []
