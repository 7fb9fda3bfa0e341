import pytest

from dmi_hpc.errors import LaunchError
from dmi_hpc.world import World, detect

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "0",
}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
BATCH_SHELL = {**SRUN, "SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("env", "world"),
    [
        ({}, World()),
        (TORCHRUN, World(3, 8, 1, 2, 1, "torchrun")),
        (OPENMPI, World(1, 4, 1, 2, 0, "openmpi")),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, World(2, 4, 2, 4, 0, "pmi")),
        (SRUN, World(5, 8, 1, 8, 0, "slurm")),
        (BATCH_SHELL, World()),
        ({**SRUN, "DMI_WORLD": "single"}, World()),
        ({**SRUN, **TORCHRUN}, World(3, 8, 1, 2, 1, "torchrun")),
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
