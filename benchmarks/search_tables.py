"""The search on exhaustively trained tables and a surrogate of hyper-parameters: normalised regret.

    python benchmarks/search_tables.py TABLES [--seeds 30] [--results FILE.jsonl] [--arms NAME ...]

TABLES is a folder with ``nbgraph_*.h5`` (NAS-Bench-Graph), ``macro_*.h5`` (NAS-Bench-Macro) or
``lcbench.onnx`` (YAHPO). Workers are simulated and asynchronous. Regret = (best of table - found) /
(best - median); lower is better. FILE gets one line per problem, arm and seed; those it has already
are not run again. `search_rivals.py` makes such lines of other optimisers and compares.

Arms: ``ours`` sees what every optimiser sees, named parameters; ``ours+graphs`` the networks behind
them, where they are known (isomorphic ones are one, features are of the graph). The others lack one
part each, or have one that ships switched off.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from searching.ours import Arm, Ours
from searching.tables import Problem, problems, race

BUDGETS = (50, 100, 200)
EVALUATIONS = max(BUDGETS)
ARMS = {
    "ours": Arm(),
    "ours+graphs": Arm(graphs=True),
    "without surrogate": Arm({"surrogate": False}),
    "without exploration": Arm({"exploration": 0.0}),
    "without crossover": Arm({"crossover": 0.0}),
    "shares adapt": Arm({"adaptive": True}),
    "oldest leaves": Arm({"replacement": "age"}),
    "restarts": Arm({"patience": 30}),
    "shares adapt, without surrogate": Arm({"surrogate": False, "adaptive": True}),
    "oldest leaves, without surrogate": Arm({"surrogate": False, "replacement": "age"}),
    "restarts, without surrogate": Arm({"surrogate": False, "patience": 30}),
    "random": Arm({"surrogate": False, "initial": EVALUATIONS}),
}


@cache
def _problems(folder: Path) -> dict[str, Problem]:
    return {problem.name: problem for problem in problems(folder)}


def run(folder: Path, workers: int, job: tuple[str, str, int]) -> dict[str, Any]:
    """One line of the results. job: problem, arm, seed."""
    name, arm, seed = job
    problem = _problems(folder)[name]
    found = race(
        Ours(problem, ARMS[arm], seed), problem, workers=workers, evaluations=EVALUATIONS, seed=seed
    )
    # an exhausted space has nothing better to offer
    best = np.append(found.best, np.full(EVALUATIONS - len(found.best), found.best[-1]))
    return {
        "problem": name,
        "group": problem.group,
        "arm": arm,
        "seed": seed,
        "workers": workers,
        "best": best.tolist(),
        "regret": [problem.regret(score) for score in best],
        "optimiser_s": found.optimiser_s,
    }


def read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Mean regret over seeds of every problem and over problems of every group; ms per proposal."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        for where in (line["problem"], f"all {line['group']}"):
            found.setdefault((where, line["arm"]), []).append(line)
    rows = [f"| problem | arm | {' | '.join(map(str, BUDGETS))} | ms | runs |", "|---" * 7 + "|"]
    for (where, arm), group in sorted(found.items()):
        means = np.mean([[line["regret"][b - 1] for b in BUDGETS] for line in group], axis=0)
        spent = 1e3 * np.mean([line["optimiser_s"] for line in group]) / EVALUATIONS
        cells = [*(f"{mean:.3f}" for mean in means), f"{spent:.1f}", str(len(group))]
        rows.append(f"| {where} | {arm} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tables", type=Path)
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    try:
        names = list(_problems(options.tables))
    except FileNotFoundError as error:
        parser.error(str(error))
    lines = read(options.results) if options.results else []
    done = {(line["problem"], line["arm"], line["seed"]) for line in lines}
    jobs = [
        (name, arm, seed) for arm in options.arms for seed in range(options.seeds) for name in names
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        one = partial(run, options.tables, options.workers)
        for line in pool.map(one, [job for job in jobs if job not in done]):
            lines.append(line)
            if options.results:
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
