"""Stop signals in the seconds before a training begins: imports, the meeting of the ranks, the data."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from runner import (
    UNHURRIED,
    assert_gone,
    dmi,
    ended,
    environment,
    epochs_told,
    family,
    start,
    toy_data,
    toy_recipe,
    wait_for,
)

from search.trials.rank_trial import reserved_address

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EARLY = "stopped by {} before the first step, no checkpoint was touched"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def job(data, tmp_path):
    """A training that would go on for long: its command, and its run folder."""
    recipe = toy_recipe(tmp_path / "toy.toml", data, 'fault = "slow"', train="epochs = 10000")
    return ("train", recipe, "--out", tmp_path / "run"), tmp_path / "run"


def catches(pid, number):
    """True once the process has a handler for this signal."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def rank(process, number):
    """The process of this rank once `dmi launch` has started it, else None."""
    found = (p for p in family(process) if p.environ().get("RANK") == str(number))
    try:
        return next(found, None)
    except psutil.NoSuchProcess:  # it was about to become dmi
        return None


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_libraries_load_ends_in_one_line(job, tmp_path, number):
    arguments, run = job
    process = start(*arguments, cwd=tmp_path)
    wait_for(lambda: catches(process.pid, number), process)
    process.send_signal(number)
    line = f"interrupted: {EARLY.format(number.name)}. The same command with --resume continues\n"
    assert ended(process, 75) == line
    assert not run.exists()


@pytest.mark.parametrize("delay_s", [0.8, 1.6, 2.4])
def test_a_signal_at_any_moment_of_the_start_ends_in_order(job, tmp_path, delay_s):
    """The last ones may find a training under way."""
    arguments, run = job
    process = start(*arguments, "--resume", cwd=tmp_path)
    wait_for(lambda: catches(process.pid, signal.SIGTERM), process)
    time.sleep(delay_s)
    process.send_signal(signal.SIGTERM)
    said = ended(process, 75)
    assert said.count("interrupted: stopped ") == 1
    assert "Traceback" not in said
    assert not (run / "train" / ".lock").exists()


def test_a_resumed_training_stopped_early_has_its_checkpoint_and_continues(data, tmp_path):
    recipe, run = toy_recipe(tmp_path / "toy.toml", data, 'fault = "slow"'), tmp_path / "run"
    process = start("train", recipe, "--out", run, cwd=tmp_path, **UNHURRIED)
    wait_for(lambda: len(epochs_told(run)) >= 1, process)
    process.send_signal(signal.SIGTERM)
    ended(process, 75)
    before = contents(run / "train")
    process = start("train", recipe, "--out", run, "--resume", cwd=tmp_path)
    wait_for(lambda: catches(process.pid, signal.SIGTERM), process)
    process.send_signal(signal.SIGTERM)
    assert EARLY.format("SIGTERM") in ended(process, 75)
    assert contents(run / "train") == before
    dmi("train", recipe, "--out", run, "--resume", cwd=tmp_path)
    assert sorted({line["epoch"] for line in epochs_told(run)}) == list(range(6))


def test_a_signal_while_the_launcher_loads_ends_in_order(job, tmp_path):
    """tests/unit/test_launch.py has that no rank is started then; a slow machine may be later."""
    arguments, run = job
    process = start("launch", *arguments, "-n", 2, cwd=tmp_path)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "pydantic_core" in maps.read_text(), process)  # of the first to be imported
    process.send_signal(signal.SIGTERM)
    said = ended(process, 75)
    assert said.count("launch stopped: finished parts are kept") == 1
    assert "Traceback" not in said
    assert not (run / "train").exists()


def test_an_early_signal_to_one_rank_stops_all(job, tmp_path):
    arguments, run = job
    process = start("launch", *arguments, "-n", 2, cwd=tmp_path)
    wait_for(lambda: rank(process, 1) is not None, process)
    ranks, other = family(process), rank(process, 1)
    wait_for(lambda: catches(other.pid, signal.SIGUSR1), process)
    other.send_signal(signal.SIGUSR1)
    line = f"interrupted: {EARLY.format('SIGUSR1')}\n"
    assert line in ended(process, 75)
    assert (run / "logs" / "rank-1.log").read_text() == line
    assert_gone(ranks)
    assert not (run / "train").exists()


def test_a_second_interrupt_ends_a_rank_that_waits_for_another(job, tmp_path):
    """The other never comes: the main thread is within the rendezvous, and runs no handlers."""
    arguments, run = job
    with reserved_address("127.0.0.1") as url:
        port = url.rpartition(":")[2]
        world = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = start(*arguments, cwd=tmp_path, **world)
        wait_for(lambda: listens(process.pid, int(port)), process)
        for _ in range(2):
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
        assert EARLY.format("SIGINT") in ended(process, 75)
    assert not run.exists()


def listens(pid, port):
    sockets = psutil.Process(pid).net_connections("tcp")
    return any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets)


BUSY = """\
import time
from dmi_hpc.watch import leaving_in_time, stop_on_signals

with stop_on_signals(), leaving_in_time(0.2):
    print("here", flush=True)
    while True:
        time.sleep(1)
"""


def test_a_process_that_comes_to_nothing_after_a_signal_leaves_in_time():
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", BUSY],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGTERM)
    assert EARLY.format("SIGTERM") in ended(process, 75)
