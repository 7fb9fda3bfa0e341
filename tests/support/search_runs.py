"""A run with a journal of four evaluated networks, without a search having run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from runner import toy_recipe

from dmi_hpc.config import load_recipe
from dmi_hpc.files import append_json_line
from dmi_hpc.run import Run, open_run
from dmi_hpc.tasks import make_task
from search.spaces.genome import to_json
from search.spaces.networks import Networks

FITNESS = (0.5, 0.3, 0.4, 0.2)


def searched_run(folder: Path, data: Path) -> Run:
    """Networks 0 to 3 have `FITNESS` and batches of 8, 16, 32, 64 rows; those of 16 fail."""
    path = toy_recipe(folder / "toy.toml", data, 'faults = { 16 = "nan" }', train="epochs = 3")
    run = open_run(folder / "run", load_recipe(path))
    defaults = {"batch_size": 20, "learning_rate": 1e-2}
    space = Networks(make_task(run.recipe.task).space(), defaults)
    run.search.mkdir()
    journal = run.search / "journal.jsonl"
    header = {"event": "header", "version": 1, "seed": 3, "space": "", "config": {}, "time": 0.0}
    append_json_line(journal, header)
    for i, fitness in enumerate(FITNESS):
        genome = to_json(space.random(np.random.default_rng(i)))
        genome["hyper"] |= {"batch_size": 8 * 2**i}
        identity = space.identity(space.from_json(genome))
        ask = {"genome": genome, "hash": identity, "origin": "random", "parents": []}
        tell = {"status": "ok", "fitness": fitness, "metrics": {"flops": 10.0 + i}, "seconds": 0.5}
        append_json_line(journal, {"event": "ask", "id": i, "time": 1.0 + i, **ask})
        append_json_line(journal, {"event": "tell", "id": i, "time": 1.5 + i, **tell})
    return run
