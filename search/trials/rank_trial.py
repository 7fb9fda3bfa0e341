"""One rank of a trial of several: the same evaluation as alone, all ranks deciding together."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dmi_hpc.config import Recipe, TrainConfig
from dmi_hpc.errors import Interrupted, RankLost, TrialFailure
from dmi_hpc.job import Job
from dmi_hpc.train import fit
from dmi_hpc.world import World
from search.spaces.genome import Genome, decode
from search.trials.trial import Deadline, Evaluator, trial_config, watchdog

# of [train]: how the ranks share the work, which a trial on one device has no use for
SHARING = ("engine", "zero_stage", "offload", "deepspeed")


class SharedDeadline(Deadline):
    """Asks all ranks to stop at the time limit: one that left alone would be missed."""

    def must_stop(self) -> str | None:
        if self._limit_s is not None and time.monotonic() - self._started > self._limit_s:
            return f"not finished after {self._limit_s:g} s"
        return None


class RankEvaluator(Evaluator):
    """Evaluates genomes as rank `world.rank`; the process group exists already."""

    def __init__(
        self, recipe: Recipe, data: Path, device: torch.device, memory_GB: float, world: World
    ) -> None:
        super().__init__(recipe, data, device, memory_GB)
        self._world = world
        self.missed = False  # another rank was lost: what this one says is no cause

    def _train(self, genome: Genome) -> tuple[float, dict[str, float]]:
        network, config = decode(genome, self._space.network), rank_config(self._recipe, genome)
        rows = -(-config.batch_size // self._world.size)
        costs = self._costs(network, rows)  # the same on all ranks, but for the latency
        job = Job(
            self._problem, network, config, self._recipe.seed, self._world, device=self._device
        )
        limit_s = self._recipe.search.trial_time_limit_s
        try:
            with watchdog(limit_s):
                result = fit(job, SharedDeadline(limit_s), resume=False, warn=_unheard)
        except Interrupted as stopped:
            raise TrialFailure("timeout", str(stopped)) from stopped
        except RankLost:
            self.missed = True
            raise
        best = result.history[result.best_epoch]
        return result.best_mae, {
            **costs,
            "epochs": float(result.epochs),
            "ranks": float(self._world.size),
            "validation_rmse": best.validation_rmse,
            "validation_r2": best.validation_r2,
        }


def rank_config(recipe: Recipe, genome: Genome) -> TrainConfig:
    """[train] of a trial on several ranks: with the recipe's engine, unless search.train has one."""
    shared = {name: getattr(recipe.train, name) for name in SHARING}
    own = {name: value for name, value in shared.items() if name not in recipe.search.train}
    return trial_config(recipe, genome).model_copy(update=own)


@contextmanager
def reserved_address(host: str) -> Iterator[str]:
    """tcp://host:port that no other process is given while the block runs.

    The port stays bound, but not listened at: the store of torch.distributed may bind it too (both
    set SO_REUSEADDR), while the kernel hands it to nobody who asks for any free one.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, 0))
        yield f"tcp://{host}:{held.getsockname()[1]}"


def _unheard(message: str) -> None:
    """A trial resumes nothing, so `fit` has nothing to warn of."""
