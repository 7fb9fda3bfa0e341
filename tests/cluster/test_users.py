"""Jobs of users who are not root, two of them on one node; what the scheduler refuses."""

import re
import stat
import sys
from pathlib import Path

import pytest
from cluster_runs import User, events, follow, journal, latest, queue, told, wait_until
from runner import toy_data, toy_recipe

from dmi_hpc.sessions import sessions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SEARCH = 'evaluations = 12\ninitial = 6\nworkers = "auto"'
# nodes are shared, as on many clusters
SHARED = """\
extends = "cpu"
exclusive = false
cores_per_node = 1
directives = ["--mem=100"]
[sources]
exclusive = "general"
cores_per_node = "general"
directives = "general"
"""


@pytest.fixture
def both(nodes, tmp_path):
    """Two users who are not root, each in a folder of their own."""
    python = next((p for p in pythons() if can_run(nodes, p)), None)
    if python is None:
        pytest.skip("no Python here that a user who is not root may run")
    return [User(nodes, nodes.root / "home" / name, name, python) for name in nodes.users]


def pythons():
    """This one may lie in root's home; one of the system finds the same packages by PYTHONPATH."""
    system = Path(f"/usr/bin/python3.{sys.version_info.minor}")
    return [sys.executable, *([str(system)] if system.exists() else [])]


def can_run(slurm, python):
    packages = [one for one in sys.path if one.endswith("site-packages")]
    said = slurm.run(
        *("env", python, "-P", "-c", "import pydantic"),  # env: not allowed is an exit code
        user=slurm.users[0],
        cwd=Path("/"),
        check=False,
        env={"PYTHONPATH": ":".join(packages)},
    )
    return said.returncode == 0


def own_recipe(user, **changes):
    """In a folder that nobody else can read."""
    before = {*user.folder.iterdir()}
    path = toy_recipe(user.folder / "toy.toml", toy_data(user.folder / "data"), **changes)
    for new in {*user.folder.iterdir()} - before:
        user.slurm.run("chown", "-R", f"{user.name}:{user.name}", new)
    user.folder.chmod(0o700)
    return path


def test_two_users_search_on_one_node_at_once(both):
    runs = []
    for user in both:
        (user.folder / "shared.toml").write_text(SHARED)
        recipe = own_recipe(user, task='fault = "slow"', search=SEARCH)
        machine, run = user.folder / "shared.toml", user.folder / "run"
        user.dmi(
            *("launch", "-m", machine, "-N", 1, "-t", 5, "--option=--nodelist=node2"),
            *("search", recipe, "--out", run),
        )
        runs.append(run)
    slurm = both[0].slurm
    wait_until(slurm, runs[0], lambda: all(journal(run, "tell") for run in runs))
    assert [state for _, state, _ in queue(slurm)] == ["RUNNING", "RUNNING"]
    for run in runs:
        [token] = run.glob("launch/sessions/*/ray.token")
        private = (token, token.parent, run / "launch", run / "logs", run)
        assert not [f for f in private if stat.S_IMODE(f.stat().st_mode) & 0o077]
    for run, user in zip(runs, both, strict=True):
        follow(slurm, run)
        [session] = sessions(run)
        assert (session.how, session.nodes) == ("finished", ("node2",)), told(slurm, run)
        assert len(journal(run, "tell")) == 12
        assert run.owner() == user.name


def test_a_training_of_a_user(both):
    user = both[0]
    run = user.folder / "a $(name); of 'theirs'"
    job = user.launch("-N", 2, "-t", 5, "train", own_recipe(user), "--out", run)
    follow(user.slurm, run)
    assert events(run, job)[-1]["how"] == "finished", told(user.slurm, run)
    assert latest(run) == job


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-N", 2, "-p", "nowhere"), r"invalid partition.*sinfo"),
        (("-N", 40), r"PartitionConfig.*fewer nodes"),
        (("-N", 1, "--option=--reservation=none"), r"reservation"),
    ],
    ids=["partition", "nodes", "reservation"],  # accounts are refused by slurmdbd alone
)
def test_a_refusal_is_the_schedulers_own_words_and_what_to_do(user, tmp_path, options, said):
    recipe, run = toy_recipe(tmp_path / "toy.toml"), tmp_path / "run"
    words = ("launch", "-m", "cpu", "-t", 2, *options, "train", recipe, "--out", run)
    done = user.dmi(*words, code=2)
    assert re.search(said, done.stderr, re.I | re.S), done.stderr
    assert "Traceback" not in done.stderr
    assert queue(user.slurm) == []


def test_without_sbatch_one_learns_where_to_submit(user, tmp_path):
    recipe, run = toy_recipe(tmp_path / "toy.toml"), tmp_path / "run"
    words = ("launch", "-m", "cpu", "-N", 1, "-t", 2, "train", recipe, "--out", run)
    done = user.dmi(*words, code=2, PATH=str(tmp_path))
    assert "sbatch: no such command here" in done.stderr
