"""READ FIRST: ``python -P -m launch.checking``, the rank of ``dmi launch check`` on each node.

Measures, judges nothing, and writes what it found to FOLDER/node-RANK.json: first with what it alone
can tell, then again with the rest, so that one that hangs or dies later has still said something.
Every probe is bounded: a file system or a driver that hangs is a finding, and holds up nothing else.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from dmi_hpc.errors import EXIT_OK, EXIT_USER_ERROR, DMIError, LaunchError
from dmi_hpc.files import write_json
from dmi_hpc.world import World, detect

if TYPE_CHECKING:
    from launch.preflight.between import Members

MEET_S = 60.0  # for the last rank to come: imports of many nodes from one file system take long
PROBE_S = 30.0
GPU_S = 120.0  # a driver wakes eight GPUs one after the other
LEAVE_S = 60.0  # for the last node to be done, before rank 0 takes the store along
FILES_S = 120.0  # 64 MB at the least that is bearable, and what NFS takes to show a file

Probe = Callable[[], Any]


class Record:
    """What this node has found so far; `save` writes it, bounded like everything else."""

    def __init__(self, folder: Path, world: World) -> None:
        self._path = folder / f"node-{world.rank}.json"
        self.content: dict[str, Any] = {
            "rank": world.rank,
            "size": world.size,
            "host": socket.gethostname(),
            "values": {},
            "failed": {},
        }

    def add(self, name: str, probe: Probe, limit_s: float = PROBE_S) -> bool:
        """Measure, and say whether that went well. A probe that failed or hangs is noted as such."""
        future = _start(probe)
        try:
            error = future.exception(limit_s)
        except TimeoutError:
            self.content["failed"][name] = f"no answer within {limit_s:.0f} s"
            return False
        if error is not None:
            text = str(error) if isinstance(error, DMIError) else f"{type(error).__name__}: {error}"
            self.content["failed"][name] = " ".join(text.split())[:500]
            return False
        self.content["values"][name] = future.result()
        return True

    def save(self) -> None:
        """Raises OSError or TimeoutError if the folder cannot be written or hangs."""
        _start(partial(write_json, self._path, self.content)).result(PROBE_S)


def _start(action: Probe) -> Future[Any]:
    """The action's future. Its thread is abandoned if it never ends: nothing else can be done."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise

    Thread(target=work, daemon=True).start()
    return future


def check_node(record: Record, folder: Path, storage: Sequence[str], device: str) -> None:
    """All probes, between the nodes first: there they must not wait for each other's own."""
    from launch.preflight import probes

    record.add("interface", probes.interface)
    record.add("software", probes.software)
    record.save()
    members = _meet(record)
    if members is not None and members.size > 1:
        _check_between(record, members, folder, device)
        record.save()
    record.add("cores", probes.cores)
    record.add("memory", probes.memory)
    record.add("gpus", probes.gpus, GPU_S)
    record.add("limits", probes.limits)
    record.add("names", probes.names)
    record.add("ports", probes.ports)
    record.add("time", probes.time_left)
    record.add("node storage", partial(probes.node_storage, storage))
    record.save()
    record.add("files", partial(probes.file_system, folder), FILES_S)
    record.content["complete"] = True
    record.save()
    if members is not None:
        _start(partial(_leave, members)).exception(2 * LEAVE_S)  # what it raises concerns nobody


def _meet(record: Record) -> Members | None:
    """The nodes that came in time; None: alone, or that failed."""
    from launch.preflight import between

    rank, size = record.content["rank"], record.content["size"]
    if size == 1:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    met: list[Members] = []

    def meet() -> list[int]:
        store = between.open_store(rank, size, address, port, MEET_S)
        met.append(between.meet(rank, size, store, MEET_S))
        return list(met[0].ranks)

    return met[0] if record.add("met", meet, 3 * MEET_S) else None


def _check_between(record: Record, members: Members, folder: Path, device: str) -> None:
    """What takes several nodes; after a probe of the network that failed, the next would hang."""
    from launch.preflight import between, probes

    network = (
        ("joined", partial(between.join, members)),
        ("clocks", between.clocks),
        ("pairs", partial(between.pairs, members)),
        ("addresses", probes.addresses_in_use),
        ("all-reduce", partial(between.all_reduce, device)),
    )
    all(record.add(name, probe, 2 * between.COLLECTIVE_S) for name, probe in network)
    record.add("shared files", partial(between.shared_files, members, folder), FILES_S)


def _leave(members: Members) -> None:
    """Rank 0 holds the store: it goes last, but waits for nobody for ever."""
    end = time.monotonic() + LEAVE_S
    members.store.add("left", 1)
    while members.index == 0 and members.store.add("left", 0) < members.size:
        if time.monotonic() > end:
            return
        time.sleep(0.05)


def check_mpi(folder: Path) -> None:
    """Whether MPI under this launcher sees the world that the launcher made."""
    from dmi_hpc.collectives import mpi_ranks

    world = detect()
    found: dict[str, Any] = {"size": 1, "why": ""}
    try:
        with mpi_ranks(world) as ranks:
            found["size"] = len(ranks.share(world.rank))
    except LaunchError as error:
        found["why"] = str(error)
    if world.is_first:
        write_json(folder / "mpi.json", found)


def main(arguments: Sequence[str]) -> None:
    """Exit code 0 whatever was found: the verdict is of who reads the records. 2: nothing could be
    written, with the reason."""
    parser = argparse.ArgumentParser(prog="python -m launch.checking")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--storage", action="append", default=[])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mpi", action="store_true")
    given = parser.parse_args(arguments)
    code = EXIT_OK
    # torch warns of every address that no name service knows: no finding, its own check says more
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        if given.mpi:
            check_mpi(given.folder)
        else:
            check_node(Record(given.folder, detect()), given.folder, given.storage, given.device)
    except (OSError, TimeoutError, DMIError) as error:
        why = error if str(error) else f"{given.folder}: no answer within {PROBE_S:.0f} s"
        sys.stderr.write(f"error: {socket.gethostname()}: {why}\n")
        code = EXIT_USER_ERROR
    sys.stderr.flush()
    if not given.mpi:
        os._exit(code)  # a thread that hangs would keep the process for ever
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
