"""What runs on each node of an allocation, with a stand-in for Ray: its command, its end, its traces."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dmi_hpc.errors import EXIT_USER_ERROR, LaunchError
from launch import ray_node, ray_start
from launch.network import LOOPBACK
from launch.ray_start import Place, Spec

SPEC = Spec(head="10.1.0.1", port=20_123, nodes=4, cpus=8, gpus=2, token="/run/ray.token")
# starts a child in a session of its own, writes its number, then `then`
STAND_IN = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
open(sys.argv[1], "w").write(str(child.pid))
{then}
"""


def test_spec_is_the_same_after_a_file():
    spec = Spec(**{**SPEC.to_json(), "interfaces": ("hsn0", "eth0")})
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert spec.address == "10.1.0.1:20123"


@pytest.mark.parametrize(
    ("env", "number"),
    [
        ({"SLURM_NODEID": "3"}, 3),
        ({"PALS_NODEID": "2", "PALS_RANKID": "9"}, 2),
        # mpirun in a job of Slurm: its helper on the second node is srun's first task
        ({"OMPI_COMM_WORLD_RANK": "1", "SLURM_NODEID": "0"}, 1),
    ],
)
def test_a_node_knows_its_number_by_its_launcher(env, number):
    assert ray_start.node_number(env) == number


def test_without_a_launcher_there_is_no_number():
    with pytest.raises(LaunchError, match=r"SLURM_NODEID.*one\s+task a node"):
        ray_start.node_number({"SLURM_NODEID": ""})


def test_the_first_node_is_the_head_and_the_others_join_it(tmp_path):
    head = ray_start.command(SPEC, Place(0, "10.1.0.1", tmp_path, 20_124, 20_125))
    node = ray_start.command(SPEC, Place(3, "10.1.0.4", tmp_path))
    assert {"--head", "--port=20123", "--node-ip-address=10.1.0.1"} < set(head)
    assert {"--include-dashboard=false", "--dashboard-host=127.0.0.1"} < set(head)
    assert {"--address=10.1.0.1:20123", "--node-ip-address=10.1.0.4"} < set(node)
    for line in (head, node):
        assert {"--num-cpus=8", "--num-gpus=2", "--object-store-memory=100000000"} < set(line)
        assert not any(part.startswith("--memory") for part in line)
        # inside a folder that is ours alone: Ray opens its own one to everybody
        assert f"--temp-dir={tmp_path}/r" in line
    for option in ("port", "dashboard", "ray-client-server-port"):
        assert not any(part.startswith(f"--{option}") for part in node if "agent" not in part)


def test_every_port_of_a_head_is_its_own_or_the_kernels_choice(tmp_path):
    spec = Spec(**{**SPEC.to_json(), "dashboard": True})
    line = ray_start.command(spec, Place(0, "10.1.0.1", tmp_path, 20_124, 20_125))
    ports = dict(part.removeprefix("--").split("=") for part in line if "port=" in part)
    own = {"port": "20123", "ray-client-server-port": "20124", "dashboard-port": "20125"}
    assert {name: ports.pop(name) for name in own} == own
    assert set(ports.values()) == {"0"}


def test_rays_environment_asks_for_the_token_and_knows_no_rank():
    env = {"RAY_ADDRESS": "elsewhere:1", "ROCR_VISIBLE_DEVICES": "4,5", "PYTHONPATH": "here:/there"}
    found = ray_start.environment(SPEC, env)
    assert "RAY_ADDRESS" not in found
    assert (found["RAY_AUTH_MODE"], found["RAY_AUTH_TOKEN_PATH"]) == ("token", "/run/ray.token")
    assert found["HIP_VISIBLE_DEVICES"] == "0,1"
    assert found["PYTHONPATH"] == f"{Path.cwd()}/here:/there"
    assert found["DMI_WORLD"] == "single"
    own = {**env, "HIP_VISIBLE_DEVICES": "1"}
    assert ray_start.environment(SPEC, own)["HIP_VISIBLE_DEVICES"] == "1"


def test_a_head_elsewhere_than_promised_is_refused(tmp_path):
    with pytest.raises(LaunchError, match=r"to listen at 10\.1\.0\.1, but this first node"):
        ray_node.place_of(SPEC, 0, tmp_path)


def test_a_dashboard_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_node, "DASHBOARD_NEEDS", ("no_such_module",))
    spec = Spec(**{**SPEC.to_json(), "head": LOOPBACK, "dashboard": True})
    with pytest.raises(LaunchError, match=r"no_such_module: pip install 'ray\[default\]'"):
        ray_node.place_of(spec, 0, tmp_path)


