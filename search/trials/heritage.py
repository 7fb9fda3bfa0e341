"""Whether a child begins with weights of a parent: if, before it is trained, they are worth something.

What fits in shape need not fit in function: after a convolution that is new, or lost, inherited
weights often err like random ones, and a training gains nothing by them. So they are tried on the
validation split first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import torch

from dmi_hpc import checkpoint
from dmi_hpc.config import StartConfig
from dmi_hpc.evaluate import evaluate_rows
from dmi_hpc.job import Job
from dmi_hpc.models.build import build
from dmi_hpc.models.vectors import standardizes
from search.records.kept import Origin, Trained
from search.trials.inherit import Weights, inherited

# Of the epochs of a training from scratch, for a child that inherits. After so many its mean error was
# 0.85 (compositions) and 0.90 (volumes) of that after all: benchmarks/search_inheritance.py.
SHARE_OF_EPOCHS = 0.5


@dataclass(frozen=True)
class Heritage:
    """Weights that a child begins with, and whose they are."""

    weights: Weights
    origin: Origin


def heritage(job: Job, parents: Sequence[tuple[int, Trained]], number: int) -> Heritage | None:
    """What child `number` begins with: of all parents' weights those that err least, if they err less
    than half way, in logarithms, from the better parent's error to that of the new network.

    parents: their ids and what is kept of them.
    """
    if not parents or job.network.graph is not None:  # layers of graphs are not matched
        return None
    torch.manual_seed(job.seed)  # the weights that `fit` would begin with
    fresh = build(job.network).state_dict()
    known = parents[0][1].weights  # all standardize alike, by the training rows
    fresh |= {name: tensor for name, tensor in known.items() if standardizes(name)}
    ignorant, least, found = _error(job, fresh), np.inf, None
    best = min(trained.error for _, trained in parents)
    for parent, trained in parents:
        rng = np.random.default_rng([job.seed, number])
        weights, report = inherited(job.network, fresh, trained.network, trained.weights, rng)
        error = _error(job, weights)
        if error < least and error <= sqrt(best * ignorant):
            least = error
            found = Heritage(weights, Origin(parent, report.share, trained.epochs))
    return found


def _error(job: Job, weights: Weights) -> float:
    """Mean absolute validation error, the task's unit; nan if that is what comes out."""
    module = build(job.network).to(job.device)
    module.load_state_dict(weights)
    rows, config = job.problem.shards.rows("validation"), job.config
    batch_size, threads = config.batch_size, config.loader_threads
    return evaluate_rows(job.problem, module, rows, batch_size, job.world, threads=threads).error


def beginning_with(job: Job, weights: Weights, folder: Path) -> Job:
    """The job, from these weights. They are written below `folder`, for `fit` to read."""
    problem = job.problem
    about = checkpoint.Meta(
        step=0,
        epoch=0,
        network=job.network,
        scale=problem.scale,
        task=problem.task.recipe_options(),
    )
    start = StartConfig(path=checkpoint.save(folder, about, weights, {}), rescale_head=False)
    return replace(job, config=job.config.model_copy(update={"start": start}))


def shortened(job: Job) -> Job:
    """The job of a child that inherits: with its own, shorter schedule of the learning rate."""
    epochs = ceil(SHARE_OF_EPOCHS * job.config.epochs)
    return replace(job, config=job.config.model_copy(update={"epochs": epochs}))
