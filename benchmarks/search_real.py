"""Searches with real trainings at equal core-seconds: ours, random and Optuna's TPE.

    pip install --target OPTUNA optuna
    python benchmarks/search_real.py --optuna OPTUNA --out results.jsonl \\
        --compositions expt_deltae.csv:pretty_comp:delta_e expt_gap.csv:formula:target

Tasks: effective stiffness of two-phase volumes made by our solver, at two contrasts; and
any number of composition properties, FILE:FORMULA:VALUE each, columns of a CSV. Networks are small.
A search is one process, one trial after the other, until its seconds of processor time are spent, those
of the optimiser included; a trial that ends later does not count. So other programs on the machine
hardly matter. --scale multiplies these budgets, which are for some 60 trials. All arms have the same
space, the same evaluator (``search.trials.trial.Evaluator``), and of one seed the same first random
networks; none gets founders.
Optuna's space: a parameter for each depth, and those of a block only where it is there; ordered
choices are integers; sampler ``TPESampler(multivariate=True, group=True)``. A network that it
proposes again costs it nothing.
--optuna is a folder from which optuna is imported, after what is installed here; without optuna that
arm is left out. --out keeps finished searches; called again, the rest is done. The best network of a
search is trained once more, outside the budget, for its error on the test split.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loading.report import machine, markdown
from scipy.stats import wilcoxon
from searching.tasks import Case, composition, stiffness

from dmi_hpc import checkpoint
from dmi_hpc.evaluate import evaluate_rows
from dmi_hpc.job import Job
from dmi_hpc.models.build import build
from dmi_hpc.models.space import Choice, SearchSpace
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.train import fit
from dmi_hpc.world import World
from search.evolution.evolve import Evolution, EvolutionConfig, Failure, Success
from search.spaces.genome import (
    ConvGene,
    DenseGene,
    Genome,
    canonical,
    decode,
    structural_hash,
    to_json,
)
from search.spaces.networks import Networks
from search.trials.ending import Deadline
from search.trials.trial import Evaluator, trial_config

ARMS = ("ours", "random", "tpe")
INITIAL = EvolutionConfig().initial
MEMORY_GB = 4.0
SECONDS = {"homogenization": 30.0, "elemnet": 20.0}  # of a search, by task
TEST = 0.25  # share of the rows


class Ours:
    """The search, or (random) its random networks alone."""

    def __init__(self, space: SearchSpace, seed: int, *, random: bool = False) -> None:
        changes = {"initial": 10**9, "surrogate": False} if random else {}
        self._evolution = Evolution(Networks(space), EvolutionConfig(seed=seed, **changes))

    def ask(self) -> tuple[int, Genome]:
        proposal = self._evolution.ask()
        return proposal.id, proposal.genome

    def tell(self, token: int, fitness: float | None) -> None:
        outcome = Failure("exception") if fitness is None else Success(fitness)
        self._evolution.tell(token, outcome)


class Tpe:
    """Optuna's TPE on the flattened space; begins with our random networks."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        self._failed = optuna.trial.TrialState.FAIL
        self._space = space
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, n_startup_trials=INITIAL
        )
        self._study = optuna.create_study(sampler=sampler)
        first = Ours(space, seed, random=True)
        for _ in range(INITIAL):
            self._study.enqueue_trial(flattened(first.ask()[1], space))

    def ask(self) -> tuple[Any, Genome]:
        trial = self._study.ask()
        return trial, composed(trial, self._space)

    def tell(self, token: Any, fitness: float | None) -> None:
        if fitness is None:
            self._study.tell(token, state=self._failed)
        else:
            self._study.tell(token, fitness)


CONV = {  # field of a gene -> (choices in the space, whether they are ordered)
    "filters": ("filters", True),
    "kernel": ("kernels", True),
    "padding": ("paddings", False),
    "norm": ("norms", False),
    "activation": ("activations", False),
    "pool": ("pools", False),
    "dropout": ("dropouts", True),
}
DENSE = {"units": ("units", True), **{k: CONV[k] for k in ("norm", "activation", "dropout")}}


def flattened(genome: Genome, space: SearchSpace) -> dict[str, Any]:
    """Optuna's parameters of a genome of `space`; of ordered choices the position."""
    network, found = space.network, {}
    for part, genes, fields in (("conv", genome.conv, CONV), ("dense", genome.dense, DENSE)):
        if network.conv_blocks[1] or part == "dense":
            found[f"{part}_blocks"] = len(genes)
        for slot, gene in enumerate(genes):
            for field, (choices, ordered) in fields.items():
                value = getattr(gene, field)
                place = getattr(network, choices).index(value) if ordered else value
                found[f"{part}{slot}_{field}"] = place
    if genome.readout:
        found["readout"] = genome.readout
    for name, value in genome.hyper:
        parameter = space.hyper[name]
        ordered = isinstance(parameter, Choice) and parameter.ordered
        found[name] = parameter.values.index(value) if ordered else value
    return found


