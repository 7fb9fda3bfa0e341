"""The preflight on nodes; ranks by mpirun; the same command inside an allocation of salloc."""

import subprocess

import pytest
from cluster_runs import follow, told
from runner import command, environment, epochs_told, toy_data, toy_recipe

from dmi_hpc.sessions import sessions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

MPIRUN = """\
extends = "cpu"
launcher = "mpirun"
mpi = ""
[sources]
launcher = "general"
mpi = "general"
"""


@pytest.fixture
def recipe(tmp_path):
    return toy_recipe(tmp_path / "toy.toml", toy_data(tmp_path / "data"), train="epochs = 3")


def test_the_preflight_looks_at_every_node(user, tmp_path):
    folder = tmp_path / "checked"
    user.launch("-N", 4, "-t", 4, "check", folder)
    follow(user.slurm, folder)
    said = "".join(log.read_text() for log in folder.glob("logs/job-*.out"))
    assert "all 4 answered" in said, said
    assert "4 ranks, as started" in said, said
    assert "FAILURE" not in said, said


def test_ranks_that_mpirun_starts_train_alike(user, recipe, tmp_path):
    machine, run = tmp_path / "ours.toml", tmp_path / "run"
    machine.write_text(MPIRUN)
    user.dmi("launch", "-m", machine, "-N", 4, "-t", 4, "train", recipe, "--out", run)
    follow(user.slurm, run)
    assert [s.how for s in sessions(run)] == ["finished"], told(user.slurm, run)
    user.dmi("launch", "train", recipe, "-n", 4, "--out", tmp_path / "here")
    losses = [e["train_loss"] for e in epochs_told(tmp_path / "here")]
    assert [e["train_loss"] for e in epochs_told(run)] == pytest.approx(losses, rel=1e-6)


def test_inside_an_allocation_the_same_line_uses_its_nodes(user, recipe, tmp_path):
    """From the login node, where this salloc leaves its shell: it goes to the first node by itself."""
    run = tmp_path / "run"
    done = subprocess.run(
        ["salloc", "-N2", "-t4", *command("launch", "-m", "cpu", "train", recipe, "--out", run)],
        env={**environment(), **user.slurm.env, "PYTHONPATH": environment()["PYTHONPATH"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "to node1, the first node of the allocation" in said
    [session] = sessions(run)
    assert (session.how, session.nodes) == ("finished", ("node1", "node2")), said
    assert len(epochs_told(run)) == 3
