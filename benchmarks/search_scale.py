"""A search on 16 to 25,200 workers: what its driver costs, how busy the workers are, what it finds.

    python benchmarks/search_scale.py                     cost and utilisation, about 15 minutes
    python benchmarks/search_scale.py --quick             does it run? a minute
    python benchmarks/search_scale.py --tables FOLDER     the quality too, with lcbench.onnx in FOLDER

1. Cost: seconds of `Driver.next_proposal` and `Driver.finished`, which are ask and tell with their
   journal lines on disk (--folder: where; try the file system of your machine), after histories of up to
   30,000 evaluations of the 3-D convolution space of recipes/homogenization_2000.toml. --cpu counts
   seconds of the processor instead: on a machine that is busy with other things, and without the disk.
2. Utilisation: discrete-event simulation (``search.evolution.simulate``) of workers whose evaluations
   last log-normal times. A driver is served by these measured costs, drawn at the history that it has
   reached. All workers ask at once at the beginning; the share counts from then on, over 30 mean
   durations. Islands share the workers and take in two results of others for each of their own.
   --dispatch-ms adds what the runner of the trials costs the driver for each of them.
3. Quality: regret, (best - found) / (best - median), after as many evaluations with more workers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import log
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import psutil
from loading.report import machine, markdown

from dmi_hpc.config import load_recipe
from dmi_hpc.tasks import make_task
from search.driver import Driver
from search.evolution.evolve import Evolution, EvolutionConfig, Failure, Outcome, Proposal, Success
from search.evolution.simulate import Costs, Exchange, Trace, simulate_islands
from search.trials.trial import TrialOutcome

RECIPE = Path(__file__).parents[1] / "recipes" / "homogenization_2000.toml"
HISTORIES = (0, 100, 1000, 3000, 10_000, 30_000)
WORKERS = (16, 64, 256, 1024, 4096, 25_200)
DURATIONS_S = (10.0, 60.0, 480.0)
ROUNDS = 30  # mean durations that a simulation lasts
SIGMA = 0.5  # of the logarithm of a duration
BAR = 0.97
MOST_ISLANDS = 256
EXCHANGE_S = 60.0


@dataclass(frozen=True)
class Cost:
    """Seconds of asks and tells after `history` evaluations; bytes of memory for one of them."""

    history: int
    ask_s: tuple[float, ...]
    tell_s: tuple[float, ...]
    memory: float

    @property
    def cells(self) -> tuple[str, ...]:
        both = np.array(self.ask_s) + (np.array(self.tell_s) if self.tell_s else 0.0)
        shown = [mean(self.ask_s), mean(self.tell_s or [0.0]), *np.percentile(both, [50, 99, 100])]
        numbers = (f"{1e3 * seconds:.2f}" for seconds in shown)
        return f"{self.history:,}", *numbers, f"{self.memory / 1e3:.1f}"


Clock = Callable[[], float]
Times = tuple[float, ...]


def driver_costs(folder: Path, histories: tuple[int, ...], clock: Clock) -> list[Cost]:
    """Fill the history with random networks, then ask and tell for real at each length of it."""
    recipe = load_recipe(RECIPE)
    search = recipe.search.model_copy(update={"evaluations": 10**9})
    recipe = recipe.model_copy(update={"search": search})
    driver = Driver(recipe, make_task(recipe.task).space(), folder)
    driver.start(workers=1, trial_memory_GB=1.0)
    rng, fitness = np.random.default_rng(0), _objective(driver.evolution)
    memory, found = psutil.Process().memory_info().rss, []
    for history in histories:
        while len(driver.evolution.outcomes) < history:
            _fill(driver.evolution, rng, fitness)
        per_evaluation = (psutil.Process().memory_info().rss - memory) / max(1, history)
        # refits become rarer with the history: see at least one
        asks, tells = _window(driver, max(200, history // 25), fitness, clock)
        found.append(Cost(history, asks, tells if history else (), per_evaluation))
    return found


def _objective(evolution: Evolution[Any]) -> Callable[[Any], float]:
    """A made-up error that depends on the network: a random linear function of its features."""
    rng, weights = np.random.default_rng(1), None

    def fitness(genome: Any) -> float:
        nonlocal weights
        x = evolution.space.features([genome])[0]
        if weights is None:
            weights = rng.standard_normal(len(x))
        return float(x @ weights + 0.1 * rng.standard_normal())

    return fitness


def _fill(evolution: Evolution[Any], rng: np.random.Generator, fitness: Callable) -> None:
    genome = evolution.space.random(rng)
    number = len(evolution.proposals)
    proposal = Proposal(number, genome, "random", (), evolution.space.identity(genome))
    evolution.restore_ask(proposal)
    evolution.tell(number, Success(fitness(genome)))


def _window(driver: Driver, length: int, fitness: Callable, clock: Clock) -> tuple[Times, Times]:
    """Ask and tell in turns; at the very beginning, ask alone."""
    asks, tells = [], []
    begins = not driver.evolution.outcomes
    for number in range(length + 1):
        begin = clock()
        proposal = driver.next_proposal()
        asked = clock()
        outcome = TrialOutcome(Success(fitness(proposal.genome)), 1.0, {"epochs": 10.0})
        told = clock()
        if not begins:
            driver.finished(proposal.id, outcome)
        if number:  # the first pays for the surrogate of all that was filled in
            asks.append(asked - begin)
            tells.append(clock() - told)
    return tuple(asks), tuple(tells)


class Counter:
    """A search that proposes numbers: the costs alone matter for how busy workers are."""

    def __init__(self, index: int, count: int) -> None:
        self._numbers = itertools.count(index, count)
        self._asked = itertools.count()

    def ask(self) -> Proposal[int]:
        number = next(self._numbers)
        return Proposal(next(self._asked), number, "random", (), str(number))

    def tell(self, identifier: int, outcome: Outcome) -> Outcome:
        return outcome

    def restore_ask(self, proposal: Proposal[int]) -> None:
        return None


@dataclass(frozen=True)
class Site:
    """What is simulated. failures: share of evaluations that fail at a tenth of their time, for a
    new process of `restart_s`; dispatch_s: of the driver for each trial."""

    workers: int
    duration_s: float
    islands: int = 1
    rounds: int = ROUNDS
    dispatch_s: float = 0.0
    failures: float = 0.0
    restart_s: float = 30.0

    def run(self, costs: list[Cost]) -> list[Trace]:
        rng = np.random.default_rng(self.workers)
        asks = _drawn(costs, rng, lambda cost: cost.ask_s, self.dispatch_s)
        tells = _drawn(costs, rng, lambda cost: cost.tell_s or (0.0,))
        evolutions = [Counter(i, self.islands) for i in range(self.islands)]
        evaluate = _evaluations(self, rng)
        exchange = Exchange(EXCHANGE_S) if self.islands > 1 else None
        return simulate_islands(
            evolutions,
            evaluate,
            self.workers,
            10**12,
            exchange,
            costs=Costs(asks, tells, restart_s=self.restart_s),
            limit_s=self.rounds * self.duration_s,
        )


def _drawn(
    costs: list[Cost], rng: np.random.Generator, which: Callable, more: float = 0.0
) -> Callable[[int], float]:
    """Draws from what was measured at the longest history that is not longer."""
    lengths = [cost.history for cost in costs]
    streams = [_endless(np.array(which(cost)) + more, rng) for cost in costs]

    def seconds(told: int) -> float:
        return next(streams[bisect_right(lengths, told) - 1])

    return seconds


def _endless(values: np.ndarray, rng: np.random.Generator) -> Iterator[float]:
    while True:
        yield from rng.choice(values, 4096).tolist()


def _evaluations(site: Site, rng: np.random.Generator) -> Callable[[int], tuple[Outcome, float]]:
    """Log-normal durations of the wanted mean."""

    def durations() -> Iterator[float]:
        while True:
            yield from rng.lognormal(log(site.duration_s) - SIGMA**2 / 2, SIGMA, 4096).tolist()

    seconds, luck = durations(), _endless(np.arange(1000) / 1000, rng)
    success, failure = Success(0.0), Failure("lost")

    def evaluate(genome: int) -> tuple[Outcome, float]:
        if site.failures and next(luck) < site.failures:
            return failure, next(seconds) / 10
        return success, next(seconds)

    return evaluate


def utilisation(sites: list[Site], costs: list[Cost]) -> Iterator[dict[str, Any]]:
    """Every site with one driver and, if that is too slow, with the fewest islands (powers of 2)
    that reach the bar."""
    for site in sites:
        islands, best = 1, 0.0
        while best < BAR and islands <= min(MOST_ISLANDS, site.workers):
            row = _row(replace(site, islands=islands), costs)
            yield row
            best, load = row["utilisation"], row["offered"] / islands
            # far too slow: do not try every power of two
            islands *= 2 if load < 2 else 2 ** int(np.log2(load))


def _row(site: Site, costs: list[Cost]) -> dict[str, Any]:
    traces = site.run(costs)
    last = costs[-1]
    per_trial = mean(last.ask_s) + mean(last.tell_s) + site.dispatch_s
    if site.islands > 1:
        per_trial += Exchange(EXCHANGE_S).per_own * mean(last.tell_s)
    return {
        **asdict(site),
        "utilisation": mean(t.utilisation for t in traces),
        "finished": mean(t.finished for t in traces),
        "driver": mean(t.driver for t in traces),
        "offered": site.workers / site.duration_s * per_trial,
        "evaluations": sum(len(t.ids) for t in traces),
    }


UTILISATION = ("trial", "workers", "islands", "trials/s", "utilisation", "finished", "driver busy")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{row['duration_s']:g} s",
        f"{row['workers']:,}" + (f", {row['failures']:.0%} fail" if row["failures"] else ""),
        str(row["islands"]),
        f"{row['evaluations'] / row['duration_s'] / row['rounds']:.1f}",
        f"{100 * row['utilisation']:.2f} %" + ("" if row["utilisation"] > BAR else " (no)"),
        f"{100 * row['finished']:.1f} %",
        f"{100 * row['driver']:.0f} %",
    )


@dataclass(frozen=True)
class Quality:
    """A search whose result is looked at after some evaluations."""

    workers: int
    population: int = EvolutionConfig().population
    islands: int = 1
    exchange: bool = True


QUALITIES = (
    *(Quality(workers) for workers in (1, 16, 256, 1024)),
    *(Quality(1024, population) for population in (64, 256)),
    Quality(1024, islands=8),
    Quality(1024, islands=8, exchange=False),
)
TASKS = ("3945", "146212", "168868")


def regrets(
    folder: Path, task: str, quality: Quality, seed: int, budgets: tuple[int, ...]
) -> list[float]:
    """On one data set of LCBench, whose configurations are continuous and cannot be exhausted."""
    from searching.tables import read_lcbench

    from search.spaces.parameters import Parameters

    (problem,) = read_lcbench(folder / "lcbench.onnx", (task,))
    space, rng = Parameters(problem.parameters), np.random.default_rng(seed)

    def evaluate(genome: Any) -> tuple[Outcome, float]:
        score, seconds = problem.evaluate(dict(genome))
        return Success(-score), seconds * rng.lognormal(0.0, 0.3)

    evolutions = [
        Evolution(space, EvolutionConfig(seed=seed + 1000 * i, population=quality.population))
        for i in range(quality.islands)
    ]
    exchange = Exchange(interval_s=0.25) if quality.exchange else None  # of a median duration
    traces = simulate_islands(evolutions, evaluate, quality.workers, max(budgets), exchange)
    order = np.argsort(np.concatenate([t.times for t in traces]), kind="stable")
    best = np.minimum.accumulate(np.concatenate([t.best for t in traces])[order])
    return [problem.regret(-best[budget - 1]) for budget in budgets]


def quality(folder: Path, seeds: int, budgets: tuple[int, ...]) -> Iterator[tuple[str, ...]]:
    """Lines of a table: means over TASKS and seeds."""
    with ProcessPoolExecutor(2) as pool:
        for kind in QUALITIES:
            cases = list(itertools.product(TASKS, range(seeds)))
            found = pool.map(
                regrets, *zip(*((folder, t, kind, s, budgets) for t, s in cases), strict=True)
            )
            shown = (f"{value:.4f}" for value in np.mean(list(found), axis=0))
            alone = "" if kind.exchange else ", each alone"
            yield f"{kind.workers:,}", str(kind.population), f"{kind.islands}{alone}", *shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where the journal of the measurement lies")
    parser.add_argument("--cpu", action="store_true", help="seconds of the processor")
    parser.add_argument("--tables", type=Path, help="folder of lcbench.onnx and its encoding")
    parser.add_argument("--only", choices=("cost", "utilisation", "quality"), nargs="+")
    parser.add_argument("--dispatch-ms", type=float, nargs="+", default=[0.0])
    parser.add_argument(
        "--evaluations", type=int, default=4096, help="of one search, for the quality"
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the quality")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    parts = set(options.only or ("cost", "utilisation", "quality"))
    result: dict[str, Any] = {"machine": machine()}
    print(f"load of the machine at the start: {result['machine']['load_at_start']}\n")
    if parts & {"cost", "utilisation"}:
        histories = HISTORIES[:3] if options.quick else HISTORIES
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            clock = time.process_time if options.cpu else time.perf_counter
            costs = driver_costs(Path(folder), histories, clock)
        header = ("history", "ask ms", "tell ms", "both: median", "99 %", "worst", "kB each")
        print(markdown(header, (cost.cells for cost in costs)), "\n", flush=True)
        result["costs"] = [asdict(cost) for cost in costs]
    if "utilisation" in parts:
        result["utilisation"] = []
        for dispatch in options.dispatch_ms:
            print(f"{dispatch:g} ms a trial for its dispatch\n\n{markdown(UTILISATION, ())}")
            for row in utilisation(_sites(dispatch / 1e3, options.quick), costs):
                print("| " + " | ".join(cells(row)) + " |", flush=True)
                result["utilisation"].append(row)
            print()
    if "quality" in parts and options.tables:
        most = 128 if options.quick else options.evaluations
        budgets = (most // 4, most // 2, most)
        header = ("workers", "population", "islands", *(f"{b:,} evaluations" for b in budgets))
        print(markdown(header, ()))
        for line in quality(options.tables, 1 if options.quick else options.seeds, budgets):
            print("| " + " | ".join(line) + " |", flush=True)
    elif "quality" in parts:
        print("quality: not measured, --tables is not given")
    if options.json:
        options.json.write_text(json.dumps(result))


def _sites(dispatch_s: float, quick: bool) -> list[Site]:
    if quick:
        return [Site(workers, 10.0, rounds=5, dispatch_s=dispatch_s) for workers in (16, 1024)]
    sites = [
        Site(workers, duration, dispatch_s=dispatch_s)
        for duration in reversed(DURATIONS_S)
        for workers in WORKERS
    ]
    return [*sites, Site(WORKERS[-1], DURATIONS_S[-1], dispatch_s=dispatch_s, failures=0.05)]


if __name__ == "__main__":
    main()
