"""A trial on several devices: its ranks are actors in one placement group, kept from trial to trial."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import ray
import torch
from ray import tune
from ray.exceptions import RayActorError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dmi_hpc import collectives, knobs
from dmi_hpc.config import Recipe
from dmi_hpc.world import World
from search.cluster.capacity import Shape
from search.evolution.evolve import Failure
from search.records.kept import Kept
from search.trials.ending import Assignment
from search.trials.rank_trial import RankEvaluator, reserved_address
from search.trials.trial import Answer, TrialOutcome

GRACE_S = 15.0  # for the other ranks, once one has failed


class RankDied(Exception):
    """The process of a rank ended, and no rank says why."""


def bundles(shape: Shape, *, gpus: bool) -> tune.PlacementGroupFactory:
    """One placement group a trial: a bundle for each rank. Of several, the slot itself has none."""
    rank: dict[str, float] = {"CPU": float(shape.threads)}
    if gpus:
        rank["GPU"] = shape.gpu_share
    if shape.ranks == 1:
        return tune.PlacementGroupFactory([rank])
    return tune.PlacementGroupFactory([{}, *(dict(rank) for _ in range(shape.ranks))])


def worlds(nodes: Sequence[str]) -> list[World]:
    """World of each rank; nodes: where it runs.

    >>> [(w.rank, w.local_rank, w.local_size) for w in worlds(["a", "b", "a"])]
    [(0, 0, 2), (1, 0, 1), (2, 1, 2)]
    """
    return [
        World(rank, len(nodes), nodes[:rank].count(node), nodes.count(node), "torchrun")
        for rank, node in enumerate(nodes)
    ]


class RankProcess:
    """The actor of a rank."""

    def __init__(self) -> None:
        self._held = ExitStack()  # until the process ends

    def node(self) -> tuple[str, str]:
        """(id, address) of its node."""
        context = ray.get_runtime_context()
        return context.get_node_id(), ray.util.get_node_ip_address()

    def meeting(self, host: str | None) -> str:
        """Where the ranks meet: a new file if all are on this node, else a port of `host`."""
        if host is None:
            return f"file://{mkdtemp(prefix='dmi-rendezvous-')}/store"
        return self._held.enter_context(reserved_address(host))

    def join(
        self,
        world: World,
        url: str,
        recipe: Recipe,
        data: Path,
        memory_GB: float,
        kept: Path | None,
    ) -> None:
        """Become rank `world.rank` of a process group that lasts as long as the process."""
        os.environ[knobs.RENDEZVOUS] = url
        device = torch.device("cpu")
        if ray.get_gpu_ids():
            device = torch.device("cuda", 0)  # Ray shows a process nothing but its own
            torch.cuda.set_device(device)
        self._held.enter_context(collectives.group(world, device))
        self._evaluator = RankEvaluator(
            recipe, data, device, memory_GB, world, None if kept is None else Kept(kept)
        )

    def evaluate(
        self, genome: Mapping[str, Any], assignment: Assignment | None
    ) -> tuple[Answer, bool]:
        """(outcome, whether it is but the echo of another rank's)."""
        outcome = self._evaluator(genome, assignment)
        return outcome, self._evaluator.missed


class Ranks:
    """Evaluates genomes on `size` ranks, in the placement group of the actor that it lives in."""

    def __init__(
        self, recipe: Recipe, data: Path, memory_GB: float, size: int, kept: Path | None = None
    ) -> None:
        """kept: the search's folder, which all ranks see, for `Assignment`s."""
        self.spent = False  # a rank left the others: they all must go
        group = get_current_placement_group()
        self._actors = [_actor(group, rank, recipe.search.trial_threads) for rank in range(size)]
        nodes = ray.get([actor.node.remote() for actor in self._actors])
        one = len({node for node, _ in nodes}) == 1
        url = ray.get(self._actors[0].meeting.remote(None if one else nodes[0][1]))
        ray.get(
            [
                actor.join.remote(world, url, recipe, data, memory_GB, kept)
                for actor, world in zip(self._actors, worlds([n for n, _ in nodes]), strict=True)
            ]
        )

    def __call__(self, genome: Mapping[str, Any], assignment: Assignment | None = None) -> Answer:
        """A rank's answer, or the first failure that is a cause. RankDied if none says why."""
        told, died = self._gathered(
            [actor.evaluate.remote(genome, assignment) for actor in self._actors]
        )
        outcomes = [(answer, echo) for answer, echo in told if isinstance(answer, TrialOutcome)]
        causes = [
            outcome
            for outcome, echo in outcomes
            if isinstance(outcome.told, Failure) and not (echo or (died and _is_cut(outcome.told)))
        ]
        whole = len(told) == len(self._actors) and not any(echo for _, echo in told)
        if whole and (not causes or len(causes) == len(told)):
            return told[0][0]
        self.spent = True
        self.close()
        if not causes:
            raise RankDied(f"{len(died)} of {len(self._actors)} ranks died. {''.join(died[:1])}")
        return causes[0]

    def close(self) -> None:
        """End the ranks' processes."""
        for actor in self._actors:
            ray.kill(actor)

    def _gathered(self, asked: list[Any]) -> tuple[list[tuple[Answer, bool]], list[str]]:
        """What the ranks said, in order of their end, and Ray's word of those that died. Once one has
        failed, the others are waited for no longer than `GRACE_S`."""
        told: list[tuple[Answer, bool]] = []
        died: list[str] = []
        end: float | None = None
        while asked:
            left = None if end is None else max(0.0, end - time.monotonic())
            ready, asked = ray.wait(asked, timeout=left)
            if not ready:
                break
            try:
                answer, _ = last = ray.get(ready[0])
                told.append(last)
                failed = isinstance(answer, TrialOutcome) and isinstance(answer.told, Failure)
            except RayActorError as error:
                failed = True
                died.append(str(error))
            if failed and end is None:
                end = time.monotonic() + GRACE_S
        return told, died


def _is_cut(failure: Failure) -> bool:
    """Whether it may be what a collective says when the process at the other end is gone."""
    return failure.message.startswith(("RuntimeError", "DistBackendError", "DistNetworkError"))


def _actor(group: Any, rank: int, threads: int) -> Any:
    strategy = PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=rank
    )
    gpus = group.bundle_specs[rank].get("GPU", 0)
    return (
        ray.remote(RankProcess)
        .options(num_cpus=threads, num_gpus=gpus, scheduling_strategy=strategy)
        .remote()
    )
