"""Other optimisers on the tables of `search_tables.py`, and the comparison of all with ours.

    python -m venv rivals && rivals/bin/pip install --no-deps -r \\
        benchmarks/searching/requirements-rivals.txt
    PYTHONPATH=. rivals/bin/python benchmarks/search_rivals.py run TABLES RESULTS.jsonl [--arms ...]
    PYTHONPATH=. rivals/bin/python benchmarks/search_rivals.py epochs TABLES RESULTS.jsonl [--arms ...]
    python benchmarks/search_rivals.py compare RESULTS.jsonl ... [--ours ours]

RESULTS gets one line per problem, arm and seed; those it has already are not run again. ``compare``
reads files of this command and of `search_tables.py` together and needs no other libraries.

``epochs`` is the multi-fidelity comparison: the same number of trained epochs, told in full trainings
of 52, for Ray's ASHA on random configurations and for optimisers that train all to the end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from searching import statistics
from searching.rivals import ARMS
from searching.rivals_epochs import EPOCH_ARMS, epoch_line
from searching.tables import Problem, problems, race

EVALUATIONS = 200
FULL_TRAININGS = 100
Line = dict[str, Any]
Job = tuple[str, str, int]  # problem, arm, seed


@cache
def _problems(folder: Path) -> dict[str, Problem]:
    return {problem.name: problem for problem in problems(folder)}


def run(folder: Path, workers: int, job: Job) -> Line:
    """One line of the results."""
    name, arm, seed = job
    problem = _problems(folder)[name]
    optimiser = ARMS[arm](problem, seed)
    found = race(optimiser, problem, workers=workers, evaluations=EVALUATIONS, seed=seed)
    return {
        "problem": name,
        "group": problem.group,
        "arm": arm,
        "seed": seed,
        "workers": workers,
        "best": found.best.tolist(),
        "regret": [problem.regret(score) for score in found.best],
        "optimiser_s": found.optimiser_s,
    }


def run_epochs(folder: Path, workers: int, job: Job) -> Line:
    name, arm, seed = job
    problem = _problems(folder)[name]
    return epoch_line(
        folder / "lcbench.onnx", problem, arm, seed, workers=workers, budget=FULL_TRAININGS
    )


def read(path: Path) -> list[Line]:
    """All lines; the last one is left out if it is not complete."""
    complete, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(text) for text in complete.splitlines()]


def _cut_torn_line(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def run_all(one: Callable[[Job], Line], jobs: list[Job], results: Path, processes: int) -> None:
    """Append a line for every job that `results` does not have."""
    results.touch()
    _cut_torn_line(results)
    done = {(line["problem"], line["arm"], line["seed"]) for line in read(results)}
    wanted = [job for job in jobs if job not in done]
    with ProcessPoolExecutor(processes) as pool, results.open("a", encoding="utf-8") as file:
        for line in pool.map(one, wanted):
            file.write(json.dumps(line) + "\n")
            file.flush()


def _jobs(options: argparse.Namespace) -> list[Job]:
    names = [n for n in _problems(options.tables) if any(n.startswith(p) for p in options.problems)]
    seeds = range(options.first_seed, options.seeds)
    return [(name, arm, seed) for seed in seeds for arm in options.arms for name in names]


def compare(options: argparse.Namespace) -> str:
    lines = [line for path in options.results for line in read(path)]
    if options.arms:
        lines = [line for line in lines if line["arm"] in {options.ours, *options.arms}]
    return statistics.report(lines, options.ours, options.budgets, np.random.default_rng(0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command, arms in (("run", list(ARMS)), ("epochs", list(EPOCH_ARMS))):
        sub = commands.add_parser(command)
        sub.add_argument("tables", type=Path)
        sub.add_argument("results", type=Path)
        sub.add_argument("--arms", nargs="+", choices=arms, default=arms, metavar="NAME")
        prefix = "" if command == "run" else "lcbench"
        sub.add_argument("--problems", nargs="+", default=[prefix], metavar="PREFIX")
        sub.add_argument("--first-seed", type=int, default=0)
        sub.add_argument("--seeds", type=int, default=30)
        sub.add_argument("--workers", type=int, default=16)
        sub.add_argument("--processes", type=int, default=2)
    sub = commands.add_parser("compare")
    sub.add_argument("results", type=Path, nargs="+")
    sub.add_argument("--ours", default="ours", help="the arm that is compared with all others")
    sub.add_argument("--arms", nargs="+", help="only these")
    sub.add_argument("--budgets", type=int, nargs="+", default=[50, 100, 200])
    return parser


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    try:
        if options.command == "compare":
            print(compare(options))
        else:
            one = run if options.command == "run" else run_epochs
            call = partial(one, options.tables, options.workers)
            run_all(call, _jobs(options), options.results, options.processes)
    except FileNotFoundError as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.error(f"{error}; arms and their libraries: searching/requirements-rivals.txt")


if __name__ == "__main__":
    main()
