"""Trainings on ranks: a signal to one of them, a job that ends, a rank that dies or stands still."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runner import (
    assert_gone,
    command,
    ended,
    environment,
    family,
    members,
    start,
    toy_data,
    toy_recipe,
    wait_for,
)

from dmi_hpc.files import read_json_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
MPIRUN = Path(sys.executable).with_name("mpirun")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def job(data, tmp_path):
    """A training that would go on for long: its command, and its run folder."""
    recipe = toy_recipe(tmp_path / "toy.toml", data, 'fault = "slow"', train="epochs = 10000")
    return ("train", recipe, "--out", tmp_path / "run"), tmp_path / "run"


def has_begun(run):
    return any(line["kind"] == "step" for line in read_json_lines(run / "train" / "metrics.jsonl"))


def status(run):
    return json.loads((run / "train" / "status.json").read_text())


def rank(process, number, name="RANK"):
    """The process that is this rank among those of a launcher."""

    def is_it(member):
        return member.environ().get(name) == str(number) and "dmi_hpc" in member.cmdline()

    return members(process, is_it)[0]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(job, tmp_path):
    arguments, run = job
    process = start("launch", *arguments, "-n", 3, cwd=tmp_path)
    wait_for(lambda: has_begun(run), process)
    ranks = family(process)
    rank(process, 1).send_signal(signal.SIGUSR1)
    said = [ended(process, 75), *((run / "logs" / f"rank-{r}.log").read_text() for r in (1, 2))]
    steps = {re.search(r"interrupted: .*epoch (\d+), step (\d+)", text).groups() for text in said}
    assert len(steps) == 1
    assert_gone(ranks)
    assert status(run) == {"state": "interrupted"}
    assert (run / "train" / "checkpoints" / f"step-{int(steps.pop()[1]):08d}").is_dir()


def test_the_end_of_the_slurm_job_is_met_with_a_checkpoint(job, tmp_path):
    arguments, run = job
    begun = time.time()
    process = start("launch", *arguments, "-n", 2, cwd=tmp_path)
    wait_for(lambda: has_begun(run), process)
    starting_s = time.time() - begun  # on this machine
    process.send_signal(signal.SIGTERM)
    ended(process, 75)
    shutil.rmtree(run)
    end = int(time.time() + 15 + 2 * starting_s)  # 10 s are kept for a checkpoint
    process = start("launch", *arguments, "-n", 2, cwd=tmp_path, SLURM_JOB_END_TIME=str(end))
    ended(process, 75)
    assert time.time() < end
    assert status(run) == {"state": "interrupted"}
    assert list((run / "train" / "checkpoints").glob("step-*"))


def test_the_survivors_of_a_killed_rank_name_it(job, tmp_path):
    arguments, run = job
    given = {"DMI_COLLECTIVE_TIMEOUT_S": "20"}
    process = start("launch", *arguments, "-n", 3, cwd=tmp_path, **given)
    wait_for(lambda: has_begun(run), process)
    ranks = family(process)
    rank(process, 1).kill()
    said = ended(process, 2)
    assert "rank 1 of 3 was killed by signal 9" in said
    assert "rank 0 lost another rank: rank 1 " in said
    assert "rank 2 lost another rank: rank 1 " in (run / "logs" / "rank-2.log").read_text()
    assert_gone(ranks)
    assert status(run)["state"] == "failed"


def test_a_rank_that_stands_still_ends_the_job_under_mpirun(job, tmp_path):
    arguments, run = job
    process = subprocess.Popen(
        [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2", *command(*arguments)],
        cwd=tmp_path,
        env=environment(DMI_COLLECTIVE_TIMEOUT_S="6"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(lambda: has_begun(run), process)
    ranks = family(process)
    os.kill(rank(process, 1, "OMPI_COMM_WORLD_RANK").pid, signal.SIGSTOP)
    assert "rank 0 lost another rank: rank 1 " in ended(process, 69)
    assert_gone(ranks)
