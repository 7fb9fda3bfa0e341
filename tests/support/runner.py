"""Real `dmi` processes for tests: bounded in time, output kept, nothing of this process shared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
LIMIT_S = 150

TOY = """\
seed = 3
[task]
name = "toy_task:Toy"
{task}
[data]
rows_per_shard = 64
processes = 1
[train]
epochs = 6
batch_size = 20
learning_rate = 1e-2
patience = 50
threads = 1
{train}
[search]
evaluations = 10
initial = 5
population = 6
epochs = 2
workers = 2
{search}
{more}
"""


def toy_recipe(folder: Path, task: str = "", train: str = "", search: str = "", more: str = "") -> Path:
    """A recipe of the toy task in `folder`; its run goes to folder/run by convention of the tests."""
    path = folder / "toy.toml"
    path.write_text(TOY.format(task=task, train=train, search=search, more=more))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-P", "-m", "dmi_hpc", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with the toy task importable and one thread a process."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "OMPI_"))}
    return {**base, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1", **changes}


def dmi(*arguments: object, cwd: Path, code: int = 0, **changes: str) -> subprocess.CompletedProcess:
    """Run `dmi ARGUMENTS` to its end and require its exit code."""
    done = subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def start(*arguments: object, cwd: Path, **changes: str) -> subprocess.Popen:
    """Start `dmi ARGUMENTS` in a session of its own, to be interrupted."""
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
