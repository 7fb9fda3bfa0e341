"""A search on a real Ray of several nodes, all on this machine: they start together, and one dies."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from runner import assert_gone, ended, environment, family, start, toy_data, toy_recipe, wait_for

from dmi_hpc.files import read_json_lines
from launch.network import LOOPBACK, free_port, interface_of
from launch.ray_node import Spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NODES = 2
TRIALS = 12


@pytest.fixture
def spec(tmp_path):
    """Of two nodes of one CPU each; on this machine they share its address."""
    _, address = interface_of((), None)
    if address == LOOPBACK:
        pytest.skip("this machine has no address besides loopback, which Ray would not use")
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with TemporaryDirectory(prefix="dmi-") as folder:
        yield Spec(
            head=address,
            port=free_port(address, os.getpid()),
            nodes=NODES,
            cpus=1,
            gpus=0,
            token=str(token),
            temp_root=folder,
        )


def start_nodes(spec, tmp_path):
    """The processes of the nodes, as srun starts them: one each."""
    file = tmp_path / "spec.json"
    file.write_text(json.dumps(spec.to_json()))
    for number in range(NODES):
        with (tmp_path / f"node-{number}.log").open("wb") as log:
            yield subprocess.Popen(
                [sys.executable, "-P", "-m", "launch.ray_node", str(file)],
                env=environment(SLURM_NODEID=str(number), TOY_SLOW_S="0.15"),
                stderr=log,
            )


@pytest.fixture
def nodes(spec, tmp_path):
    processes = list(start_nodes(spec, tmp_path))
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def events(run, kind):
    return [e for e in read_json_lines(run / "search" / "journal.jsonl") if e["event"] == kind]


def test_a_search_uses_all_nodes_and_survives_the_loss_of_one(spec, nodes, tmp_path):
    """The search starts at the same moment as the nodes; the one that is killed is not the head."""
    text = f'evaluations = {TRIALS}\ninitial = {TRIALS}\nworkers = "auto"'
    recipe = toy_recipe(
        tmp_path / "toy.toml", toy_data(tmp_path / "data"), 'fault = "slow"', search=text
    )
    run = tmp_path / "run"
    search = start(
        *("search", recipe, "--out", run),
        cwd=tmp_path,
        RAY_ADDRESS=spec.address,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=spec.token,
        GRPC_DNS_RESOLVER="native",
        DMI_RAY_NODES=str(NODES),
    )
    journal = run / "search" / "journal.jsonl"
    wait_for(lambda: journal.exists() and len(events(run, "tell")) >= 3, search)
    lost = family(nodes[1])
    assert any(process.name() == "raylet" for process in lost)
    nodes[1].kill()
    assert_gone(lost, limit_s=5)
    said = ended(search, 0)
    assert "2 workers" in said
    assert [e["workers"] for e in events(run, "workers")] == [1]
    asks, tells = events(run, "ask"), events(run, "tell")
    assert len({e["id"] for e in asks}) == len(asks) == len(tells) == TRIALS
    assert {e["status"] for e in tells} == {"ok"}
    rest = family(nodes[0])
    nodes[0].terminate()
    assert nodes[0].wait(timeout=5) == 0
    assert_gone(rest, limit_s=1)
    assert len(list(Path(spec.temp_root).iterdir())) == 1  # of the node that was killed
    assert (tmp_path / "node-0.log").read_text() == ""
