"""A training that needs more time than a job has is, in the end, the one that was never stopped."""

import pytest
from cluster_runs import follow, told
from runner import epochs_told, toy_data, toy_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EPOCHS = 60


def test_a_chained_training_has_the_losses_of_an_uninterrupted_one(user, tmp_path):
    """By the same job, requeued."""
    slurm, run, whole = user.slurm, tmp_path / "run", tmp_path / "whole"
    recipe = toy_recipe(
        tmp_path / "toy.toml", toy_data(tmp_path / "data"), 'fault = "slow"', f"epochs = {EPOCHS}"
    )
    user.dmi("launch", "train", recipe, "-n", 4, "--out", whole, TOY_SLOW_S="0")
    words = ("-N", 4, "-t", 1, "--chain", "requeue", "train", recipe, "--out", run)
    job = user.launch(*words, TOY_SLOW_S="0.2")
    found = follow(slurm, run, limit_s=500)
    hows = [s.how for s in found]
    assert len(hows) >= 3, told(slurm, run)
    assert hows == ["interrupted"] * (len(hows) - 1) + ["finished"], told(slurm, run)
    assert {s.job for s in found} == {job}
    assert [s.restart for s in found] == list(range(len(found)))
    expected, epochs = epochs_told(whole), epochs_told(run)
    assert [e["epoch"] for e in epochs] == list(range(EPOCHS))  # none twice
    for key in ("train_loss", "validation_error"):
        assert [e[key] for e in epochs] == pytest.approx([e[key] for e in expected], rel=1e-6)
