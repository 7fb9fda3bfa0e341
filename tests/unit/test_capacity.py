"""How many trials fit: of several ranks, of shares of a GPU."""

import pytest

from dmi_hpc.errors import LaunchError
from search.cluster.capacity import Capacity, Shape, capacity

NODE = {"CPU": 16.0, "GPU": 4.0, "memory": 64e9}


@pytest.mark.parametrize(
    ("ranks", "share", "expected"),
    [
        (1, 1.0, Capacity(8, 16.0, True)),
        (2, 1.0, Capacity(4, 16.0, True)),
        (3, 1.0, Capacity(2, 16.0, True)),
        (8, 1.0, Capacity(1, 16.0, True)),
        (1, 0.25, Capacity(32, 4.0, True)),
        (1, 0.3, Capacity(24, 64 / 12, True)),  # three on each, never a bit of two
        (1, 0.1, Capacity(32, 4.0, True)),  # the CPUs hold no more
    ],
)
def test_trials_of_two_nodes_with_gpus(ranks, share, expected):
    found = capacity([NODE, NODE], 1, ranks, share)
    assert (found.workers, found.gpus) == (expected.workers, expected.gpus)
    assert found.memory_GB == pytest.approx(expected.memory_GB)


def test_ranks_on_cores_span_nodes():
    nodes = [{"CPU": 3.0, "memory": 6e9}, {"CPU": 5.0, "memory": 6e9}]
    assert capacity(nodes, 1, 4).workers == 2
    with pytest.raises(LaunchError, match=r"CPUs of its nodes: 3, 5; .* 9 ranks a trial"):
        capacity(nodes, 1, 9)


@pytest.mark.parametrize(("ranks", "share"), [(2, 0.5), (1, 0.0), (1, 1.5)])
def test_shares_that_make_no_sense_are_refused(ranks, share):
    with pytest.raises(LaunchError, match=r"a share in \(0, 1\]"):
        Shape(1, ranks, share)