def test_folders_of_killed_nodes_go_and_those_of_living_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_node, "ROOT_BYTES", 1000)
    killed = tmp_path / "dmi-ray-killed"
    killed.mkdir()
    (killed / "lock").touch()
    foreign = tmp_path / "dmi-ray-foreign"
    foreign.mkdir()
    with ray_node.private_folder(str(tmp_path)) as one:
        assert one.stat().st_mode & 0o777 == 0o700
        assert not killed.exists()
        with ray_node.private_folder(str(tmp_path)) as other:
            assert one.exists()
            assert other != one
    assert list(tmp_path.iterdir()) == [foreign]


def test_sockets_get_a_path_that_is_short_enough(tmp_path):
    with ray_node.private_folder(str(tmp_path / ("long" * 20))) as folder:
        assert folder.parent == Path("/tmp")


def node(tmp_path, then, number=1):
    """A process of ours, of a Ray that is but a stand-in."""
    with socket.create_server((LOOPBACK, 0)) as free:
        spec = Spec(
            LOOPBACK,
            free.getsockname()[1],
            nodes=2,
            cpus=1,
            gpus=0,
            token=str(tmp_path / "spec.json"),
            temp_root=str(tmp_path),
        )
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_json()))
    (tmp_path / "stand_in.py").write_text(STAND_IN.format(then=then))
    program = (
        "import sys; from launch import ray_node\n"
        f"line = [sys.executable, {str(tmp_path / 'stand_in.py')!r}, {str(tmp_path / 'child')!r}]\n"
        "ray_node.command = lambda *ignored: line\n"
        "ray_node.ROOT_BYTES = 1000\n"
        f"sys.exit(ray_node.main([{str(tmp_path / 'spec.json')!r}]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "SLURM_NODEID": str(number)},
        stderr=subprocess.PIPE,
        text=True,
    )


def child_of(tmp_path):
    """The process that the stand-in has started; None if it is gone."""
    file, end = tmp_path / "child", time.monotonic() + 20
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    number = int(file.read_text())
    return psutil.Process(number) if psutil.pid_exists(number) else None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_leaves_nothing_of_ray(tmp_path, number):
    process = node(tmp_path, "time.sleep(60)")
    child = child_of(tmp_path)
    process.send_signal(number)
    assert process.wait(timeout=5) == 0
    assert process.communicate()[1] == ""
    assert not child.is_running()
    assert not list(tmp_path.glob("dmi-ray-*"))


def test_a_ray_that_ends_by_itself_is_told_with_its_last_words(tmp_path):
    process = node(tmp_path, "sys.exit('no such token')", number=0)
    text = process.communicate(timeout=20)[1]
    assert process.returncode == EXIT_USER_ERROR
    assert "Ray on node 0 (127.0.0.1) ended with exit code 1: no such token\nIts" in text
    assert not child_of(tmp_path)
    assert not list(tmp_path.glob("dmi-ray-*"))


def test_a_node_that_was_taken_for_dead_joins_again_while_there_is_a_head(tmp_path, capfd):
    spec = Spec(LOOPBACK, 0, nodes=2, cpus=1, gpus=0, token="")
    tries = []

    def serve(*given):
        tries.append(given)
        if len(tries) < 3:
            raise LaunchError("node is dead")

    with pytest.MonkeyPatch.context() as patch, socket.create_server((LOOPBACK, 0)) as head:
        patch.setattr(ray_node, "serve", serve)
        spec = Spec(**{**spec.to_json(), "port": head.getsockname()[1]})
        ray_node.keep_joined(spec, Place(1, LOOPBACK, tmp_path), [])
        assert len(tries) == 3
        patch.setattr(ray_node, "JOINS", 1)
        tries.clear()
        with pytest.raises(LaunchError, match="node is dead"):
            ray_node.keep_joined(spec, Place(1, LOOPBACK, tmp_path), [])
    assert "joining it again" in capfd.readouterr().err


def test_a_folder_that_a_node_does_not_see_is_an_error_that_says_so(tmp_path):
    file = tmp_path / "spec.json"
    with pytest.raises(LaunchError, match=r"spec\.json: cannot be read on .*all nodes"):
        ray_node.read_spec(file)
    file.write_text(json.dumps(SPEC.to_json()))
    with pytest.raises(LaunchError, match=r"/run/ray\.token: cannot be read"):
        ray_node.read_spec(file)


def test_a_port_that_is_taken_is_an_error_before_ray_is_started():
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        spec = Spec(LOOPBACK, port, nodes=1, cpus=1, gpus=0, token="")
        with pytest.raises(LaunchError, match=r"cannot listen at 127\.0\.0\.1:"):
            ray_node.require_free(spec)
