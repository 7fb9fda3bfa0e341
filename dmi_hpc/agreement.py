"""What the ranks of a training decide together every few steps, by one small all-reduce."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from dmi_hpc import collectives
from dmi_hpc.data.loader import Loader
from dmi_hpc.errors import TrialFailure
from dmi_hpc.world import World

# They agree every so many steps, or after so many seconds if that is sooner.
AGREE_EVERY, AGREE_S = 10, 1.0


class Decision(NamedTuple):
    """The same on all ranks."""

    stop: bool  # one of them was asked to
    save: bool  # rank 0 says that a checkpoint is due


class Agreement:
    """Takes each step's loss; at times all ranks stop, save or fail because one of them must.

    Losses stay on the device until then: reading one each step would make a GPU wait.
    """

    def __init__(
        self,
        loader: Loader[Any],
        world: World,
        device: torch.device,
        must_stop: Callable[[], str | None],
    ) -> None:
        """must_stop: why this rank is to end, if it is."""
        self._loader, self._world, self._device = loader, world, device
        self._must_stop = must_stop
        self._why: str | None = None  # this rank was asked to stop
        self._losses: list[torch.Tensor] = []  # since the last agreement
        self._step, self._time, self._interval = 0, 0.0, 1

    def begin(self, step: int) -> None:
        """An epoch begins after so many steps; what lies between epochs is no step's time."""
        self._step, self._time = step, time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        """Loss of one more step, not read here; not finite: the training is to fail."""
        self._losses.append(loss)

    def is_due(self, step: int) -> bool:
        """Whether the ranks agree after that step, besides the last one of an epoch."""
        return step - self._step >= self._interval

    def reach(self, step: int, *, save: bool) -> Decision:
        """Collective, after `step` steps. TrialFailure("nan") if a loss was not finite on any rank.

        save: a checkpoint is due; heard from rank 0 only.
        """
        finite = []
        if self._losses:  # reading them waits for the device
            finite = torch.isfinite(torch.stack(self._losses)).tolist()
        steps, seconds = step - self._step, time.perf_counter() - self._time
        first = self._world.is_first
        pace = steps_between(steps, seconds) if first and steps else 0
        why = self._must_stop()
        self._why = why or self._why
        mine = (not all(finite), why is not None, pace, save and first)
        shared: list[float] = collectives.sum_(
            torch.tensor(mine, dtype=torch.float64, device=self._device)
        ).tolist()
        if shared[0] > 0:
            self._fail(step, finite)
        self._losses.clear()
        self._interval = int(shared[2]) or self._interval
        self._step, self._time = step, time.perf_counter()
        return Decision(stop=shared[1] > 0, save=shared[3] > 0)

    def why(self) -> str:
        """Collective, once it was decided to stop: what the first rank that was asked to was told."""
        why: str = next(filter(None, collectives.gather_objects(self._why)))
        return why

    def _fail(self, step: int, finite: list[bool]) -> None:
        """All ranks together: name the first step whose loss or gradient was not finite."""
        mine = None
        if not all(finite):
            broken = step - len(finite) + finite.index(False)
            epoch, of_epoch = divmod(broken, self._loader.steps())
            position = of_epoch * self._loader.batches.batch_size
            rows = self._loader.rows_of(epoch, position)
            mine = broken, epoch, position, rows[:8].tolist(), len(rows)
        found = [
            (*where, rank)
            for rank, where in enumerate(collectives.gather_objects(mine))
            if where is not None
        ]
        broken, epoch, position, rows, count, rank = min(found)
        more = " ..." if count > len(rows) else ""
        raise TrialFailure(
            "nan",
            f"loss or gradient is not finite at epoch {epoch} step {broken}, rank {rank}: batch at "
            f"position {position} of the epoch, rows {' '.join(map(str, rows))}{more} of the data set",
        )


def steps_between(steps: int, seconds: float) -> int:
    """Steps to the next agreement, if `steps` have taken `seconds`."""
    return max(1, min(AGREE_EVERY, int(AGREE_S * steps / max(seconds, 1e-9))))
