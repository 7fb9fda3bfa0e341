"""A search that needs more time than a job has goes on in the next jobs, until it is complete."""

import pytest
from cluster_runs import assert_each_told_once, events, follow, journal, noting_recipe, told

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EVALUATIONS = 26


def test_a_search_is_chained_until_its_budget_is_spent(user, tmp_path):
    """By jobs that wait for one another; each stops in time, by itself."""
    slurm, run = user.slurm, tmp_path / "run"
    recipe = noting_recipe(tmp_path, EVALUATIONS, batch_s=0.15, epochs=10)
    job = user.launch("-N", 2, "-t", 1, "--chain", "dependency", "search", recipe, "--out", run)
    found = follow(slurm, run, limit_s=500)
    hows = [s.how for s in found]
    assert len(hows) >= 3, told(slurm, run)
    assert hows == ["interrupted"] * (len(hows) - 1) + ["finished"], told(slurm, run)
    assert found[0].job == job
    assert [s.next for s in found] == [*(s.job for s in found[1:]), "none"]
    assert [e["code"] for s in found for e in events(run, s.job) if e["event"] == "ended"][-1] == 0
    assert_each_told_once(run, EVALUATIONS)
    assert [e["why"] for e in journal(run, "end")][-1] == "finished"
    history = user.dmi("launch", "history", run).stdout
    assert all(s.job in history for s in found)
