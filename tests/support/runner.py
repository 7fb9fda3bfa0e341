"""Real `dmi` processes for tests: bounded in time, output kept, nothing of this process shared."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from dmi_hpc.config import DataConfig
from dmi_hpc.data.build import Alone
from dmi_hpc.files import read_json_lines
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import BuildContext

SUPPORT = Path(__file__).parent
LIMIT_S = 150
# of a process with the fault "slow" that is to be stopped midway: who watches it on a busy machine may
# look away for a second
UNHURRIED = {"TOY_SLOW_S": "0.08"}

TOY = """\
seed = {seed}
[task]
name = "toy_task:Toy"
{task}
[data]
rows_per_shard = 64
processes = 1
{data}
[train]
{train}
batch_size = 20
learning_rate = 1e-2
threads = 1
[search]
{search}
population = 6
epochs = 2
"""


def toy_recipe(
    path: Path,
    data: Path | None = None,
    task: str = "",
    train: str = "epochs = 6",
    search: str = "evaluations = 6\ninitial = 4\nworkers = 2",
    seed: int = 3,
) -> Path:
    """Write the recipe `path` of the toy task: lines of its tables, and data from elsewhere."""
    where = f'path = "{data}"' if data else ""
    path.write_text(TOY.format(task=task, data=where, train=train, search=search, seed=seed))
    return path


def toy_data(target: Path) -> Path:
    """The shard set that the toy recipe would build, made in this process."""
    context = BuildContext(DataConfig(rows_per_shard=64), 3, Alone(), 1, lambda rows: None)
    make_task({"name": "toy_task:Toy"}).build_data(target, context)
    return target


def epochs_told(run: Path) -> list[dict]:
    """Records of finished epochs of the training in a run folder, as they were told."""
    lines = read_json_lines(run / "train" / "metrics.jsonl")
    return [line for line in lines if line["kind"] == "epoch"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-P", "-m", "dmi_hpc", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment with the toy task importable and one thread a process."""
    base = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "OMPI_"))}
    return {**base, "PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1", **changes}


def dmi(
    *arguments: object, cwd: Path, code: int = 0, **changes: str
) -> subprocess.CompletedProcess:
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


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen, limit_s: float = LIMIT_S
) -> None:
    """Poll until `condition` holds; a failure if `process` ends first, or after `limit_s`."""
    end = time.monotonic() + limit_s
    while not condition():
        code = process.poll()
        assert code is None, f"ended with {code} before time\n{process.communicate()}"
        assert time.monotonic() < end, f"waited {limit_s} s in vain"
        time.sleep(0.02)


def ended(process: subprocess.Popen, code: int) -> str:
    """What a started process wrote to stderr, once it ended with `code`."""
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return err


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """All processes that a started one has started, and those have."""
    return psutil.Process(process.pid).children(recursive=True)


def members(
    process: subprocess.Popen, condition: Callable[[psutil.Process], bool]
) -> list[psutil.Process]:
    """Those of its family for which it holds; one that ends meanwhile is none of them."""
    found = []
    for member in family(process):
        with suppress(psutil.NoSuchProcess):
            if condition(member):
                found.append(member)
    return found


def assert_gone(processes: Sequence[psutil.Process], limit_s: float = 60) -> None:
    """None of them may live longer than `limit_s`."""
    end = time.monotonic() + limit_s
    while alive := [p for p in processes if _alive(p)]:
        assert time.monotonic() < end, f"left behind: {alive}"
        time.sleep(0.1)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
