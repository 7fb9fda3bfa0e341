"""A chain of short jobs that search, on a Slurm of four virtual nodes: bring-up, use, losses.

Starts a Slurm of its own (root, see tests/support/mini_slurm.py). With --evaluations 120 it takes about
eight minutes.

    python benchmarks/launch_slurm.py --evaluations 120 --minutes 2
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from cluster_runs import User, follow, journal, told
from mini_slurm import MiniSlurm, Settings, missing
from runner import toy_data, toy_recipe

from dmi_hpc.sessions import Session

CPUS = 2  # of a virtual node, as many workers


def recipe(folder: Path, evaluations: int, epochs: int) -> Path:
    """Trials that mostly sleep: four virtual nodes share this machine's cores."""
    search = f'evaluations = {evaluations}\ninitial = 8\nworkers = "auto"\n'
    search += "train = { checkpoint_s = 2.0 }"
    path = toy_recipe(
        folder / "toy.toml", toy_data(folder / "data"), 'fault = "slow"', search=search
    )
    path.write_text(path.read_text().replace("\nepochs = 2\n", f"\nepochs = {epochs}\n"))
    return path


def began(run: Path, session: Session) -> float:
    """Seconds from the start of a session to the start of its first trial."""
    tells = [e for e in journal(run, "tell") if session.began < e["time"] <= (session.ended or 0)]
    resumes = {e["id"] for e in tells if e["metrics"].get("resumed_epochs")}
    starts = [e["time"] - e["seconds"] for e in tells if e["id"] not in resumes]
    return min(starts) - session.began if starts else float("nan")


def report(run: Path, sessions: list[Session], workers: int) -> None:
    """One line a session, then the figures of docs/launching.md."""
    tells = journal(run, "tell")
    busy = sum(e["seconds"] for e in (*tells, *journal(run, "left")))
    wall = sum(s.seconds for s in sessions) * workers
    starts = [began(run, s) for s in sessions]
    for session, start in zip(sessions, starts, strict=True):
        took = f"{session.seconds:5.1f} s, first trial after {start:4.1f} s"
        print(f"job {session.job}: {took}, {session.how}")
    counts = Counter(e["id"] for e in tells)
    known = [start for start in starts if start == start]
    print(f"evaluations {len(counts)}, told twice {sum(n > 1 for n in counts.values())}")
    print(f"failed {sum(e['status'] != 'ok' for e in tells)}")
    print(f"first trial after: median {median(known):.1f} s, first session {known[0]:.1f} s")
    print(f"share of wall time in trials: {100 * busy / wall:.1f} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--evaluations", type=int, default=120)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--minutes", type=int, default=2)
    parser.add_argument("--chain", choices=("dependency", "requeue"), default="dependency")
    given = parser.parse_args()
    if why := missing():
        sys.exit(why)
    with (
        MiniSlurm(settings=Settings(cpus=CPUS)) as slurm,
        tempfile.TemporaryDirectory(prefix="launch-slurm-") as name,
    ):
        folder = Path(name)
        user, run = User(slurm, folder), folder / "run"
        file = recipe(folder, given.evaluations, given.epochs)
        words = ("-N", 4, "-t", given.minutes, "--chain", given.chain, "search", file, "--out", run)
        user.launch(*words, TOY_SLOW_S="0.1")
        sessions = follow(slurm, run, 60 * 30)
        if not sessions or sessions[-1].how != "finished":
            sys.exit(told(slurm, run))
        print(f"{slurm.mode}, four nodes of {CPUS} CPUs")
        report(run, sessions, 4 * CPUS)


if __name__ == "__main__":
    main()
