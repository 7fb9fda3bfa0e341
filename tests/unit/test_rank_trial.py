"""Ranks of a trial: where they meet, how they are numbered, how they stop."""

import multiprocessing
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import TCPStore

from dmi_hpc.world import World
from search.cluster.capacity import Shape
from search.cluster.devices import bundles, worlds
from search.trials.rank_trial import SharedDeadline, reserved_address

PROCESSES, ROUNDS = 24, 3


def _meet(number, barrier, queue):
    """All at once: choose a port, then open a store there, as rank 0 of a trial does."""
    ports = []
    for turn in range(ROUNDS):
        barrier.wait(60)
        with reserved_address("127.0.0.1") as url:
            port = int(url.rpartition(":")[2])
            barrier.wait(60)  # the others choose too, before anybody listens
            store = TCPStore("127.0.0.1", port, 1, True, timedelta(seconds=20))
            store.set("who", f"{number}.{turn}")
            ports.append((turn, port, store.get("who").decode() == f"{number}.{turn}"))
            barrier.wait(60)
        del store
    queue.put(ports)


@pytest.mark.slow
def test_two_dozen_processes_never_choose_the_same_port():
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(PROCESSES), context.Queue()
    processes = [
        context.Process(target=_meet, args=(n, barrier, queue), daemon=True)
        for n in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    found = [entry for _ in processes for entry in queue.get(timeout=100)]
    for process in processes:
        process.join(30)
    assert [p.exitcode for p in processes] == [0] * PROCESSES
    assert all(own for _, _, own in found)
    for turn in range(ROUNDS):
        ports = [port for t, port, _ in found if t == turn]
        assert len(set(ports)) == PROCESSES


def test_ranks_are_numbered_within_their_nodes():
    assert worlds(["a", "b", "a", "a"]) == [
        World(0, 4, 0, 3, "torchrun"),
        World(1, 4, 0, 1, "torchrun"),
        World(2, 4, 1, 3, "torchrun"),
        World(3, 4, 2, 3, "torchrun"),
    ]


@pytest.mark.parametrize(
    ("shape", "gpus", "expected"),
    [
        (Shape(2), False, [{"CPU": 2.0}]),
        (Shape(1, gpu_share=0.25), True, [{"CPU": 1.0, "GPU": 0.25}]),
        (Shape(2, ranks=3), True, [{"CPU": 2.0, "GPU": 1.0}] * 3),
    ],
)
def test_one_bundle_a_rank(shape, gpus, expected):
    assert bundles(shape, gpus=gpus).bundles == expected


def test_a_rank_asks_to_stop_and_does_not_leave_alone():
    assert SharedDeadline(None).must_stop() is None
    assert SharedDeadline(1000.0).must_stop() is None
    assert SharedDeadline(0.0).must_stop() == "not finished after 0 s"
