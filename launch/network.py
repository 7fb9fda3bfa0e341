"""Which of a node's networks a job uses: by address, never by host name (a slow DNS hangs gRPC)."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence

import psutil

from dmi_hpc.errors import LaunchError

LOOPBACK = "127.0.0.1"
PORTS = range(20_000, 30_000)  # below those that Linux gives to outgoing connections


def addresses() -> dict[str, str]:
    """IPv4 address of each interface of this node that is up, loopback last."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = {
        name: str(one.address)
        for name, many in psutil.net_if_addrs().items()
        for one in many
        if name in up and one.family == socket.AF_INET
    }
    return dict(sorted(found.items(), key=lambda item: item[1].startswith("127.")))


def interface_of(
    wanted: Sequence[str], towards: str | None, found: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """(name, IPv4 address) of the interface that a job uses here.

    wanted: names in order of preference; empty: the one of the route to the address `towards`, or,
    without one, the first that is no loopback. LaunchError if none of the wanted ones is here.
    """
    found = addresses() if found is None else found
    for name in wanted:
        if name in found:
            return name, found[name]
    if wanted:
        raise LaunchError(
            f"network interfaces wanted: {', '.join(wanted)}; this node ({socket.gethostname()}) has "
            f"{', '.join(found)}. Correct `interfaces` of the machine's description "
            "(dmi launch machines NAME shows it)"
        )
    own = _source_address(towards) if towards else next(iter(found.values()), LOOPBACK)
    return next(((name, here) for name, here in found.items() if here == own), ("lo", LOOPBACK))


def _source_address(towards: str) -> str:
    """The address that this node's packets to `towards` carry; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards, 9))
        return str(probe.getsockname()[0])


def free_port(address: str, seed: int) -> int:
    """A port of `PORTS` that nobody listens on at `address`, which is this node's; else, for an
    address of another node, one that is as good as random. seed: where to begin."""
    for step in range(len(PORTS)):
        port = PORTS[(seed + step * 7919) % len(PORTS)]
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((address, port))
            except OSError:
                if address not in addresses().values():
                    return port
                continue
            return port
    raise LaunchError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free at {address}")
