"""A packed environment works where it is unpacked; what machines and packs look like to a user."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from dmi_hpc.errors import LaunchError, RunError
from launch.machine_tools import listing, machines, pack
from launch.machines import BUILT_IN, load_machine
from launch.machines import machines as all_machines
from launch.pack import pack as write_pack
from launch.pack import tidy_command


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment with one module."""
    prefix = tmp_path / "my env"
    command = [sys.executable, "-m", "venv", "--without-pip", str(prefix)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    (package,) = prefix.glob("lib/python*/site-packages")
    (package / "marker.py").write_text("VALUE = 7\n")
    return prefix


@pytest.fixture(autouse=True)
def no_machines_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_a_packed_environment_runs_where_it_is_unpacked(environment: Path, tmp_path: Path) -> None:
    archive = write_pack(tmp_path / "out" / "env.tar.gz", environment)
    node = tmp_path / "node"
    node.mkdir(mode=0o700)
    subprocess.run(["tar", "-xzf", archive, "-C", node], check=True, timeout=60)
    code = "import marker, sys; print(marker.VALUE, sys.prefix)"
    ran = subprocess.run(
        [node / "bin" / "python", "-I", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ran.stdout == f"7 {node}\n"
    assert node.stat().st_mode & 0o777 == 0o700


def test_an_archive_within_the_environment_does_not_hold_itself(environment: Path) -> None:
    for _ in range(2):  # the second time the first one is there
        archive = write_pack(environment / "env.tar.gz", environment)
    with tarfile.open(archive) as stream:
        members = stream.getmembers()
    assert not [member.name for member in members if "tar.gz" in member.name]
    assert {(member.uid, member.uname) for member in members} == {(0, "")}


def test_what_is_no_environment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"expected a virtual environment, or one of conda"):
        write_pack(tmp_path / "env.tar.gz", Path("/usr"))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file: cannot write"):
        write_pack(tmp_path / "file" / "env.tar.gz", environment)


def test_only_what_was_unpacked_is_tidied_up() -> None:
    folder = {"DMI_NODE_ENVIRONMENT": "/tmp/dmi-7"}
    assert tidy_command(folder) == ("rm", "-rf", "--", "/tmp/dmi-7")
    assert tidy_command({}) == tidy_command({"DMI_NODE_ENVIRONMENT": "/home"}) == ()


# what users see


def shown(*arguments: str) -> Result:
    app = typer.Typer(rich_markup_mode=None)
    app.command()(machines)
    app.command()(pack)
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def test_the_list_names_every_machine_within_80_columns() -> None:
    stream = io.StringIO()
    Console(width=80, file=stream).print(listing(all_machines()))
    text = stream.getvalue()
    for path in BUILT_IN.glob("*.toml"):
        assert f"\n{path.stem} " in text
    assert "dependency" in text and "9,472" in text


def test_the_list_says_where_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMI_MACHINE", "lumi")
    assert "here: lumi, DMI_MACHINE is 'lumi'" in shown("machines").output
    monkeypatch.setenv("DMI_MACHINE", "")
    monkeypatch.setattr("socket.gethostname", lambda: "laptop")
    assert "none of them is recognised here" in shown("machines").output


@pytest.mark.parametrize("name", [path.stem for path in BUILT_IN.glob("*.toml")])
def test_a_machine_shows_its_values_and_their_sources(name: str) -> None:
    text = shown("machines", name).output
    machine = load_machine(name)
    assert machine.title.split()[0] in text
    for key in machine.sources:
        assert f"\n{key} " in text or getattr(machine, key) in (None, (), {})
    assert json.loads(shown("machines", name, "--json").output) == machine.model_dump(mode="json")


def test_packing_says_what_to_do_with_the_file(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(environment))
    target = tmp_path / "env.tar.gz"
    text = shown("pack", str(target)).output
    assert f"{target}: " in text
    assert f"give jobs --packed {target}" in text
    assert target.is_file()
