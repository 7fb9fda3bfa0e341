"""A rank that dies, stops, hangs or fails alone: the others end with an error that names it."""

import os
import re
import signal
import time

import pytest
import torch
from ranks import outcomes, ranks
from torch.nn.parallel import DistributedDataParallel

from dmi_hpc import collectives
from dmi_hpc.errors import DataError
from search.trials.rank_trial import reserved_address

pytestmark = [pytest.mark.slow]
TIMEOUT_S = 5  # of a collective; a rank that does not beat for 15 % of it counts as gone


def meet(world, folder):
    assert collectives.sum_(torch.ones(1)) == world.size
    assert collectives.gather_objects(world.rank) == list(range(world.size))
    assert set(collectives.gather_objects(folder)) == {folder}


@pytest.mark.parametrize("size", [1, 4])
def test_ranks_meet_and_leave_without_a_word(size, tmp_path):
    assert outcomes(meet, size, {"folder": tmp_path}) == [(0, "")] * size


@ranks(2, timeout_s=4)
def test_who_computes_or_is_busy_is_not_missed(world):
    """Longer than a collective may wait: all of them, then one that says so."""
    collectives.sum_(torch.ones(1))
    time.sleep(4.5)
    collectives.sum_(torch.ones(1))
    if world.rank == 0:
        with collectives.busy("a checkpoint"):
            time.sleep(5)
    collectives.sum_(torch.ones(1))


def test_who_never_came_is_named():
    for code, text in outcomes(meet, 1, timeout_s=TIMEOUT_S, environment={"WORLD_SIZE": "2"}):
        assert code == 1
        assert "rank 1 did not come. Check that every rank was started" in text


def step():
    """What a training does: a network's gradients, reduced in its backward pass."""
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    for number in range(3):
        collectives.at(f"step {number}")
        model(torch.ones(2, 4)).sum().backward()


def killed(world):
    step()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step()


def stopped(world):
    step()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    step()


def first_stopped(world):
    step()
    if world.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    step()


def asleep(world):
    step()
    if world.rank == 1:
        collectives.at("a sleep")
        time.sleep(60)
    step()


def failing(world):
    step()
    if world.rank == 1:
        raise ZeroDivisionError("the user's own bug")
    step()


def failing_alone(world):
    """An error that all ranks should have raised."""
    step()
    if world.rank == 1:
        raise DataError("no such file")
    step()


@pytest.mark.parametrize(
    ("body", "size", "says"),
    [
        (killed, 3, r"rank 1 \(host .+\) was last heard of \d+ s ago, at (the start|step)"),
        (stopped, 2, r"rank 1 \(host .+\) was last heard of \d+ s ago, at (the start|step)"),
        (asleep, 2, r"rank 1 \(host .+\) is alive, but for \d+ s it has not come from a sleep"),
        (failing, 2, r"rank 1 \(host .+\) has ended: ZeroDivisionError: the user's own bug"),
        (failing_alone, 2, r"rank 1 \(host .+\) has ended: no such file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_others_name_the_rank_that_is_missing(body, size, says):
    ended = outcomes(body, size, timeout_s=TIMEOUT_S)
    for rank in {0, size - 1} - {1}:
        code, text = ended[rank]
        assert code in (1, 69), text  # 1: a traceback of this test's process
        assert re.search(f"rank {rank} lost another rank: {says}", text), text


def test_the_rank_that_keeps_the_rendezvous_may_be_the_missing_one():
    with reserved_address("127.0.0.1") as address:
        _, (code, text) = outcomes(
            first_stopped,
            2,
            timeout_s=TIMEOUT_S,
            environment={"DMI_RENDEZVOUS": address},
        )
    assert code in (1, 69), text
    assert "rank 1 lost another rank: rank 0 " in text
