"""The command line without any work behind it: help, unknown commands, shadowed packages."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmi_hpc import __version__, cli
from dmi_hpc.errors import DMIError, Interrupted, TrialFailure
from dmi_hpc.watch import say

HEAVY = "torch", "ray", "deepspeed", "numpy", "pydantic"


def run(*arguments, cwd, python=("-P", "-m", "dmi_hpc"), **changes):
    return subprocess.run(
        [sys.executable, *python, *arguments],
        cwd=cwd,
        env={**os.environ, **changes},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(option, tmp_path):
    code = (
        f"import sys; sys.argv = ['dmi', '{option}']; from dmi_hpc.cli import main; main(); "
        f"sys.stdout.write(str([m for m in {HEAVY} if m in sys.modules]))"
    )
    done = run(cwd=tmp_path, python=("-P", "-c", code))
    assert done.returncode == 0
    assert done.stdout.endswith("[]")
    assert (__version__ if option == "--version" else "usage: dmi COMMAND") in done.stdout
    assert all(name in cli.usage() for name in cli.COMMANDS)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["dmi", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_an_unknown_command_lists_the_commands(monkeypatch, capsys):
    assert call(monkeypatch, "trian") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no command 'trian'")
    assert all(name in said for name in cli.COMMANDS)


def test_summaries_of_the_data_tools_fit_80_columns(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert call(monkeypatch, "data", "--help") == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(monkeypatch, capsys, name):
    assert call(monkeypatch, name, "--help") == 0
    said = capsys.readouterr().out
    assert f"dmi {name}" in said
    assert "Usage:" in said


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DMIError("found a, expected b"), 2, "error: found a, expected b\n"),
        (TrialFailure("nan", "loss is nan"), 1, "failed (nan): loss is nan\n"),
        (Interrupted("at epoch 3"), 75, "interrupted: at epoch 3. The same command with --resume"),
    ],
)
def test_exit_codes(monkeypatch, capsys, error, code, said):
    def fail():
        raise error

    monkeypatch.setattr(cli, "check_install", fail)
    assert call(monkeypatch, "info") == code
    assert capsys.readouterr().err.startswith(said)


def test_a_users_search_py_is_no_obstacle(tmp_path):
    """For the console script; tests/integration/test_pipeline.py does so for `-P -m` and Ray."""
    (tmp_path / "search.py").write_text("raise RuntimeError('not this one')")
    script = Path(sys.executable).with_name("dmi")
    done = run(script, "search", "--help", cwd=tmp_path, python=())
    assert done.returncode == 0, done.stderr


def test_a_shadowing_package_is_named(tmp_path):
    other = tmp_path / "launch" / "__init__.py"
    other.parent.mkdir()
    other.write_text("")
    done = run("info", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert f"package 'launch': found {other}" in done.stderr
    assert "Rename that file" in done.stderr
    assert "Traceback" not in done.stderr


def test_results_are_said_in_any_encoding(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("å \udce9")
    assert raw.getvalue() == b"\\xe5 \\udce9\n"


def test_results_that_cannot_be_written_are_a_users_error():
    code = (
        "import sys; from dmi_hpc import cli, watch; sys.argv = ['dmi', 'info']; "
        "cli.check_install = lambda: watch.say('x'); cli.main()"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output: cannot write: [Errno 28]")
    assert "Traceback" not in done.stderr
