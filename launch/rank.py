"""``python -m launch.rank``: the start of every rank in an allocation; becomes the rank itself.

srun, mpirun and mpiexec each say in other variables who a rank is, and none says what torch and
DeepSpeed ask for. This says it: the five rank variables, the interface, the threads, and that the
world is as large as it was meant to be (srun without a matching PMI makes every rank 0 of 1).
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Mapping, Sequence

from dmi_hpc import knobs
from dmi_hpc.errors import EXIT_USER_ERROR, DMIError, LaunchError
from dmi_hpc.world import World, detect
from launch.gpus import hip_devices
from launch.network import interface_of

MANY = 64  # ranks


def rank_variables(
    world: World, address: str, interface: str, env: Mapping[str, str], cores: int
) -> dict[str, str]:
    """What rank `world.rank` is told. address: host:port where the ranks meet; interface: the name
    of the network there; cores: that this process may run on.

    What the user has set of threads and interfaces stays.
    """
    host, _, port = address.rpartition(":")
    meant = {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        knobs.LAUNCHED: str(world.size),
        knobs.STARTER: world.source,
    }
    usual = {
        **hip_devices(env),
        "OMP_NUM_THREADS": str(max(1, cores // world.ranks_on_cores)),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
        # torch looks up the name of whoever connects, one after the other (docs/launch-scale.md)
        "RES_OPTIONS": "timeout:1",
        # torch warns of every address that has no name; what matters is raised
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    if world.size >= MANY:  # else every rank publishes an address for every other
        usual["TORCH_GLOO_LAZY_INIT"] = "1"
    return {**{name: value for name, value in usual.items() if not env.get(name)}, **meant}


def require_size(world: World, meant: int) -> None:
    """LaunchError if the launcher made another world than it was asked for."""
    if world.size != meant:
        raise LaunchError(
            f"{meant} ranks were to be started, but this process finds itself in a world of "
            f"{world.size} (source: {world.source}): they would overwrite each other. Is the launcher "
            "the machine's own? (dmi launch machines NAME shows `launcher` and `mpi`)"
        )


def main(arguments: Sequence[str]) -> None:
    """Set the variables of this rank and become its command. Exit code 2 with the reason if not."""
    parser = argparse.ArgumentParser(prog="python -m launch.rank")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--interface", action="append", default=[])
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    try:
        world = detect()
        require_size(world, given.size)
        host = given.address.rpartition(":")[0]
        interface, _ = interface_of(given.interface, host)
        cores = len(os.sched_getaffinity(0))
        os.environ.update(rank_variables(world, given.address, interface, os.environ, cores))
    except DMIError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(EXIT_USER_ERROR)
    # rank 0 holds two connections of each rank
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.execv(given.command[0], given.command)


if __name__ == "__main__":
    main(sys.argv[1:])
