"""Reading a search again: a journal of N evaluations replayed (what --resume does) and summed up.

python benchmarks/search_replay.py [--evaluations 10000]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from dmi_hpc.models.space import Choice, FloatRange, NetworkSpace, SearchSpace
from search.evolution.evolve import Evolution, EvolutionConfig
from search.records.journal import Journal, replay
from search.records.lines import encode
from search.records.status import Observer
from search.spaces.networks import Networks

SPACE = SearchSpace(
    network=NetworkSpace(input_shape=(1, 15, 15, 15), conv_blocks=(1, 4)),
    hyper={
        "batch_size": Choice(values=(8, 16, 32), ordered=True),
        "learning_rate": FloatRange(low=1e-5, high=1e-1, log=True),
    },
)


def write(path: Path, evolution: Evolution, evaluations: int) -> None:
    """A journal of random networks with random fitness."""
    space, rng, known = evolution.space, np.random.default_rng(0), {}
    while len(known) < evaluations:
        genome = space.random(rng)
        known.setdefault(space.identity(genome), genome)
    Journal.create(path, evolution, {"workers": 16})
    with path.open("ab") as stream:
        for number, (identity, genome) in enumerate(known.items()):
            ask = {"genome": space.to_json(genome), "hash": identity, "origin": "random"}
            tell = {"status": "ok", "fitness": rng.random(), "seconds": 1.0, "metrics": {}}
            for event, content in (("ask", {**ask, "parents": []}), ("tell", tell)):
                stream.write(encode({"event": event, "time": time.time(), "id": number, **content}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluations", type=int, default=10_000)
    count = parser.parse_args().evaluations
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        write(path, Evolution(Networks(SPACE), EvolutionConfig()), count)
        print(f"{count} evaluations, {path.stat().st_size / 1e6:.1f} MB")
        journal, began = Journal(path), time.process_time()
        journal.events()
        print(f"read and checked: {time.process_time() - began:.2f} s of one core")
        began = time.process_time()
        replay(journal, Evolution(Networks(SPACE), EvolutionConfig()))
        print(f"read and replayed: {time.process_time() - began:.2f} s")
        observer, began = Observer(path), time.process_time()
        observer.look(time.time())
        print(f"first status: {time.process_time() - began:.2f} s")


if __name__ == "__main__":
    main()
