"""One rank of a trial of several: the same evaluation as alone, all ranks deciding together."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from dmi_hpc import checkpoint, collectives
from dmi_hpc.config import Recipe, TrainConfig
from dmi_hpc.errors import Interrupted, RankLost, TrialFailure, together
from dmi_hpc.job import Job, Result
from dmi_hpc.train import fit
from dmi_hpc.world import World
from search.records.kept import Kept, Origin
from search.spaces.genome import Genome, decode
from search.trials.ending import Assignment, Deadline, Pause, TimeIsOver, watchdog
from search.trials.trial import Evaluator, Measured, is_there, kept_config, scores, trial_config

T = TypeVar("T")

# of [train]: how the ranks share the work, which a trial on one device has no use for
SHARING = ("engine", "zero_stage", "offload", "deepspeed")


class SharedDeadline(Deadline):
    """Asks all ranks to stop at the time limit: one that left alone would be missed."""

    def must_stop(self) -> str | None:
        return self.late()


class SharedPause(Pause):
    """Lets all ranks stop with a checkpoint; rank 0 alone says whether the goal is reached."""

    was_late = False

    def must_stop(self) -> str | None:
        late = self.late()
        self.was_late = late is not None
        return late or self.ends()


class RankEvaluator(Evaluator):
    """Evaluates genomes as rank `world.rank`; the process group exists already."""

    def __init__(
        self,
        recipe: Recipe,
        data: Path,
        device: torch.device,
        memory_GB: float,
        world: World,
        kept: Kept | None = None,
    ) -> None:
        super().__init__(recipe, data, device, memory_GB, kept)
        self._world = world
        self.missed = False  # another rank was lost: what this one says is no cause

    def _train(self, genome: Genome) -> tuple[float, dict[str, float]]:
        network = decode(genome, self._space.network)
        # the same on all ranks, but for the latency
        config, costs = self._fitted(network, rank_config(self._recipe, genome), self._world.size)
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
        return result.best_error, {**costs, **scores(result), "ranks": float(self._world.size)}

    def _train_on(self, genome: Genome, assignment: Assignment) -> Measured:
        """As on one rank, without inheritance. Rank 0 keeps what is kept, and all say what it says."""
        assert self._kept is not None, "assignments need a place for what is kept"
        number, network = assignment.number, decode(genome, self._space.network)
        config = kept_config(rank_config(self._recipe, genome))
        config, costs = self._fitted(network, config, self._world.size)
        job = Job(
            self._problem,
            network,
            config,
            self._recipe.seed,
            self._world,
            device=self._device,
            checkpoints=self._kept.checkpoints(number),
            saves_epochs=assignment.lasting,
        )
        costs["ranks"] = float(self._world.size)
        try:
            if not assignment.lasting:
                result, _ = self._run(job, assignment, Origin())
                assert result is not None, "it has no goal to pause at"
                return result.best_error, {**costs, **scores(result)}, ()
            origin, there = self._first(lambda kept: _begun(kept, job, assignment))
            if not there:
                _, origin = self._run(job, assignment, origin)
            fitness, found, curve = self._first(lambda kept: self._told(kept, job, number, origin))
        except RankLost:
            self.missed = True
            raise
        return fitness, {**costs, **found}, curve

    def _run(
        self, job: Job, assignment: Assignment, origin: Origin
    ) -> tuple[Result | None, Origin]:
        """Train on until the end, or (no result) until the goal; and `origin` with the seconds that it
        took so far on rank 0. Raises TimeIsOver on all ranks."""
        limit_s = self._recipe.search.trial_time_limit_s
        goal = assignment.goal if self._world.is_first else None
        pause = SharedPause(limit_s, goal, origin.seconds, assignment.end)
        result: Result | None = None
        why = ""
        try:
            with watchdog(limit_s):
                result = fit(job, pause, resume=True, warn=_unheard)
        except Interrupted as stopped:
            why = str(stopped)
        told = collectives.gather_objects((pause.reached, pause.seconds, pause.was_late))
        paused, seconds, _ = told[0]
        if result is None and not paused:
            if any(late for *_, late in told):
                raise TrialFailure("timeout", why)
            raise TimeIsOver
        return result, replace(origin, seconds=seconds)

    def _told(self, kept: Kept, job: Job, number: int, origin: Origin) -> Measured:
        kept.save_origin(number, origin)
        return self._measured(job, number)

    def _first(self, act: Callable[[Kept], T]) -> T:
        """What rank 0 gets from an action on files, on all ranks."""
        assert self._kept is not None
        found: T | None = None
        with together(collectives.gather_objects):
            if self._world.is_first:
                found = act(self._kept)
        shared: T = collectives.gather_objects(found)[0]
        return shared


def _begun(kept: Kept, job: Job, assignment: Assignment) -> tuple[Origin, bool]:
    """What the trial began with, and whether it has reached its goal already."""
    if checkpoint.latest(kept.checkpoints(assignment.number), _unheard) is None:
        kept.save_origin(assignment.number, Origin())
    origin = kept.origin(assignment.number)
    return origin, is_there(job, assignment.goal, origin.seconds)


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
