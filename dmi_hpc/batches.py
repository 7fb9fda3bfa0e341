"""The batches of a training: read, prepared for a step, and cut into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from dmi_hpc import collectives
from dmi_hpc.data.access import order_of
from dmi_hpc.data.loader import Batch, Loader
from dmi_hpc.job import Job
from dmi_hpc.models.graphs import tensors_of
from dmi_hpc.problem import Problem

# (rows of the global batch, rows of this rank's share that are no padding), and inputs, targets and
# weights of the share
Prepared = tuple[tuple[int, int], dict[str, torch.Tensor]]

_ROWS_AT_ONCE, _MOST_ROWS = 2**13, 2**20  # of statistics


def make_loader(job: Job) -> Loader[Prepared]:
    """Collective: this rank's shares of the training rows, ready for a step."""
    shards, rows = job.problem.shards, job.problem.train_rows
    order = order_of(
        shards,
        job.problem.fields,
        len(rows),
        batch_size=job.config.batch_size,
        seed=job.seed,
        shuffle=job.problem.shuffle,
    )
    return Loader(
        shards,
        rows,
        job.problem.fields,
        # a window of shuffling follows the node's memory: rank 0's is everybody's
        collectives.gather_objects(order)[0],
        batch_size=job.config.batch_size,
        prepare=partial(_prepare, job),
        rank=job.world.rank,
        size=job.world.size,
        threads=job.config.loader_threads,
        pin=job.device.type == "cuda",
    )


def _prepare(job: Job, batch: Batch) -> Prepared:
    """Runs in the loader's threads."""
    problem, task = job.problem, job.problem.task
    inputs = task.inputs(batch.fields)
    # graphs of distances have no symmetry that would change them
    if job.config.augment and isinstance(inputs, np.ndarray):
        inputs = task.augment(inputs, batch.bits())
    arrays = {
        "targets": problem.scale.scale(problem.target(batch.fields)),
        "weights": batch.weights,
    }
    real = int(batch.weights.sum())
    return (batch.stop - batch.start, real), tensors_of(inputs) | {
        name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()
    }


def training_inputs(problem: Problem) -> Iterator[torch.Tensor]:
    """Inputs of the training rows, (n, F) at once; of very many, every so many-th row."""
    rows = problem.train_rows[:: -(-len(problem.train_rows) // _MOST_ROWS)]
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        some = np.asarray(rows[start : start + _ROWS_AT_ONCE])
        made = problem.task.network_inputs(problem.shards.fields(problem.task.input_fields, some))
        assert isinstance(made, np.ndarray), "only vectors are standardized"
        yield torch.from_numpy(made)


def micro_batches(share: int, real: int, accumulation: int) -> list[slice]:
    """Parts of a rank's share, `real` of whose rows are no padding: equally many on all ranks.

    Padding would count in batch statistics; only a part without other rows keeps one, of weight 0.
    """
    parts = min(accumulation, share)
    cuts = [share * part // parts for part in range(parts + 1)]
    return [slice(start, max(start + 1, min(stop, real))) for start, stop in pairwise(cuts)]


def micro_batch_sizes(rows: int, ranks: int, accumulation: int) -> list[int]:
    """Rows of each micro-batch, over all ranks, of a global batch of `rows`: they sum to it."""
    share = -(-rows // ranks)
    sizes = []
    for rank in range(ranks):
        real = min(max(rows - rank * share, 0), share)
        parts = micro_batches(share, real, accumulation)
        sizes += [min(part.stop, real) - part.start for part in parts if part.start < real]
    return sizes
