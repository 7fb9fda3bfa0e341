"""Problems whose every evaluation is a look-up, and the asynchronous workers that look them up.

``nbgraph_*.h5`` (NAS-Bench-Graph) and ``macro_*.h5`` (NAS-Bench-Macro) are exhaustive tables of
trained networks; ``lcbench.onnx`` (YAHPO) is a surrogate of 7 hyper-parameters on many data sets, here
at its full 52 epochs. `race` drives any optimiser that can ask and tell.
"""

from __future__ import annotations

import heapq
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import numpy.typing as npt
import onnxruntime

from search.spaces.parameters import Choice, Integer, Parameter, Real, Value

Values = npt.NDArray[np.float64]
EPOCHS = 52
LCBENCH_TASKS = (  # ten of the 34 data sets, spread over the list
    "3945", "34539", "126026", "146212", "167104", "167161", "168329", "168868", "189862", "189906",
)  # fmt: skip
DRAWN = 20_000  # random configurations that stand for the unknown optimum and median of a surrogate
NOISE = 0.3  # of the logarithm of a duration


@dataclass(frozen=True)
class Problem:
    """parameters: flat; evaluate: configuration -> (score or None if it failed, seconds).

    Scores: higher is better. group: ``architecture`` or ``lcbench``. best, median: scores.
    """

    name: str
    group: str
    parameters: Mapping[str, Parameter]
    evaluate: Callable[[Mapping[str, Value]], tuple[float | None, float]]
    best: float
    median: float

    def regret(self, score: float) -> float:
        """(best - found) / (best - median); 0 is the best of the table."""
        return (self.best - score) / (self.best - self.median)


def problems(folder: Path, *, lcbench: bool = True) -> list[Problem]:
    """Every problem whose file is in `folder`; raises FileNotFoundError if there is none."""
    found = [read_table(p) for p in sorted(folder.glob("*.h5")) if _is_table(p)]
    surrogate = folder / "lcbench.onnx"
    if lcbench and surrogate.exists():
        found += read_lcbench(surrogate)
    if not found:
        raise FileNotFoundError(f"no nbgraph_*.h5, macro_*.h5 or lcbench.onnx in {folder}")
    return found


def _is_table(path: Path) -> bool:
    return path.stem.startswith(("nbgraph_", "macro_"))


def read_table(path: Path) -> Problem:
    """One exhaustive table; genes become unordered choices of integers."""
    with h5py.File(path) as file:
        if "index" in file:
            index, results = file["index"][...], file["results"][...].astype(float)
            scores, costs = results[:, 0][index], results[:, 2][index]
            names = ("link", *(f"op{i + 1}" for i in range(index.ndim - 1)))
        else:
            genes = file["genes"][...]
            scores, costs = (np.full(genes.max(axis=0) + 1, np.nan) for _ in range(2))
            scores[tuple(genes.T)] = file["mean_accuracy"][...]
            costs[tuple(genes.T)] = file["flops"][...]
            names = tuple(f"op{i + 1}" for i in range(genes.shape[1]))
    seconds = np.nan_to_num(costs / np.nanmedian(costs), nan=1.0)
    choices = {
        name: Choice(values=tuple(range(n))) for name, n in zip(names, scores.shape, strict=True)
    }

    def evaluate(config: Mapping[str, Value]) -> tuple[float | None, float]:
        place = tuple(int(config[name]) for name in names)
        score = float(scores[place])
        return None if np.isnan(score) else score, float(seconds[place])

    best, median = float(np.nanmax(scores)), float(np.nanmedian(scores))
    return Problem(path.stem, "architecture", choices, evaluate, best, median)


LCBENCH: Mapping[str, Parameter] = {  # in the order of the surrogate's inputs, after the epoch
    "batch_size": Integer(low=16, high=512, log=True),
    "learning_rate": Real(low=1e-4, high=1e-1, log=True),
    "momentum": Real(low=0.1, high=0.99),
    "weight_decay": Real(low=1e-5, high=1e-1),
    "num_layers": Integer(low=1, high=5),
    "max_units": Integer(low=64, high=1024, log=True),
    "max_dropout": Real(low=0.0, high=1.0),
}


