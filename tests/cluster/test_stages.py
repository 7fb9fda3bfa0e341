"""Data and training on four nodes are what they are alone; users, refusals."""

import json
import stat

import pytest
from cluster_runs import events, follow, told
from runner import epochs_told, toy_data, toy_recipe
from toy_build import content

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def ended(run, job):
    [end] = [e for e in events(run, job) if e["event"] == "ended"]
    return end


def test_a_set_built_on_four_nodes_is_the_one_built_alone(user, tmp_path):
    seen = tmp_path / "seen"
    seen.mkdir()
    recipe = toy_recipe(tmp_path / "toy.toml", task=f'samples = 1000\nseen = "{seen}"')
    recipe.write_text(recipe.read_text().replace("toy_task:Toy", "cluster_task:Seen"))
    user.dmi("data", "build", recipe, "--out", tmp_path / "alone")
    run = tmp_path / "four nodes"
    job = user.launch("-N", 4, "-t", 5, "data", recipe, "--out", run)
    follow(user.slurm, run)
    assert ended(run, job)["how"] == "finished", told(user.slurm, run)
    ranks = {path.name for path in seen.iterdir() if path.name.endswith("-of-4")}
    assert ranks == {f"node{k + 1}.rank-{k}-of-4" for k in range(4)}
    assert rows_of(run) == rows_of(tmp_path / "alone")
    for private in (run, run / "launch", run / "logs"):
        assert stat.S_IMODE(private.stat().st_mode) == 0o700


def rows_of(run):
    """Everything in the set but the command that made it."""
    files = content(run / "data")
    manifest = json.loads(files.pop("manifest.json"))
    del manifest["made_with"]["command"], manifest["xxh3"]
    return files, manifest


def test_training_on_four_nodes_is_training_on_four_local_ranks(user, tmp_path):
    recipe = toy_recipe(tmp_path / "toy.toml", toy_data(tmp_path / "data"), train="epochs = 3")
    user.dmi("launch", "train", recipe, "-n", 4, "--out", tmp_path / "local")
    run = tmp_path / "run"
    job = user.launch("-N", 4, "-t", 5, "train", recipe, "--out", run)
    follow(user.slurm, run)
    assert ended(run, job)["how"] == "finished", told(user.slurm, run)
    assert len(list((run / "logs").glob("rank-*.log"))) == 3
    local, cluster = epochs_told(tmp_path / "local"), epochs_told(run)
    assert len(cluster) == 3
    for key in ("train_loss", "validation_error"):
        expected = [epoch[key] for epoch in local]
        assert [epoch[key] for epoch in cluster] == pytest.approx(expected, rel=1e-6)
