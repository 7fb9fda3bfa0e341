"""Runs the search on Ray Tune: trials are reused actors, one evaluation each. The only file with ray.

Ray is asked for little: to run functions on workers and to say when one died. What matters is in our
journal (Tune's own state is a dump of all trials every ten seconds or more, and is thrown away).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import ray
import torch
from ray import tune
from ray.exceptions import RayError
from ray.tune.error import TuneError
from ray.tune.search import Searcher

from dmi_hpc.config import Recipe, SearchConfig
from dmi_hpc.errors import DMIError, Interrupted, LaunchError
from search.capacity import MEMORY_SHARE, capacity, local_workers
from search.driver import Driver
from search.evolve import Failure
from search.genome import to_json
from search.trial import TRACEBACK_CHARACTERS, Evaluator, TrialOutcome

# Enough for Tune's few small objects; networks and data never pass through it.
OBJECT_STORE_BYTES = 100_000_000


CONNECT_S = 5.0
OWN_PROCESSES = {"gcs_server", "raylet"}  # without either there is no cluster


@dataclass(frozen=True)
class Cluster:
    """Ray as it was found. alive: whether it still stands; asks processes or sockets, not Ray."""

    workers: int
    trial_memory_GB: float
    gpus: bool
    alive: Callable[[], bool]


@dataclass(frozen=True)
class TrialContext:
    """What every worker needs; put once into Ray's object store."""

    recipe: Recipe
    data: Path
    scratch: Path  # for files of Ray and Tune that nobody needs afterwards
    memory_GB: float


class SpentWorker(Exception):
    """A worker that lost its device refuses a trial. Tune does not reuse an actor that raised."""


class EvaluationTrial(tune.Trainable):  # type: ignore[misc]
    """A reused actor: opens the data once, then evaluates one genome a trial, in a single step."""

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        device = torch.device("cuda", 0) if ray.get_gpu_ids() else torch.device("cpu")
        self._evaluator = Evaluator(context.recipe, context.data, device, context.memory_GB)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        return True

    def step(self) -> dict[str, Any]:
        if self._evaluator.spent:
            raise SpentWorker
        return {"outcome": self._evaluator(self.config["genome"]), "done": True}


class _Adapter(Searcher):  # type: ignore[misc]
    """Tune's view of our driver. The argument names below are Tune's calling convention."""

    def __init__(self, driver: Driver, shown: Callable[[], None]) -> None:
        super().__init__()
        self._driver, self.shown = driver, shown
        self.numbers: dict[str, int] = {}  # of the trials in flight

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        proposal = self._driver.next_proposal()
        self.shown()
        if proposal is None:
            return str(Searcher.FINISHED) if self._driver.done else None  # None: ask again later
        self.numbers[trial_id] = proposal.id
        return {"genome": to_json(proposal.genome)}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        return None

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        outcome = (result or {}).get("outcome")
        if outcome is None:
            return  # it ended before it finished: `_Events.on_trial_error` sees why
        self._driver.finished(self.numbers.pop(trial_id), outcome)
        self.shown()

    def save(self, checkpoint_path: str) -> None:
        return None

    def restore(self, checkpoint_path: str) -> None:
        return None


class _Events(tune.Callback):  # type: ignore[misc]
    """Judges trials that died, keeps the terminal alive between results, and obeys a stop at once.

    Tune's own way to stop would wait for the trials in flight; the journal needs no such care.
    """

    def __init__(
        self, adapter: _Adapter, driver: Driver, limit_s: float | None, halt: Callable[[], None]
    ) -> None:
        self._adapter, self._driver, self._limit_s, self._halt = adapter, driver, limit_s, halt
        self._started: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._started[trial.trial_id] = time.monotonic()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self._adapter.numbers.pop(trial.trial_id, None)
        if number is None:
            return
        self._halt()  # a search that ends, or a cluster that is gone, says nothing of a network
        started = self._started.get(trial.trial_id)
        seconds = 0.0 if started is None else time.monotonic() - started
        text = Path(trial.error_file).read_text(encoding="utf-8", errors="replace")
        judge_loss(self._driver, number, seconds, self._limit_s, text)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._adapter.shown()
        self._halt()


def judge_loss(
    driver: Driver, number: int, seconds: float, limit_s: float | None, text: str
) -> None:
    """Tell `driver` that the worker of trial `number` failed after `seconds`. text: Ray's word."""
    *_, last = text.strip().splitlines() or [""]
    text = text[-TRACEBACK_CHARACTERS:]
    if SpentWorker.__name__ in text:
        driver.again(number)
    elif limit_s is not None and seconds > limit_s:
        message = f"its worker hung and was ended: not finished after {limit_s:g} s"
        driver.finished(number, TrialOutcome(Failure("timeout", message, text), seconds, {}))
    else:
        message = f"the worker process died (killed, out of memory, or as Ray says: {last[:500]})"
        driver.lost(number, Failure("lost", message, text), seconds)