def composed(trial: Any, space: SearchSpace) -> Genome:
    """The genome of an Optuna trial, in canonical form."""
    network = space.network

    def pick(name: str, values: tuple[Any, ...], ordered: bool) -> Any:
        if ordered:
            return values[trial.suggest_int(name, 0, len(values) - 1)]
        return trial.suggest_categorical(name, values)

    def genes(part: str, limits: tuple[int, int], fields: Mapping[str, Any]) -> Iterator[dict]:
        for slot in range(trial.suggest_int(f"{part}_blocks", *limits) if limits[1] else 0):
            yield {
                field: pick(f"{part}{slot}_{field}", getattr(network, choices), ordered)
                for field, (choices, ordered) in fields.items()
            }

    conv = tuple(ConvGene(**g) for g in genes("conv", network.conv_blocks, CONV))
    readout = None
    if len(network.input_shape) > 1:
        readout = trial.suggest_categorical("readout", network.readouts)
    dense = tuple(DenseGene(**g) for g in genes("dense", network.dense_blocks, DENSE))
    hyper = []
    for name, parameter in sorted(space.hyper.items()):
        if isinstance(parameter, Choice):
            hyper.append((name, pick(name, parameter.values, parameter.ordered)))
        else:
            value = trial.suggest_float(name, parameter.low, parameter.high, log=parameter.log)
            hyper.append((name, value))
    return canonical(Genome(conv=conv, readout=readout, dense=dense, hyper=tuple(hyper)), space)


def make_arm(name: str, space: SearchSpace, seed: int) -> Ours | Tpe:
    return Tpe(space, seed) if name == "tpe" else Ours(space, seed, random=name == "random")


def search(case: Case, arm: str, seed: int, data: Path, budget_s: float) -> dict[str, Any]:
    """One search: its best networks over time, as a line of the results."""
    space, recipe = case.space(), case.recipe(seed)
    evaluator = Evaluator(recipe, data, torch.device("cpu"), MEMORY_GB)
    evaluator(to_json(Ours(space, 10**6, random=True).ask()[1]))  # imports, opens the data
    optimiser, known = make_arm(arm, space, seed), {}
    best, optimiser_s, curve, failures = None, 0.0, [], 0
    started = time.process_time()
    while True:
        begin = time.process_time()
        token, genome = optimiser.ask()
        optimiser_s += time.process_time() - begin
        identity = structural_hash(genome, space)
        if identity not in known:
            told = evaluator(to_json(genome)).told
            known[identity] = told.fitness if isinstance(told, Success) else None
        fitness, ended = known[identity], time.process_time()
        if ended - started > budget_s:
            break
        failures += fitness is None
        if fitness is not None and (best is None or fitness < best[0]):
            best = (fitness, genome)
        curve.append((round(ended - started, 3), best[0] if best else None))
        optimiser.tell(token, fitness)
        optimiser_s += time.process_time() - ended
    if best is None:
        raise ValueError(
            f"{case.name}: no trial ended within {budget_s:g} s: give a larger --scale"
        )
    return {
        "case": case.name,
        "arm": arm,
        "seed": seed,
        "budget_s": budget_s,
        "validation": best[0],
        "test": test_error(case, seed, data, best[1]),
        "trials": len(curve),
        "different": len(known),
        "failures": failures,
        "optimiser_s": optimiser_s,
        "curve": curve,
        "genome": to_json(best[1]),
    }


def test_error(case: Case, seed: int, data: Path, genome: Genome) -> float:
    """Mean absolute error on the test split of the network, trained as in its trial."""
    recipe = case.recipe(seed)
    problem = Problem.open(make_task(case.task), data, verify="none", reading=recipe.data)
    network = decode(genome, case.space().network)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "checkpoints"
        config = trial_config(recipe, genome)
        job = Job(problem, network, config, seed, checkpoints=where)
        fit(job, Deadline(None), resume=False, warn=_unheard)
        path, _ = checkpoint.best(where, _unheard)
        module = build(network)
        checkpoint.load_weights(path, module)
    module.eval()
    return evaluate_rows(problem, module, problem.shards.rows("test"), 256, World()).mae


def _unheard(message: str) -> None:
    """Nothing that is wrong with a training matters here."""


