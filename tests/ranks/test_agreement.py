"""What ranks decide together: all of them alike, whoever has the reason."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import ranks

from dmi_hpc.agreement import Agreement
from dmi_hpc.errors import TrialFailure

pytestmark = [pytest.mark.slow]


def agreement(world, why=None):
    """Over epochs of 10 steps of 4 rows; each rank's rows are 100 x rank + position."""
    loader = SimpleNamespace(
        batches=SimpleNamespace(batch_size=4),
        steps=lambda: 10,
        rows_of=lambda epoch, position: 100 * world.rank + position + np.arange(2),
    )
    return Agreement(loader, world, torch.device("cpu"), lambda: why)


def taken(world, broken, steps=5):
    made = agreement(world)
    made.begin(20)
    for step in range(steps):
        made.add(torch.tensor(torch.nan if step in broken else 1.0))
    return made


@ranks(2)
def test_one_rank_decides_for_all(world):
    made = agreement(world, why="a signal" if world.rank == 1 else None)
    made.begin(0)
    assert made.is_due(1)
    assert made.reach(1, save=world.rank == 1) == (True, False)  # the first says when to save
    assert made.why() == "a signal"
    made = agreement(world)
    made.begin(0)
    assert made.reach(4, save=world.is_first) == (False, True)
    assert [made.is_due(step) for step in (5, 13, 14)] == [False, False, True]  # at rank 0's pace

    # the first of the broken steps, of whichever rank; steps that were agreed on are past
    made = taken(world, broken=())
    assert made.reach(25, save=False) == (False, False)
    made = taken(world, broken=(4,) if world.rank == 0 else (2, 3))
    said = "epoch 2 step 22, rank 1: batch at position 8 of the epoch, rows 108 109 of the data"
    with pytest.raises(TrialFailure, match=said) as failed:
        made.reach(25, save=False)
    assert failed.value.kind == "nan"
