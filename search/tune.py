"""Runs the search on Ray Tune: trials are reused actors, one evaluation each. The only file with ray.

Ray is asked for little: to run functions on workers and to say when one died. What matters is in our
journal (Tune's own state is a dump of all trials every ten seconds or more, and is thrown away).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import torch
from ray import tune
from ray.tune.search import Searcher

from dmi_hpc.config import Recipe
from dmi_hpc.errors import Interrupted
from search.driver import Driver
from search.evolve import Failure
from search.genome import to_json
from search.trial import Evaluator, TrialOutcome

# Enough for Tune's few small objects; networks and data never pass through it.
OBJECT_STORE_BYTES = 100_000_000


@dataclass(frozen=True)
class TrialContext:
    """What every worker needs; put once into Ray's object store."""

    recipe: Recipe
    data: Path
    scratch: Path  # for files of Ray and Tune that nobody needs afterwards


class EvaluationTrial(tune.Trainable):  # type: ignore[misc]
    """A reused actor: opens the data once, then evaluates one genome a trial, in a single step."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        device = torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")
        self._evaluator = Evaluator(context.recipe, context.data, device)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        return {"outcome": self._evaluator(self.config["genome"]), "done": True}


class _Adapter(Searcher):  # type: ignore[misc]
    """Tune's view of our driver. The argument names below are Tune's calling convention."""

    def __init__(self, driver: Driver, shown: Callable[[], None]) -> None:
        super().__init__()
        self._driver, self._shown = driver, shown
        self._numbers: dict[str, int] = {}

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        proposal = self._driver.next_proposal()
        self._shown()
        if proposal is None:
            return str(Searcher.FINISHED)
        self._numbers[trial_id] = proposal.id
        return {"genome": to_json(proposal.genome)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        return None

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        number = self._numbers.pop(trial_id, None)
        if number is None:
            return
        outcome = (result or {}).get("outcome")
        if outcome is None and not error:
            return  # ended before it finished: asked again by --resume
        if outcome is None:
            message = "the worker process died (killed, or out of memory)"
            outcome = TrialOutcome(Failure("lost", message), 0.0, {})
        self._driver.finished(number, outcome)
        self._shown()

    def save(self, checkpoint_path: str) -> None:
        return None

    def restore(self, checkpoint_path: str) -> None:
        return None


class _Heartbeat(tune.Callback):  # type: ignore[misc]
    """Keeps the terminal alive between results, and obeys a stop signal at once.

    Tune's own way to stop would wait for the trials in flight; the journal needs no such care.
    """

    def __init__(self, shown: Callable[[], None], stop: Callable[[], bool]) -> None:
        self._shown, self._stop = shown, stop

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._shown()
        if self._stop():
            raise Interrupted("the search was asked to stop")


@contextmanager
def cluster(workers: int, threads: int, folder: Path) -> Iterator[None]:
    """Ray for the block: the cluster at RAY_ADDRESS, or one of our own on the loopback interface.

    folder: for Ray's sockets and logs; short, its path is part of socket names.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials: see the journal
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, **common)
        else:
            ray.init(
                address="local",
                num_cpus=workers * threads,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
                **common,
            )
        yield
    finally:
        ray.shutdown()


def run_trials(
    driver: Driver, context: TrialContext, shown: Callable[[], None], stop: Callable[[], bool]
) -> None:
    """Evaluate until the driver has nothing more to ask; raises Interrupted when `stop` says so."""
    search = context.recipe.search
    resources = {"cpu": search.trial_threads, "gpu": 1 if ray.cluster_resources().get("GPU") else 0}
    trainable = tune.with_resources(
        tune.with_parameters(EvaluationTrial, context=context), resources
    )
    with TemporaryDirectory(prefix="tune-", dir=context.scratch) as folder:
        # not Tuner: it pickles the search algorithm, and ours holds an open journal
        tune.run(
            trainable,
            name="search",
            storage_path=folder,
            search_alg=_Adapter(driver, shown),
            num_samples=-1,  # the driver's budget ends it
            # unset, Tune starts one trial at a time for a Searcher that it does not know
            max_concurrent_trials=driver.progress.workers,
            reuse_actors=True,
            max_failures=0,
            raise_on_failed_trial=False,
            callbacks=[_Heartbeat(shown, stop)],
            verbose=0,
        )
