"""The small Slurm itself does what the other tests of this folder rely on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mini_slurm
import pytest
from mini_slurm import until

pytestmark = pytest.mark.slow

SLEEP = "#!/bin/bash\nexec sleep 60\n"


def test_every_node_answers_with_its_own_name(slurm):
    names = slurm.run("srun", "-N4", "bash", "-c", "echo $SLURMD_NODENAME").stdout.split()
    assert sorted(names) == [f"node{k}" for k in range(1, 5)]


def test_nodes_of_their_own_network_are_machines_of_their_own(nodes):
    seen = nodes.run(
        "srun", "-N4", "bash", "-c", "hostname; hostname -I; ls /proc | grep -c ^[0-9]"
    )
    words = seen.stdout.split()
    assert {"node1", "node4", nodes.address(1), nodes.address(4)} <= set(words)
    assert len({word for word in words if word.startswith("10.")}) == 4
    pair = nodes.run(
        "srun", "-N2", "-n2", "--nodelist=node1,node2", "getent", "ahostsv4", "node4"
    ).stdout
    assert set(pair.split()) >= {nodes.address(4), "node4"}


def test_a_crashed_node_is_noticed_and_its_job_requeued(nodes, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(SLEEP)
    job = nodes.run("sbatch", "--parsable", "-N2", "-w", "node2,node3", script).stdout.strip()
    until(lambda: nodes.state(job) == "RUNNING", "the job does not run")
    nodes.node(3).crash()
    until(lambda: nodes.state(job) == "PENDING", "the job was not requeued", limit_s=60)
    assert nodes.idle() == 3
    nodes.node(3).start()
    nodes.skip_hold(job)
    until(lambda: nodes.state(job) == "RUNNING", "the job does not run again", limit_s=60)


def test_a_job_outlives_a_restart_of_the_controller(slurm):
    with subprocess.Popen(["srun", "sleep", "60"], env=slurm.env, stderr=subprocess.PIPE) as job:
        until(lambda: slurm.idle() == 3, "the job does not run")
        slurm.restart_controller(0.5)
        until(lambda: slurm.idle() == 3, "the controller does not know its nodes")
        [number] = slurm.run("squeue", "-h", "-o", "%i").stdout.split()
        assert slurm.state(number) == "RUNNING"
        slurm.run("scancel", number)
        job.communicate(timeout=30)


def test_users_have_jobs_of_their_own(slurm):
    if not slurm.users:
        pytest.skip("only root can make users")
    ada, bob = slurm.users
    said = slurm.run("srun", "-N2", "id", "-un", user=ada, cwd=Path("/")).stdout
    assert said.split() == [ada, ada]
    with subprocess.Popen(
        ["srun", "sleep", "60"], env=slurm.env, user=ada, group=ada, cwd="/"
    ) as job:
        until(lambda: slurm.idle() == 3, "the job does not run")
        number = slurm.run("squeue", "-h", "-o", "%i").stdout.strip()
        refused = slurm.run("scancel", number, user=bob, check=False, cwd=Path("/"))
        assert "Access/permission denied" in refused.stderr
        slurm.run("scancel", number, user=ada, cwd=Path("/"))
        assert job.wait(30) != 0


def test_nothing_outlives_the_one_who_started_it(tmp_path):
    """Killed at a stroke; the next cluster of that number removes what no process holds."""
    if (why := mini_slurm.missing()) is not None:
        pytest.skip(why)
    root = tmp_path / "slurm"
    here = [sys.executable, mini_slurm.__file__, "--root", str(root), "--nodes", "1"]
    with subprocess.Popen(here, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout.readline().startswith(f"export SLURM_CONF={root}/slurm.conf")
        owner.kill()
    end = time.monotonic() + 10
    while left := processes_of(root):
        assert time.monotonic() < end, left
        time.sleep(0.1)
    with subprocess.Popen(here, stdout=subprocess.PIPE, text=True) as again:
        assert again.stdout.readline().startswith("export")
        again.send_signal(signal.SIGINT)
        assert again.wait(30) == 0
    assert not processes_of(root)


def processes_of(root):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "environ").read_bytes()
        except OSError:
            continue
        if f"SLURM_CONF={root}/".encode() in text and int(folder.name) != os.getpid():
            found.append(folder.name)
    return found
