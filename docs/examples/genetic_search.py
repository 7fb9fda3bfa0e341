"""GeneticSearch in a Ray Tune script of one's own, with ASHA: python genetic_search.py FOLDER

The same command continues after an interruption of any kind.
"""

import sys
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from search.genetic_search import GeneticSearch


def train(config: dict[str, Any]) -> None:
    """Stands for a training: reports its validation error after each of 9 epochs."""
    for epoch in range(1, 10):
        error = abs(config["lr"] - 0.01) * 10 + config["net"]["units"] / 100 + 1 / epoch
        tune.report({"error": error})


def main(folder: Path) -> None:
    experiment = str(folder / "demo")
    if tune.Tuner.can_restore(experiment):
        tuner = tune.Tuner.restore(experiment, trainable=train)
    else:
        tuner = tune.Tuner(
            train,
            param_space={
                "lr": tune.loguniform(1e-4, 1e-1),
                "net": {"units": tune.randint(8, 129), "depth": 3},
            },
            tune_config=tune.TuneConfig(
                search_alg=GeneticSearch(seed=1, journal=folder / "journal.jsonl"),
                scheduler=ASHAScheduler(max_t=9, grace_period=1, reduction_factor=3),
                metric="error",
                mode="min",
                num_samples=24,
                max_concurrent_trials=2,  # unset, Tune starts one trial at a time
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(name="demo", storage_path=str(folder), verbose=0),
        )
    best = tuner.fit().get_best_result("error", "min")
    sys.stdout.write(f"best error {best.metrics['error']:.4f} with {best.config}\n")


if __name__ == "__main__":
    ray.init(address="local", include_dashboard=False)  # joins no cluster of somebody else
    main(Path(sys.argv[1]).absolute())
