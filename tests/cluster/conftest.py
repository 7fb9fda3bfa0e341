"""A real Slurm of four virtual nodes, for all tests of a file."""

import faulthandler
import os
from collections.abc import Iterator

import pytest
from cluster_runs import User
from mini_slurm import MiniSlurm, Settings, missing


@pytest.fixture(scope="module")
def slurm() -> Iterator[MiniSlurm]:
    """Four nodes of two CPUs, and two users where they can be made."""
    if (why := missing()) is not None:
        pytest.skip(why)
    users = 2 if os.geteuid() == 0 else 0
    with MiniSlurm(settings=Settings(slurmd_timeout_s=10, users=users)) as started:
        yield started


@pytest.fixture
def unhurried() -> None:
    """Jobs take minutes: no stack dump before the test's own timeout."""
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def nodes(slurm, unhurried) -> Iterator[MiniSlurm]:
    """All four idle, nothing in the queue, before and after; each with a network of its own."""
    if slurm.mode != "netns":
        pytest.skip("needs network namespaces (root): here the nodes share one address")
    slurm.heal()
    yield slurm
    slurm.heal()


@pytest.fixture
def user(nodes, tmp_path) -> User:
    return User(nodes, tmp_path)
