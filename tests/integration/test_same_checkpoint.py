"""The same checkpoint, byte for byte, whoever starts the ranks; and no world of one by mistake.

srun needs a running Slurm (SLURM_CONF, if it is not the machine's own), MPICH its mpiexec.hydra on
the PATH; without them those arms are skipped.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runner import LIMIT_S, command, environment, toy_data, toy_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

MPIRUN = [str(Path(sys.executable).with_name("mpirun")), "--allow-run-as-root", "--oversubscribe"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
TRAIN = (
    'epochs = 2\nengine = "deepspeed"\nzero_stage = 2'  # DeepSpeed looks for the launcher itself
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return toy_recipe(folder / "toy.toml", toy_data(folder / "data"), train=TRAIN)


@pytest.fixture(scope="module")
def by_torchrun(toy, tmp_path_factory):
    run = tmp_path_factory.mktemp("torchrun") / "run"
    return checkpoint(toy, run, [*TORCHRUN, "--nproc-per-node", "2"])


@pytest.fixture(scope="module")
def slurm():
    """What the environment needs for srun. Skips if no Slurm answers."""
    if shutil.which("srun") is None:
        pytest.skip("no srun on the PATH")
    asked = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=60)
    if asked.returncode != 0 or "UP" not in asked.stdout:
        why = (asked.stdout + asked.stderr).strip().splitlines()[-1:]
        pytest.skip(f"no Slurm controller answers: {' '.join(why)}")
    return {"SLURM_CONF": os.environ["SLURM_CONF"]} if "SLURM_CONF" in os.environ else {}


@pytest.fixture(scope="module")
def mpich():
    """MPICH's mpiexec, and the variable by which mpi4py takes its library."""
    found = shutil.which("mpiexec.hydra")
    library = Path(found or "").absolute().parents[1] / "lib" / "libmpi.so.12" if found else None
    if found is None or library is None or not library.exists():
        pytest.skip("no MPICH: no mpiexec.hydra on the PATH with ../lib/libmpi.so.12 beside it")
    return [found, "-n", "2"], {"MPI4PY_LIBMPI": str(library)}


def train(toy, run, launcher, **changes):
    """`dmi train` on two ranks of a launcher, to its end."""
    return subprocess.run(
        [*launcher, *command("train", toy, "--out", run)],
        cwd=toy.parent,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def checkpoint(toy, run, launcher, **changes):
    """(source of the world, all that the last checkpoint says, with the digests of its files)."""
    done = train(toy, run, launcher, **changes)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    status = json.loads((run / "train" / "status.json").read_text())
    last = max((run / "train" / "checkpoints").glob("step-*"))
    found = json.loads((last / "checkpoint.json").read_text())
    assert (status["ranks"], found["ranks"]) == (2, 2)
    assert sorted(found["files"]) == ["state.pt", "weights.safetensors"]
    return status["launcher"], found


def refused(toy, tmp_path, launcher, *words, **changes):
    done = train(toy, tmp_path / "run", launcher, **changes)
    assert done.returncode != 0
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "run").exists()


def test_open_mpi(toy, by_torchrun, tmp_path):
    launcher, found = checkpoint(toy, tmp_path / "run", [*MPIRUN, "-n", "2"])
    assert (by_torchrun[0], launcher) == ("torchrun", "openmpi")
    assert found == by_torchrun[1]


def test_mpich(toy, by_torchrun, mpich, tmp_path):
    launcher, library = mpich
    assert checkpoint(toy, tmp_path / "run", launcher, **library) == ("pmi", by_torchrun[1])


@pytest.mark.parametrize("mpi", ["none", "pmi2", "pmix"])
def test_srun(toy, by_torchrun, slurm, tmp_path, mpi):
    kinds = subprocess.run(["srun", "--mpi=list"], capture_output=True, text=True, timeout=60)
    if mpi not in (kinds.stdout + kinds.stderr).split():
        pytest.skip(f"this Slurm has no plugin {mpi}")
    launcher, found = checkpoint(
        toy, tmp_path / "run", ["srun", "-n", "2", f"--mpi={mpi}"], **slurm
    )
    assert launcher == ("pmi" if mpi == "pmi2" else "slurm")
    assert found == by_torchrun[1]


def test_ranks_of_open_mpi_that_are_not_told_their_number_are_refused(toy, tmp_path):
    hiding = [*MPIRUN, "-n", "2", "env", "-u", "OMPI_COMM_WORLD_SIZE"]
    refused(toy, tmp_path, hiding, "PMIx says that this is rank 1 of a job", "DMI_WORLD=single")


def test_an_mpi_library_of_another_launcher_is_refused(toy, mpich, tmp_path):
    launcher, _ = mpich
    open_mpi = {"MPI4PY_LIBMPI": str(Path(sys.executable).parents[1] / "lib" / "libmpi.so.40")}
    refused(toy, tmp_path, launcher, "(pmi) started 2 ranks but MPI sees 1", **open_mpi)


def test_tasks_of_srun_that_are_each_a_world_of_one_are_refused(toy, slurm, tmp_path):
    tasks = ["srun", "-n", "2", "--mpi=none"]
    words = "Slurm runs 2 tasks here but this process finds itself alone", "srun --mpi=none dmi"
    for launcher in ([*TORCHRUN, "--nproc-per-node", "1"], [*MPIRUN, "-n", "1"]):
        refused(toy, tmp_path, [*tasks, *launcher], *words, **slurm)
