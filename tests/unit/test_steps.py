"""Command lines of steps, and the world that each rank is told."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from dmi_hpc.errors import LaunchError
from dmi_hpc.world import World, detect
from launch.allocation import Allocation, cpus_of_slurm, job_id, of_pbs, of_slurm, scheduler_around
from launch.machines import load_machine
from launch.network import free_port, interface_of
from launch.rank import rank_variables, require_size
from launch.steps import Meeting, Step, command_of, per_node, rank_step, step_environment

NODES = Allocation("slurm", "7", ("n1", "n2", "n3", "n4"), cpus=64, gpus=4)


def line(step, machine="cpu", allocation=NODES, env=()):
    return " ".join(command_of(step, allocation, load_machine(machine), dict(env)))


def test_ranks_are_started_with_whole_numbers_and_their_cores():
    step = rank_step(["dmi", "train"], (4, 4), NODES, Meeting("10.0.0.1:20123", ("hsn0", "hsn1")))
    text = line(step)
    assert text.startswith(
        "srun --overlap --nodes=4 --ntasks=16 --ntasks-per-node=4 --cpus-per-task=16"
    )
    assert "--mpi=none" in text
    assert "--no-kill" not in text
    assert text.endswith("--address 10.0.0.1:20123 --interface hsn0 --interface hsn1 -- dmi train")
    assert f"-m launch.rank --size {step.size} " in text


def test_daemons_of_nodes_may_fail_alone():
    text = line(Step(("ray",), 4, 1, 64, "nodes"))
    assert "--no-kill" in text
    assert "--wait" not in text


def test_mpi_ranks_need_the_plugin_of_their_library_or_mpirun():
    step = Step(("dmi", "data"), 4, 1, 64, "mpi")
    assert "--mpi=pmix" in line(step)
    bare = load_machine("cpu").model_copy(update={"mpi": ""})
    words = command_of(step, NODES, bare, {"PYTHONPATH": "/p"})
    assert words[:3] == ["mpirun", "--host", "n1:1,n2:1,n3:1,n4:1"]
    assert words[-4:] == ["-x", "PYTHONPATH", "dmi", "data"]


def test_a_step_larger_than_the_allocation_is_refused():
    with pytest.raises(LaunchError, match="5 nodes in an allocation of 4"):
        line(Step(("dmi",), 5))


@pytest.mark.parametrize(
    ("ranks", "size"), [(None, (4, 2)), (8, (4, 2)), (4, (4, 1)), (3, (3, 1)), (1, (1, 1))]
)
def test_ranks_are_spread_evenly(ranks, size):
    assert per_node(ranks, 4, 2) == size


def test_ranks_that_do_not_divide_are_refused():
    with pytest.raises(LaunchError, match="-n 4"):
        per_node(6, 4, 1)


def test_the_batch_jobs_own_sizes_do_not_reach_srun():
    env = {"SLURM_CPUS_PER_TASK": "64", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7", "A": "b"}
    kept = step_environment(env, root=False)
    assert kept == {"SLURM_JOB_ID": "7", "A": "b", "PYTHONSAFEPATH": "1"}
    assert step_environment({}, root=True)["OMPI_ALLOW_RUN_AS_ROOT"] == "1"


def test_every_rank_is_told_its_world_and_keeps_what_the_user_said():
    world = World(5, 8, 1, 4, "slurm")
    told = rank_variables(world, "10.0.0.1:20123", "hsn0", {"OMP_NUM_THREADS": "3"}, cores=8)
    assert {
        name: told[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    } == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
    }
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("10.0.0.1", "20123")
    assert "OMP_NUM_THREADS" not in told
    assert told["GLOO_SOCKET_IFNAME"] == told["NCCL_SOCKET_IFNAME"] == "hsn0"
    amd = rank_variables(world, "10.0.0.1:1", "hsn0", {"ROCR_VISIBLE_DEVICES": "4,5"}, cores=8)
    assert amd["HIP_VISIBLE_DEVICES"] == "0,1"


def test_what_a_rank_is_told_is_the_world_that_it_finds():
    world = World(1, 2, 0, 1, "slurm")
    found = detect(rank_variables(world, "10.0.0.1:20123", "eth0", {}, cores=8))
    assert (found.rank, found.size, found.source, found.is_bound) == (1, 2, "torchrun", True)


def test_another_world_than_meant_is_refused():
    with pytest.raises(LaunchError, match="4 ranks were to be started"):
        require_size(World(), 4)


def test_the_shim_becomes_the_command_and_says_why_it_cannot():
    code = "import os; print(os.environ['RANK'], os.environ['MASTER_PORT'])"
    shim = [sys.executable, "-P", "-m", "launch.rank", "--address", "127.0.0.1:20123"]
    env = {**os.environ, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}
    env |= {"SLURM_LOCALID": "0"}
    run = [*shim, "--size", "2", "--", sys.executable, "-c", code]
    done = subprocess.run(run, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout == "1 20123\n", done.stderr
    run[run.index("2")] = "4"
    refused = subprocess.run(run, env=env, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: 4 ranks were to be started")


def test_interfaces_are_taken_in_the_order_wanted():
    here = {"hsn1": "10.1.0.7", "eth0": "192.168.0.7", "lo": "127.0.0.1"}
    assert interface_of(("hsn0", "hsn1"), None, here) == ("hsn1", "10.1.0.7")
    assert interface_of((), None, here) == ("hsn1", "10.1.0.7")
    assert interface_of((), "127.0.0.1", here) == ("lo", "127.0.0.1")
    with pytest.raises(LaunchError, match=r"ib0.*hsn1, eth0, lo"):
        interface_of(("ib0",), None, here)


def test_a_port_that_is_taken_is_passed_over():
    import socket

    first = free_port("127.0.0.1", 5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first))
        taken.listen()
        assert free_port("127.0.0.1", 5) != first


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_CPUS_PER_NODE": "64(x3),32",
    "SLURM_JOB_NODELIST": "n[1-4]",
}


def test_an_allocation_of_slurm():
    found = of_slurm({**SLURM, "SLURM_RESTART_COUNT": "2"}, NODES.nodes, 100.0, gpus=8)
    assert found == replace(NODES, cpus=32, gpus=8, restart=2, end=100.0)
    array = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_GPUS": "0,3"}
    found = of_slurm({**SLURM, **array}, NODES.nodes, None, gpus=8)
    assert (found.job, found.task, found.gpus) == ("6_1", "1", 2)
    with pytest.raises(LaunchError, match="heterogeneous"):
        of_slurm({**SLURM, "SLURM_HET_SIZE": "2"}, NODES.nodes, None, gpus=0)
    with pytest.raises(LaunchError, match=r"expected e\.g\."):
        cpus_of_slurm("many")


def test_an_allocation_of_pbs(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("n1\nn1\nn2\n")
    env = {"PBS_JOBID": "12.server", "PBS_NODEFILE": str(nodes)}
    assert scheduler_around(env) == "pbs"
    assert of_pbs(env, None, 32, 4) == Allocation("pbs", "12.server", ("n1", "n2"), 32, 4)
    assert job_id(env) == "12.server"


@pytest.mark.parametrize(
    ("changes", "inside"),
    [
        ({}, "slurm"),
        ({"SLURM_STEP_ID": "4294967291"}, "slurm"),
        ({"SLURM_STEP_ID": "0"}, None),
        ({"SLURM_STEP_ID": "0", "DMI_LAUNCH": "allocation"}, "slurm"),
        ({"DMI_LAUNCH": "local"}, None),
        ({"DMI_WORLD": "single"}, None),
    ],
)
def test_the_place_is_an_allocation_but_in_its_steps(changes, inside):
    assert scheduler_around({**SLURM, **changes}) == inside