def searches(
    cases: list[Case], arms: list[str], options: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """All of them, --processes at a time, each in one process, whose time is counted."""
    out: Path | None = options.out
    found = [json.loads(line) for line in out.open()] if out and out.exists() else []
    budgets = {case.name: SECONDS[case.task["name"]] * options.scale for case in cases}
    found = [row for row in found if row["budget_s"] == budgets.get(row["case"])]
    done = {(row["case"], row["arm"], row["seed"]) for row in found}
    for number, case in enumerate(cases):
        case.build(folder / str(number))
    wanted = [
        (case, arm, seed, folder / str(number), budgets[case.name])
        for seed in range(options.seeds)
        for number, case in enumerate(cases)
        for arm in arms
        if (case.name, arm, seed) not in done
    ]
    with ProcessPoolExecutor(
        options.processes,
        mp_context=get_context("spawn"),
        initializer=_prepare,
        initargs=(options.optuna,),
    ) as pool:
        running = [pool.submit(search, *arguments) for arguments in wanted]
        for future in as_completed(running):
            row = future.result()
            found.append(row)
            if out:
                with out.open("a") as stream:
                    stream.write(json.dumps(row) + "\n")
            print(row["case"], row["arm"], row["seed"], f"{row['validation']:.4g}", flush=True)
    return found


def _prepare(optuna: Path | None) -> None:
    torch.set_num_threads(1)
    if optuna:
        sys.path.append(str(optuna.resolve()))


def errors_of(rows: list[dict[str, Any]], case: str, arm: str, key: str) -> dict[int, float]:
    return {row["seed"]: row[key] for row in rows if (row["case"], row["arm"]) == (case, arm)}


def show(rows: list[dict[str, Any]], cases: list[str], arms: list[str]) -> str:
    """Means over the seeds that all arms have, then ours against each rival, paired."""
    lines = []
    for case in cases:
        common = set.intersection(*(set(errors_of(rows, case, arm, "test")) for arm in arms))
        for arm in arms if common else ():
            some = [r for r in rows if (r["case"], r["arm"]) == (case, arm) and r["seed"] in common]
            means = {k: np.mean([r[k] for r in some]) for k in ("validation", "test", "trials")}
            share = np.mean([r["optimiser_s"] / r["budget_s"] for r in some])
            numbers = (
                f"{means['validation']:.4g}",
                f"{means['test']:.4g}",
                f"{means['trials']:.0f}",
            )
            lines.append((case, arm, str(len(common)), *numbers, f"{100 * share:.1f} %"))
    header = ("task", "search", "seeds", "validation MAE", "test MAE", "trials", "its own time")
    pairs = [line for rival in arms if rival != "ours" for line in _paired(rows, cases, rival)]
    header_2 = ("error", "ours against", "pairs", "won", "ratio (geometric mean)", "p, one-sided")
    return markdown(header, lines) + "\n\n" + markdown(header_2, pairs)


def _paired(rows: list[dict[str, Any]], cases: list[str], rival: str) -> Iterator[tuple[str, ...]]:
    for key in ("validation", "test"):
        logs = []
        for case in cases:
            ours, theirs = errors_of(rows, case, "ours", key), errors_of(rows, case, rival, key)
            logs += [np.log(ours[seed] / theirs[seed]) for seed in ours.keys() & theirs.keys()]
        if len(logs) < 5:
            continue
        p = wilcoxon(logs, alternative="less").pvalue
        ratio, won = np.exp(np.mean(logs)), sum(value < 0 for value in logs)
        yield key, rival, str(len(logs)), str(won), f"{ratio:.3f}", f"{p:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--optuna", type=Path, metavar="FOLDER", help="that optuna is in")
    parser.add_argument("--compositions", nargs="*", default=[], metavar="FILE:FORMULA:VALUE")
    parser.add_argument("--out", type=Path, help="JSON lines of the finished searches")
    parser.add_argument("--scale", type=float, default=1.0, help="of the budgets")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2, help="searches at a time")
    options = parser.parse_args()
    _prepare(options.optuna)
    arms = [arm for arm in ARMS if arm != "tpe" or importlib.util.find_spec("optuna")]
    cases = [stiffness(contrast, samples=400, epochs=5, test=TEST) for contrast in (50.0, 5.0)]
    cases += [composition(text, epochs=12, test=TEST) for text in options.compositions]
    print(f"load of the machine at the start: {machine()['load_at_start']}")
    if "tpe" not in arms:
        print(
            "tpe: left out, optuna is not here: pip install --target FOLDER optuna, --optuna FOLDER"
        )
    with tempfile.TemporaryDirectory() as folder:
        rows = searches(cases, arms, options, Path(folder))
    print("\n" + show(rows, [case.name for case in cases], arms))


if __name__ == "__main__":
    main()
