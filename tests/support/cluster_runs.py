"""`dmi launch` on a `mini_slurm.MiniSlurm`, as a user types it; runs followed to their end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runner
from mini_slurm import MiniSlurm

from dmi_hpc.files import read_json_lines
from dmi_hpc.sessions import Session, sessions, submissions

ROOT = Path(__file__).parents[2]


class User:
    """Somebody at the login node. folder: where recipes and runs are; name: None: root, or whoever."""

    def __init__(
        self, slurm: MiniSlurm, folder: Path, name: str | None = None, python: str = sys.executable
    ) -> None:
        self.slurm, self.folder, self.name, self.python = slurm, folder, name, python

    def dmi(self, *arguments: object, code: int = 0, **env: str) -> subprocess.CompletedProcess:
        """`dmi ARGUMENTS` to its end; its exit code is required."""
        paths = [str(runner.SUPPORT)]
        if self.python != sys.executable:
            paths += [str(ROOT), *(one for one in sys.path if one.endswith("site-packages"))]
        done = self.slurm.run(
            *(self.python, "-P", "-m", "dmi_hpc", *arguments),
            user=self.name,
            check=False,
            timeout=runner.LIMIT_S,
            cwd=self.folder,
            env={"PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1", **env},
        )
        said = f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == code, said
        return done

    def launch(self, *arguments: object, **env: str) -> str:
        """Submit `dmi launch -m cpu ARGUMENTS`; the id of the job."""
        said = self.dmi("launch", "-m", "cpu", *arguments, **env).stdout
        assert said.startswith("job "), said
        return said.split()[1]


def noting_recipe(folder: Path, evaluations: int, batch_s: float = 0.03, epochs: int = 10) -> Path:
    """Recipe of a search whose trials note their nodes in folder/seen; the data are there already."""
    seen, data = folder / "seen", folder / "data"
    seen.mkdir()
    search = f'evaluations = {evaluations}\ninitial = 8\nworkers = "auto"'
    task = f'seen = "{seen}"\nbatch_s = {batch_s}'
    path = runner.toy_recipe(folder / "toy.toml", runner.toy_data(data), task, search=search)
    text = path.read_text().replace("toy_task:Toy", "cluster_task:Seen")
    path.write_text(
        text.replace("\nepochs = 2\n", f"\nepochs = {epochs}\ntrain = {{ checkpoint_s = 2.0 }}\n")
    )
    return path


def latest(run: Path) -> str:
    """The job that was submitted last."""
    return submissions(run)[-1].job


def wait_until(
    slurm: MiniSlurm, run: Path, condition: Callable[[], bool], limit_s: float = 120
) -> None:
    """Poll; what the jobs printed is in the failure."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited {limit_s:g} s in vain\n{told(slurm, run)}"
        time.sleep(0.3)


def follow(slurm: MiniSlurm, run: Path, limit_s: float = 240) -> list[Session]:
    """Until no job is left in the queue; requeued ones start soon. All sessions of the run."""

    held: set[str] = set()

    def over() -> bool:
        nonlocal held
        waiting = queue(slurm)
        now = {job for job, state, reason in waiting if (state, reason) == ("PENDING", "BeginTime")}
        for job in now - held:
            slurm.skip_hold(job)
        held = now
        return not waiting

    wait_until(slurm, run, over, limit_s)
    return sessions(run)


def queue(slurm: MiniSlurm) -> list[tuple[str, str, str]]:
    """(job, state, reason) of all that are not over."""
    said = slurm.run("squeue", "-h", "-r", "-o", "%i|%T|%r", check=False)
    assert said.returncode == 0 or "Unable to contact" in said.stderr, said.stderr
    if said.returncode:
        return [("", "UNKNOWN", "")]
    rows = [line.split("|") for line in said.stdout.split("\n") if line]
    return [(job, state, reason) for job, state, reason in rows]


def events(run: Path, job: str) -> list[dict[str, Any]]:
    """What the sessions of a job say of themselves."""
    return read_json_lines(run / "launch" / "jobs" / f"{job}.jsonl")


def journal(run: Path, kind: str, island: str = "") -> list[dict[str, Any]]:
    folder = run / "search" / "islands" / island if island else run / "search"
    path = folder / "journal.jsonl"
    return [e for e in read_json_lines(path) if e["event"] == kind] if path.exists() else []


def assert_each_told_once(run: Path, evaluations: int) -> None:
    """No evaluation was lost, none repeated."""
    told_by_id = Counter(e["id"] for e in journal(run, "tell"))
    networks = Counter(e["hash"] for e in journal(run, "ask"))
    assert len(told_by_id) == evaluations
    assert set(told_by_id.values()) == {1}
    assert set(networks.values()) == {1}
    assert {e["status"] for e in journal(run, "tell")} == {"ok"}


def told(slurm: MiniSlurm, run: Path) -> str:
    """Everything a person would look at."""
    parts = [slurm.run("squeue", "-t", "all", check=False).stdout]
    parts.append(slurm.run("sinfo", "-N", check=False).stdout)
    for path in sorted([*run.glob("logs/*"), *run.glob("launch/jobs/*.jsonl")]):
        parts.append(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}")
    return "\n".join(parts)