class LCBench:
    """The surrogate: validation accuracy in % and seconds after some epochs."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(path, options)
        encoding = path.with_name("lcbench_encoding.json")
        self._tasks = json.loads(encoding.read_text(encoding="utf-8"))["OpenML_task_id"]

    def __call__(self, task: str, x: npt.NDArray[np.float32]) -> Values:
        """x: (n, 8) epoch and LCBENCH's values -> (n, 2) accuracy, seconds."""
        tasks = np.full((len(x), 1), self._tasks[task], dtype=np.int32)
        (output,) = self._session.run(None, {"x_cat": tasks, "x_cont": x})
        found: Values = np.asarray(output, dtype=float)[:, [1, 0]]
        return found


def read_lcbench(path: Path, tasks: tuple[str, ...] = LCBENCH_TASKS) -> list[Problem]:
    """One problem a data set. best and median: of DRAWN random configurations, so that a good
    optimiser reaches regrets below 0."""
    surrogate = LCBench(path)
    return [_lcbench(surrogate, task) for task in tasks]


def _lcbench(surrogate: LCBench, task: str) -> Problem:
    def evaluate(config: Mapping[str, Value]) -> tuple[float | None, float]:
        x = np.array([[EPOCHS, *(config[name] for name in LCBENCH)]], dtype=np.float32)
        accuracy, seconds = surrogate(task, x)[0]
        return float(accuracy), float(seconds) / typical

    drawn = surrogate(task, _random_lcbench(np.random.default_rng(0)))
    typical = float(np.median(drawn[:, 1]))
    best, median = float(drawn[:, 0].max()), float(np.median(drawn[:, 0]))
    return Problem(f"lcbench_{task}", "lcbench", LCBENCH, evaluate, best, median)


def _random_lcbench(rng: np.random.Generator) -> npt.NDArray[np.float32]:
    columns: list[Any] = [np.full(DRAWN, EPOCHS)]
    for parameter in LCBENCH.values():
        assert not isinstance(parameter, Choice)
        ends = np.array([parameter.low, parameter.high], dtype=float)
        low, high = np.log(ends) if parameter.log else ends
        drawn = rng.uniform(low, high, DRAWN)
        drawn = np.exp(drawn) if parameter.log else drawn
        columns.append(np.round(drawn) if isinstance(parameter, Integer) else drawn)
    return np.stack(columns, axis=1).astype(np.float32)


class Optimiser(Protocol):
    """What `race` needs: any number of asks may be outstanding."""

    def ask(self) -> tuple[Any, Mapping[str, Value]] | None:
        """(token, configuration); None if nothing new is left."""

    def tell(self, token: Any, score: float | None) -> None:
        """`score`: higher is better; None if the evaluation failed."""


@dataclass(frozen=True)
class Race:
    """best: (n,) best score after each finished evaluation, -inf before the first success;
    times: (n,) simulated seconds; optimiser_s: real seconds spent in ask and tell."""

    best: Values
    times: Values
    optimiser_s: float


def race(
    optimiser: Optimiser, problem: Problem, *, workers: int, evaluations: int, seed: int
) -> Race:
    """Run `evaluations` on simulated asynchronous workers; a free worker asks at once.

    A duration is the table's, in units of its median, times log-normal noise that depends on (seed,
    number of the evaluation) alone: the same for all optimisers.
    """
    noise = np.exp(NOISE * np.random.default_rng(seed).standard_normal(evaluations))
    running: list[tuple[float, int, Any, float | None]] = []  # (end, number, token, score)
    best, times, spent, now, asked = [], [], 0.0, 0.0, 0
    while asked < evaluations or running:
        if asked < evaluations and len(running) < workers:
            begin = time.perf_counter()
            found = optimiser.ask()
            spent += time.perf_counter() - begin
            if found is not None:
                token, config = found
                score, seconds = problem.evaluate(config)
                heapq.heappush(running, (now + seconds * noise[asked], asked, token, score))
                asked += 1
                continue
            evaluations = asked  # exhausted: what runs is waited for
        if not running:
            break
        now, _, token, score = heapq.heappop(running)
        begin = time.perf_counter()
        optimiser.tell(token, score)
        spent += time.perf_counter() - begin
        best.append(max(-np.inf if score is None else score, best[-1] if best else -np.inf))
        times.append(now)
    return Race(np.array(best), np.array(times), spent)
