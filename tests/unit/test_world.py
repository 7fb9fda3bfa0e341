import pytest

from dmi_hpc.errors import LaunchError
from dmi_hpc.world import World, detect, slurm_address

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
PMIX = {"PMIX_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.41.0", "PMIX_SERVER_URI41": "pmix-server"}
PALS = {
    "PALS_RANKID": "5",
    "PALS_LOCAL_RANKID": "1",
    "PALS_NODEID": "1",
    "PMI_RANK": "5",
    "PMI_SIZE": "8",
    "PMI_LOCAL_RANK": "1",
    "PMI_LOCAL_SIZE": "4",
}
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
        (PALS, World(5, 8, 1, 4, "pmi")),
        ({**SRUN, **PMIX}, World(5, 8, 1, 8, "slurm")),
        ({**OPENMPI, **PMIX}, World(1, 4, 1, 2, "openmpi")),
        ({**TORCHRUN, **PMIX}, World(3, 8, 1, 2, "torchrun")),  # as a Ray actor sets them
        ({**PMIX, "DMI_WORLD": "single"}, World()),
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


def test_a_rank_of_an_unknown_number_is_refused():
    """PMIx without the launcher's own variables: its size is known to its library alone."""
    with pytest.raises(LaunchError, match=r"rank 1 of a job.*mpirun or srun.*DMI_WORLD=single"):
        detect(PMIX)


STEP = {**SRUN, "SLURM_JOB_ID": "41", "SLURM_STEP_NUM_NODES": "2"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("nid[001204]", "nid001204"),
        ("r1i2n3-ib0,r1i2n4-ib0", "r1i2n3-ib0"),
        ("rack[2-3]-ib", "rack2-ib"),
    ],
)
def test_tasks_of_srun_meet_on_the_first_node_without_mpi(nodes, first):
    env = {**STEP, "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_NODELIST": "other"}
    host, port = slurm_address(detect(env), env).split(":")
    assert host == first
    assert 20_000 <= int(port) < 30_000
    alone = {**env, "SLURM_STEP_NUM_NODES": "1"}
    assert slurm_address(detect(alone), alone) == f"127.0.0.1:{port}"


def test_steps_of_one_job_meet_at_different_ports():
    envs = [{**STEP, "SLURM_STEP_ID": str(step), "SLURM_STEP_NODELIST": "n1"} for step in range(9)]
    assert len({slurm_address(detect(env), env) for env in envs}) == 9


@pytest.mark.parametrize("env", [{}, BATCH_SHELL, OPENMPI, {**SRUN, **PMI}, {**SRUN, **TORCHRUN}])
def test_ranks_that_srun_did_not_start_do_not_meet_by_its_variables(env):
    """mpirun in a job starts its helpers by srun; their variables are not the ranks'."""
    env = {**env, "SLURM_STEP_NODELIST": "n1"}
    assert slurm_address(detect(env), env) is None


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
