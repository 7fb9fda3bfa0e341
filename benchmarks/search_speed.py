"""What the search itself costs: one ask and one tell with a history, surrogate on.

    python benchmarks/search_speed.py [--history 50 200 800 10000] [--rounds 500] [--pending 256]
        [--freeze]

Each history is told without being timed; then rounds of one ask and one tell, with so many evaluations
outstanding. Spaces: networks of three-dimensional convolutions, and plain parameters. Now and then
Python's garbage collector looks at everything, 10,000 networks included: that is the worst case,
unless they are frozen (``gc.freeze``).
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import deque
from typing import Any

import numpy as np

from dmi_hpc.models.space import Choice, FloatRange, NetworkSpace, SearchSpace
from search.base import Space
from search.evolution.evolve import Evolution, EvolutionConfig, Proposal, Success
from search.spaces.networks import Networks
from search.spaces.parameters import Integer, Parameters, Real

NETWORKS = SearchSpace(
    network=NetworkSpace(input_shape=(1, 15, 15, 15), conv_blocks=(1, 6)),
    hyper={
        "learning_rate": FloatRange(low=1e-5, high=1e-1, log=True),
        "batch_size": Choice(values=(8, 16, 32, 64), ordered=True),
        "optimizer": Choice(values=("adam", "adamw", "sgd")),
    },
)
PARAMETERS = {
    "batch_size": Integer(low=16, high=512, log=True),
    "learning_rate": Real(low=1e-4, high=1e-1, log=True),
    **{f"x{i}": Real(low=0.0, high=1.0) for i in range(5)},
}


def spaces() -> dict[str, Space[Any]]:
    return {"networks": Networks(NETWORKS), "parameters": Parameters(PARAMETERS)}


def fitness(space: Space[Any], genome: Any) -> Success:
    """Anything smooth."""
    (row,) = space.features([genome])
    return Success(float(((row - 0.4) ** 2).sum()))


def grown(space: Space[Any], history: int, pending: int) -> tuple[Evolution[Any], deque[int]]:
    """A search with that many evaluations behind it, and that many outstanding."""
    evolution = Evolution(space, EvolutionConfig())
    rng = np.random.default_rng(0)
    best = [space.random(rng) for _ in range(16)]
    for number in range(history):
        # as a search would: ever more of what is good
        genome = space.mutated(best[int(rng.integers(16))], rng)
        if number % 20 == 0:
            genome = space.random(rng)
            best[number // 20 % 16] = genome
        identity = space.identity(genome)
        evolution.restore_ask(Proposal(number, genome, "mutation", (), identity))
        evolution.tell(number, fitness(space, genome))
    return evolution, deque(evolution.ask().id for _ in range(pending))


def rounds(evolution: Evolution[Any], running: deque[int], count: int) -> np.ndarray:
    """(count,) milliseconds of one tell and one ask."""
    spent = []
    for _ in range(count):
        number = running.popleft()
        outcome = fitness(evolution.space, evolution.proposals[number].genome)
        begin = time.perf_counter()
        evolution.tell(number, outcome)
        proposal = evolution.ask()
        spent.append(1e3 * (time.perf_counter() - begin))
        running.append(proposal.id)
    return np.array(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--history", type=int, nargs="+", default=[10_000])
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--pending", type=int, default=256)
    parser.add_argument(
        "--freeze", action="store_true", help="spare the history from Python's garbage collection"
    )
    options = parser.parse_args()
    print("| space | history | median ms | mean | 99 % | worst |\n|---|---|---|---|---|---|")
    for history in options.history:
        for name, space in spaces().items():
            evolution, running = grown(space, history, options.pending)
            if options.freeze:
                gc.collect()
                gc.freeze()
            spent = rounds(evolution, running, options.rounds)
            cells = (np.median(spent), spent.mean(), np.quantile(spent, 0.99), spent.max())
            figures = " | ".join(f"{value:.1f}" for value in cells)
            print(f"| {name} | {history} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
