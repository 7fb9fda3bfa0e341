"""Nodes of a Ray cluster that come late, go and return, without Ray."""

import socket
import time

import pytest

from dmi_hpc import knobs
from dmi_hpc.errors import LaunchError
from search.cluster import nodes
from search.cluster.capacity import Shape, held
from search.cluster.nodes import Room, arrived, wait_for_nodes
from search.progress import Progress
from search.records.history import Clock

CPU8 = {"CPU": 8.0, "memory": 1e10}
GPU4 = {**CPU8, "GPU": 4.0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(nodes, "LOOK_S", 0.001)


def coming(*looks):
    """What is seen, look by look; the last one for ever."""
    left = list(looks)
    return lambda: left.pop(0) if len(left) > 1 else left[0]


def test_all_nodes_are_waited_for():
    seen = arrived(coming([], ["a"], ["a", "b"], ["b", "a", "c"]), 3, time.monotonic() + 20)
    assert seen == ["a", "b", "c"]


def test_those_that_came_go_on_when_no_further_one_does(monkeypatch):
    monkeypatch.setattr(nodes, "SETTLED_S", 0.01)
    assert arrived(coming([], ["a"], ["a", "b"]), 3, time.monotonic() + 20) == ["a", "b"]


def test_the_wait_has_an_end():
    assert arrived(coming([]), 3, time.monotonic()) == []
    assert arrived(coming(["a"]), 3, time.monotonic()) == ["a"]


def test_no_head_and_no_node_are_errors(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(LaunchError, match=rf"no Ray cluster came up at {address} within 0\.01 s"):
        wait_for_nodes(address, 2, 0.01, lambda head: [])
    monkeypatch.setattr(nodes, "reachable", lambda address: True)
    with pytest.raises(LaunchError, match=r"none of 2 nodes joined it"):
        wait_for_nodes(address, 2, 0.01, lambda head: [])
    one = "1 of 2 nodes have joined Ray: 10.0.0.7"
    assert wait_for_nodes(address, 2, 0.01, lambda head: ["10.0.0.7"]) == one
    assert wait_for_nodes(address, 1, 0.01, lambda head: ["10.0.0.7"]) == ""


def test_the_number_of_nodes_is_one(monkeypatch):
    monkeypatch.delenv(knobs.RAY_NODES, raising=False)
    assert knobs.ray_nodes() == 0
    monkeypatch.setenv(knobs.RAY_NODES, "four")
    with pytest.raises(LaunchError, match="DMI_RAY_NODES: found 'four'"):
        knobs.ray_nodes()
    monkeypatch.setenv(knobs.RAY_WAIT_S, "-1")
    with pytest.raises(LaunchError, match=r"DMI_RAY_WAIT_S: found '-1', expected seconds"):
        knobs.ray_wait_s()


@pytest.mark.parametrize(
    ("shape", "gpus", "trials"),
    [
        (Shape(2), False, 8),
        (Shape(2), True, 4),
        (Shape(1, 4), True, 1),
        (Shape(1, 1, 0.5), True, 8),
        (Shape(16), False, 0),
    ],
)
def test_trials_that_nodes_hold_with_none_as_an_answer(shape, gpus, trials):
    assert held([CPU8, GPU4, {}], shape, gpus=gpus) == trials


def test_room_follows_the_nodes_but_asks_seldom():
    now, asked = [0.0], []

    def resources():
        asked.append(now[0])
        now[0] += 0.1  # what an answer takes: of 9,000 nodes
        return [CPU8] * len(asked)

    room = Room(Shape(1), 20, resources, clock=lambda: now[0])
    assert (room(), room()) == (8, 8)
    now[0] = 2.0
    assert room() == 8
    now[0] = 2.2
    assert room() == 16
    now[0] = 5.0
    assert room() == 20  # as many as the recipe wants
    assert len(asked) == 3


def test_utilisation_is_of_the_workers_that_there_were(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("search.progress.time.monotonic", lambda: now[0])
    progress = Progress(budget=10, workers=4, started=100.0)
    now[0] = 110.0
    progress.employ(2)
    now[0] = 120.0
    progress.busy_s = 30.0
    assert progress.utilisation == pytest.approx(30 / (4 * 10 + 2 * 10))


def test_so_it_is_in_the_journal():
    clock = Clock()
    for event in (
        {"event": "header", "time": 0.0, "config": {"workers": 4}},
        {"event": "workers", "time": 10.0, "workers": 2},
        {"event": "tell", "time": 20.0, "seconds": 5.0},
    ):
        clock.advance(event)
    assert (clock.workers, clock.worker_s) == (2, 4 * 10 + 2 * 10)
