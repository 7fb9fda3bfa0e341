import pytest

from dmi_hpc.errors import LaunchError
from dmi_hpc.world import World, detect

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
NODE_1 = {"SLURM_NODEID": "1"}
PMI = {"PMI_RANK": "2", "PMI_SIZE": "4"}
BATCH_SHELL = {**SRUN, "SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World()),
        (TORCHRUN, World(3, 8, 1, 2, "torchrun")),
        (OPENMPI, World(1, 4, 1, 2, "openmpi")),
        (PMI, World(2, 4, 2, 4, "pmi")),
        ({**PMI, "PMI_LOCAL_RANK": "0", "PMI_LOCAL_SIZE": "2"}, World(2, 4, 0, 2, "pmi")),
        ({**PMI, "PALS_LOCAL_RANKID": "1", "PMI_LOCAL_SIZE": "2"}, World(2, 4, 1, 2, "pmi")),
        ({**PMI, "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}, World(2, 4, 0, 1, "pmi")),
        (SRUN, World(5, 8, 1, 8, "slurm")),
        ({**SRUN, **NODE_1, "SLURM_TASKS_PER_NODE": "4(x2)"}, World(5, 8, 1, 4, "slurm")),
        ({**SRUN, **NODE_1, "SLURM_TASKS_PER_NODE": "4,3,1"}, World(5, 8, 1, 3, "slurm")),
        ({**SRUN, **NODE_1, "SLURM_TASKS_PER_NODE": "8"}, World(5, 8, 1, 8, "slurm")),
        (
            {
                **SRUN,
                **NODE_1,
                "SLURM_TASKS_PER_NODE": "9(x2)",
                "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
            },
            World(5, 8, 1, 4, "slurm"),
        ),
        (BATCH_SHELL, World()),
        ({**SRUN, "DMI_WORLD": "single"}, World()),
        ({**SRUN, **TORCHRUN}, World(3, 8, 1, 2, "torchrun")),
    ],
)
def test_each_launcher_is_understood(env, world):
    assert detect(env) == world


def test_silent_worlds_of_one_are_refused():
    """srun without PMI makes every MPI rank 0 of 1; N jobs would overwrite each other."""
    alone = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    with pytest.raises(LaunchError, match=r"8 tasks.*srun --mpi=none"):
        detect({**SRUN, **alone})


@pytest.mark.parametrize("env", [{**TORCHRUN, "RANK": "8"}, {**TORCHRUN, "WORLD_SIZE": "many"}])
def test_contradictions_are_refused(env):
    with pytest.raises(LaunchError, match="expected"):
        detect(env)


def test_a_rank_in_another_world_than_its_launcher_meant_is_refused():
    alone = {"DMI_LAUNCHED": "2", "DMI_WORLD": "single"}
    with pytest.raises(LaunchError, match=r"started 2 ranks but .* world of 1"):
        detect(alone)
    assert detect({**TORCHRUN, "DMI_LAUNCHED": "8"}).size == 8


@pytest.mark.parametrize(
    ("source", "mask", "sharing"),
    [
        ("openmpi", 16, 4),  # not bound: the ranks of the node share the machine
        ("openmpi", 4, 1),  # bound: the mask is the rank's own
        ("slurm", 4, 1),
        ("torchrun", 4, 4),  # a mask from outside, which torchrun and dmi launch do not divide
    ],
)
def test_cores_that_the_launcher_has_divided_are_not_divided_again(
    monkeypatch, source, mask, sharing
):
    monkeypatch.setattr("psutil.cpu_count", lambda: 16)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(mask)))
    assert World(0, 8, 0, 4, source).ranks_on_cores == sharing
