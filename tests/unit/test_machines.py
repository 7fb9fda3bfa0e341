"""Machines: the built-in files, a user's own, and how a host is recognised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dmi_hpc.errors import LaunchError
from launch.machines import BUILT_IN, Machine, detect_machine, load_machine, machines

NAMES = sorted(path.stem for path in BUILT_IN.glob("*.toml"))


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder of machines: an empty one."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    folder = tmp_path / "config" / "dmi" / "machines"
    folder.mkdir(parents=True)
    return folder


def test_the_machines_that_come_with_it() -> None:
    assert [machine.name for machine in machines()] == NAMES
    assert {"frontier", "perlmutter", "polaris", "aurora", "leonardo", "lumi"} < set(NAMES)
    assert {"gpu", "cpu", "local"} < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_value_has_a_source(name: str) -> None:
    machine = load_machine(name)
    said = machine.model_fields_set - {"name", "origin", "title", "sources"}
    empty = {key for key in said if getattr(machine, key) in ((), {}, None)}
    assert said - empty == set(machine.sources) - empty
    assert all(source.strip() for source in machine.sources.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_of_a_machine_agree(name: str) -> None:
    machine = load_machine(name)
    bins = machine.time_bins
    assert list(bins) == sorted(bins)
    assert not bins or (machine.queue and machine.time_max_s)
    assert all(seconds <= (machine.time_max_s or 0) for _, seconds in bins)
    assert all(nodes <= (machine.nodes_max or 0) for nodes, _ in bins)
    assert (machine.gpu == "none") == (machine.gpus_per_node == 0)
    if machine.cores is not None and machine.cores_per_rank is not None:
        assert machine.cores_per_rank * machine.gpus_per_node <= machine.cores
    assert machine.node_storage or not machine.broadcast
    assert machine.scheduler != "pbs" or machine.chain == "dependency"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(LaunchError, match=r"no machine 'summit'; machines: aurora, cpu, frontier"):
        load_machine("summit")


def test_a_machine_of_ones_own_overrides_single_keys(own: Path) -> None:
    (own / "ours.toml").write_text(
        'extends = "gpu"\ntitle = "ours"\ngpus_per_node = 8\nsources = { gpus_per_node = "counted" }\n'
    )
    machine = load_machine("ours")
    assert (machine.name, machine.origin, machine.gpus_per_node) == ("ours", "ours", 8)
    assert machine.chain == load_machine("gpu").chain
    assert machine.sources["gpus_per_node"] == "counted"
    assert machine.sources["chain"].startswith("general")
    assert machines()[0] == machine


def test_a_machine_of_ones_own_replaces_the_built_in_one_of_its_name(own: Path) -> None:
    (own / "frontier.toml").write_text('extends = "frontier"\nqueue = "extended"\n')
    machine = load_machine("frontier")
    assert (machine.queue, machine.gpus_per_node) == ("extended", 8)
    (own / "perlmutter.toml").write_text('title = "empty"\n')
    assert load_machine("perlmutter-cpu").scheduler == "slurm"  # built on the built-in one


def test_a_machine_by_its_path_is_found_again_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test cluster.toml").write_text('extends = "cpu"\ntitle = "two nodes"\n')
    monkeypatch.chdir(tmp_path)
    machine = load_machine("./test cluster.toml")
    assert machine.name == "test cluster"
    monkeypatch.chdir("/")
    assert load_machine(machine.origin) == machine


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('extends = "cpu"\nmodulles = []', r"unknown key 'modulles'. Did you mean 'modules'"),
        ('title = "a"\nname = "b"', r"key 'name': a machine is named like its file"),
        ('extends = "summit"', r"extends = 'summit': expected another machine, one of: aurora"),
        ('extends = "ours"', r"extends = 'ours': expected another machine"),
        ("extends = 3", r"extends = 3: expected another machine"),
        ('title = "two\\nlines"', r"key 'title': found .* expected text on one line"),
        (
            'extends = "cpu"\ndirectives = ["mem=0"]',
            r"'mem=0', expected an option of the scheduler",
        ),
        ('extends = "cpu"\nenvironment = { "a b" = "c" }', r"key 'environment.a b"),
        ('extends = ["cpu"]', r"extends = \['cpu'\]: expected another machine"),
        ('extends = "cpu"\nsources = "memory"', r"key 'sources': Input should be"),
        ('title = "ours"\nbroadcast = true', r"node_storage does not say where to"),
        ('extends = "frontier"\ncores_per_node = 8', r"cores_reserved is 8 of 8"),
        ("title = ", r"ours.toml: not valid TOML"),
    ],
)
def test_a_file_that_is_no_machine_says_what_is_wrong(own: Path, text: str, message: str) -> None:
    (own / "ours.toml").write_text(text + "\n")
    with pytest.raises(LaunchError, match=message):
        load_machine("ours")


def test_machines_that_extend_each_other_are_refused(own: Path) -> None:
    (own / "a.toml").write_text('extends = "b"\n')
    (own / "b.toml").write_text('extends = "a"\n')
    with pytest.raises(LaunchError, match=r"extends = 'a': expected another machine"):
        load_machine("a")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"none\.toml: cannot read this machine: No such file"):
        load_machine(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("env", "host", "name", "why"),
    [
        ({"NERSC_HOST": "perlmutter"}, "login07", "perlmutter", "NERSC_HOST is 'perlmutter'"),
        ({}, "login02.frontier.olcf.ornl.gov", "frontier", "fits '*.frontier.olcf.ornl.gov'"),
        ({}, "polaris-login-01", "polaris", "the host name 'polaris-login-01' fits"),
        ({}, "aurora-uan-0012", "aurora", "aurora-uan-*"),
        ({}, "lrdn0249", "leonardo", "lrdn"),
        ({"DMI_MACHINE": "lumi", "NERSC_HOST": "perlmutter"}, "x", "lumi", "DMI_MACHINE is 'lumi'"),
    ],
)
def test_a_machine_is_recognised(env: dict[str, str], host: str, name: str, why: str) -> None:
    found = detect_machine(env, host)
    assert found is not None
    assert found[0].name == name
    assert why in found[1]


def test_a_host_that_nothing_names_is_none_of_them() -> None:
    assert detect_machine({"DMI_MACHINE": ""}, "laptop") is None
    with pytest.raises(LaunchError, match="no machine 'elsewhere'"):
        detect_machine({"DMI_MACHINE": "elsewhere"}, "laptop")


def test_the_documentation_explains_every_key_and_names_every_machine() -> None:
    text = (Path(__file__).parents[2] / "docs" / "machines.md").read_text(encoding="utf-8")
    explained = {
        key for line in re.findall(r"^\| (`.*?) \|", text, re.M) for key in line.split("`")
    }
    assert set(Machine.model_fields) - {"name", "origin"} <= explained
    assert set(NAMES) <= explained


def test_ones_own_machine_is_recognised_before_the_one_it_extends(own: Path) -> None:
    (own / "zz.toml").write_text('extends = "frontier"\ntitle = "ours"\n')
    found = detect_machine({}, "login02.frontier.olcf.ornl.gov")
    assert found is not None
    assert found[0].name == "zz"
