"""How much of the workers' time a search through Ray Tune uses: sleeping trials, one worker a core.

    python benchmarks/search_utilisation.py [--trials 120] [--seconds 2] [--arms stock,ours]

Trials sleep for log-normal times (sigma 0.5, mean --seconds); each arm gets the same ones in the
same order. stock: a Tuner with a custom Searcher (random suggestions) as Ray's documentation has it;
limited: with max_concurrent_trials; reuse: with reuse_actors too; genetic: as reuse, with our
GeneticSearch; ours: the runner of `dmi search`, journal and SVM included.

Utilisation is the time slept, over workers x wall time: `whole` from the call to its return, with the
start of actors and the idle end of the last trials; `steady` from the first start to the start of the
last trial, all of it within.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ARMS = ("stock", "limited", "reuse", "genetic", "ours")
SIGMA = 0.5
TOY = Path(__file__).parents[1] / "tests" / "support"


def durations(count: int, mean_s: float) -> list[float]:
    """Log-normal seconds."""
    normal = np.random.default_rng(0).normal(size=count)
    return [float(s) for s in mean_s * np.exp(SIGMA * normal - SIGMA**2 / 2)]


@dataclass
class Sleeper:
    """Sleeps for the next duration in line, and writes down when. Shared by all workers."""

    folder: str
    seconds: list[float]

    def __call__(self) -> float:
        started = time.time()
        seconds = self.seconds[self._next()]
        time.sleep(seconds)
        with Path(self.folder, "log").open("a") as log:
            log.write(f"{started} {time.time()}\n")
        return seconds

    def _next(self) -> int:
        """A number nobody else has: whoever makes the file has it."""
        for number in range(len(self.seconds)):
            try:
                Path(self.folder, str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            return number
        raise SystemExit("more trials than durations")


def by_tuner(arm: str, sleeper: Sleeper, workers: int) -> None:
    import ray
    from ray import tune

    class Random(tune.search.Searcher):
        def __init__(self) -> None:
            super().__init__()
            self._rng = np.random.default_rng(0)

        def set_search_properties(self, metric, mode, config, **spec):
            return True

        def suggest(self, trial_id):
            return {"x": float(self._rng.random())}

        def on_trial_complete(self, trial_id, result=None, error=False):
            return None

        def save(self, checkpoint_path):
            return None

    def sleep(config):
        tune.report({"error": sleeper()})

    from search.genetic_search import GeneticSearch

    ray.init(address="local", num_cpus=workers, include_dashboard=False, logging_level="ERROR")
    searcher = GeneticSearch(seed=1) if arm == "genetic" else Random()
    tuner = tune.Tuner(
        sleep,
        param_space={"x": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            metric="error",
            mode="min",
            num_samples=len(sleeper.seconds),
            max_concurrent_trials=None if arm == "stock" else workers,
            reuse_actors=arm in ("reuse", "genetic"),
        ),
        run_config=tune.RunConfig(storage_path=f"{sleeper.folder}/ray", verbose=0),
    )
    timed(sleeper, tuner.fit)
    ray.shutdown()


def by_slots(sleeper: Sleeper, workers: int) -> None:
    sys.path.insert(0, str(TOY))
    from dmi_hpc.config import load_recipe
    from dmi_hpc.tasks import make_task
    from search.cluster.environment import ray_environment, with_absolute_import_paths
    from search.driver import Driver

    path = Path(sleeper.folder, "toy.toml")
    path.write_text(
        '[task]\nname = "toy_task:Toy"\n[search]\n'
        f"workers = {workers}\nevaluations = {len(sleeper.seconds)}\n"
    )
    recipe = load_recipe(path)
    with_absolute_import_paths()
    with ray_environment() as folder:
        from search.cluster.tune import TrialContext, cluster, run_trials
        from search.evolution.evolve import Success
        from search.trials.trial import TrialOutcome

        class Asleep:
            spent = False

            def __call__(self, genome, assignment=None):
                seconds = sleeper()
                return TrialOutcome(Success(seconds), seconds, {})

        class Context(TrialContext):
            def evaluator(self):
                return Asleep()

        home = Path(sleeper.folder, "search")
        home.mkdir()
        driver = Driver(recipe, make_task(recipe.task).space(), home)
        with cluster(recipe.search, folder) as found:
            driver.start(found.workers, found.trial_memory_GB)
            context = Context(recipe, home, folder, found.trial_memory_GB)
            timed(sleeper, lambda: run_trials(driver, context, found, _nothing, lambda: False))


def _nothing() -> None:
    pass


def timed(sleeper: Sleeper, run) -> None:
    started = time.time()
    run()
    Path(sleeper.folder, "wall").write_text(f"{started} {time.time()}")


def judged(folder: Path, workers: int) -> dict[str, float]:
    """What the log of an arm says."""
    slept = np.loadtxt(folder / "log", ndmin=2)
    started, ended = np.loadtxt(folder / "wall")
    busy = (slept[:, 1] - slept[:, 0]).sum()
    first, last = slept[:, 0].min(), slept[:, 0].max()
    within = np.clip(slept, first, last)
    steady = (within[:, 1] - within[:, 0]).sum() / (workers * (last - first))
    return {
        "trials": len(slept),
        "wall_s": ended - started,
        "whole": busy / (workers * (ended - started)),
        "steady": steady,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--arm", help="of this process, with --folder")
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    seconds = durations(arguments.trials, arguments.seconds)
    if arguments.arm:
        sleeper = Sleeper(arguments.folder, seconds)
        if arguments.arm == "ours":
            by_slots(sleeper, arguments.workers)
        else:
            by_tuner(arguments.arm, sleeper, arguments.workers)
        return
    print(f"{arguments.workers} workers, {arguments.trials} trials of {np.mean(seconds):.2f} s")
    for arm in arguments.arms.split(","):
        with tempfile.TemporaryDirectory(prefix="dmi-use-") as folder:
            command = [sys.executable, __file__, "--arm", arm, "--folder", folder]
            for name in ("trials", "seconds", "workers"):
                command += [f"--{name}", str(getattr(arguments, name))]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            print(f"{arm:8}", json.dumps(judged(Path(folder), arguments.workers)), flush=True)


if __name__ == "__main__":
    main()
