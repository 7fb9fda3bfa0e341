"""The nodes of a Ray cluster: waited for while it comes up, looked at while the search runs."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence

from dmi_hpc.errors import LaunchError
from search.cluster.capacity import Shape, held

CONNECT_S = 5.0
LOOK_S = 0.1  # between looks at what comes up
SETTLED_S = 20.0  # without a further node: those that are missing will hardly come in time
ASK_S = 1.0  # between questions what lives, or so many times what an answer takes:
ASK_SHARE = 20


def reachable(address: str) -> bool:
    """Whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError:
        return False
    return True


def wait_for_nodes(
    address: str, nodes: int, wait_s: float, living: Callable[[str], list[str]]
) -> str:
    """Wait until the cluster whose head comes up at `address` has so many nodes.

    living: addresses of those that a head knows, by the head's address.
    Goes on without those that have not come in `wait_s`, or in `SETTLED_S` after the last one.
    Returns who has come if somebody is missing, else "". LaunchError if nobody has.
    """
    end = time.monotonic() + wait_s
    while not reachable(address):
        if time.monotonic() > end:
            raise LaunchError(
                f"no Ray cluster came up at {address} within {wait_s:g} s: see the log of Ray's nodes"
            )
        time.sleep(LOOK_S)
    here = arrived(lambda: living(address), nodes, end)
    if not here:
        raise LaunchError(
            f"Ray's head came up at {address}, but none of {nodes} nodes joined it within {wait_s:g} s: "
            "see the log of Ray's nodes"
        )
    if len(here) >= nodes:
        return ""
    return f"{len(here)} of {nodes} nodes have joined Ray: {', '.join(here)}"


def arrived(living: Callable[[], list[str]], nodes: int, end: float) -> list[str]:
    """Addresses of those that have come when all have, or no more of them are to be expected.

    living: addresses of the nodes there now; end: of the wait, by time.monotonic.
    """
    here: list[str] = []
    since = time.monotonic()
    while True:
        now_here = living()
        if len(now_here) > len(here):
            since = time.monotonic()
        here, now = now_here, time.monotonic()
        if len(here) >= nodes or now > end or (here and now > since + SETTLED_S):
            return sorted(here)
        time.sleep(LOOK_S)


class Room:
    """Trials that the living nodes hold at once, at most `limit`; asked anew now and then.

    resources: Ray's, of every node that is alive.
    """

    def __init__(
        self,
        shape: Shape,
        limit: int | None,
        resources: Callable[[], Sequence[Mapping[str, float]]],
        *,
        gpus: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shape, self._limit, self._gpus = shape, limit, gpus
        self._resources, self._clock = resources, clock
        self._look_at, self._workers = -1.0, 0

    def __call__(self) -> int:
        began = self._clock()
        if began >= self._look_at:
            found = held(self._resources(), self._shape, gpus=self._gpus)
            self._workers = found if self._limit is None else min(found, self._limit)
            now = self._clock()
            self._look_at = now + max(ASK_S, ASK_SHARE * (now - began))
        return self._workers