def _reachable(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError:
        return False
    return True


def _join(address: str, common: dict[str, Any]) -> None:
    """Connect to a cluster that is there. LaunchError if it does not answer."""
    missing = LaunchError(
        f"RAY_ADDRESS={address}: no Ray cluster there takes us in. Start it (ray start --head), "
        "correct the address (or RAY_AUTH_MODE, if it wants a token), or unset RAY_ADDRESS for a "
        "cluster of the search's own"
    )
    # Ray itself would try for minutes and then end this process
    if address.rpartition(":")[2].isdigit() and not _reachable(address.removeprefix("ray://")):
        raise missing
    try:
        ray.init(address=address, **common)
    except ConnectionError as error:
        raise missing from error


@contextmanager
def cluster(search: SearchConfig, folder: Path) -> Iterator[Cluster]:
    """Ray for the block: the cluster at RAY_ADDRESS, or one of our own on the loopback interface.

    folder: for Ray's sockets and logs; short, its path is part of socket names.
    """
    logging.getLogger("ray").setLevel(logging.ERROR)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials: see the journal
    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _join(address, common)
            gcs = ray.get_runtime_context().gcs_address
            yield _surveyed(search, lambda: _reachable(gcs))
        else:
            ray.init(
                address="local",
                num_cpus=local_workers(search) * search.trial_threads,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
                **common,
            )
            own = [p for p in psutil.Process().children() if p.name() in OWN_PROCESSES]
            yield _surveyed(search, lambda: all(map(_runs, own)))
    finally:
        ray.shutdown()


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _surveyed(search: SearchConfig, alive: Callable[[], bool]) -> Cluster:
    """The cluster that Ray is connected to: where the recipe says auto, by what its nodes have."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    found = capacity(nodes, search.trial_threads)
    workers = found.workers if search.workers == "auto" else search.workers
    memory = search.trial_memory_GB
    if memory == "auto":
        memory = MEMORY_SHARE * (_free_gpu_GB(search) if found.gpus else found.memory_GB)
    return Cluster(workers, memory, found.gpus, alive)


def _free_gpu_GB(search: SearchConfig) -> float:
    """Free memory of a GPU as a worker sees it: the driver's own use of CUDA would take a part."""

    def free() -> float:
        return torch.cuda.mem_get_info()[0] / 1e9

    return float(ray.get(ray.remote(num_gpus=1, num_cpus=search.trial_threads)(free).remote()))


def run_trials(
    driver: Driver,
    context: TrialContext,
    found: Cluster,
    shown: Callable[[], None],
    stop: Callable[[], bool],
) -> None:
    """Evaluate until the driver has nothing more to ask.

    Raises Interrupted when `stop` says so, and when Ray fails: trials in flight stay to be asked.
    """

    def halt() -> None:
        if stop():
            raise Interrupted("the search was asked to stop")
        if not found.alive():
            raise Interrupted("Ray's own processes are gone")

    search = context.recipe.search
    adapter = _Adapter(driver, shown)
    resources = {"cpu": search.trial_threads, "gpu": int(found.gpus)}
    trainable = tune.with_resources(
        tune.with_parameters(EvaluationTrial, context=context), resources
    )
    with TemporaryDirectory(prefix="tune-", dir=context.scratch) as folder, own_errors():
        # not Tuner: it pickles the search algorithm, and ours holds an open journal
        tune.run(
            trainable,
            name="search",
            storage_path=folder,
            search_alg=adapter,
            num_samples=-1,  # the driver's budget ends it
            # unset, Tune starts one trial at a time for a Searcher that it does not know
            max_concurrent_trials=driver.progress.workers,
            reuse_actors=True,
            max_failures=0,
            raise_on_failed_trial=False,
            callbacks=[_Events(adapter, driver, search.trial_time_limit_s, halt)],
            verbose=0,
        )


@contextmanager
def own_errors() -> Iterator[None]:
    """Ray's failures as Interrupted; our errors as themselves, which Tune wraps with their text."""
    try:
        yield
    except (RayError, TuneError) as error:
        inner: BaseException | None = error
        while isinstance(inner, TuneError):
            inner = inner.__cause__ or inner.__context__
        if isinstance(inner, DMIError | Interrupted):
            raise inner from error
        if isinstance(inner, RayError):
            raise Interrupted(f"Ray failed ({type(inner).__name__}: {inner})") from error
        raise
