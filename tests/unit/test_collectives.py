"""What ranks do together, and which device each one has."""

import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed.rendezvous import rendezvous

from dmi_hpc import collectives
from dmi_hpc.errors import DataError, DMIError, Interrupted, LaunchError, RankLost, together
from dmi_hpc.watch import stop_on_signals
from dmi_hpc.world import World


def on_ranks(size, function):
    """Run function(rank) on threads, inside `together`; the error of each rank, or None."""
    values, meet = [None] * size, threading.Barrier(size, timeout=60)

    def one(rank):
        def share(value):
            values[rank] = value
            meet.wait()
            return list(values)

        try:
            with together(share):
                function(rank)
        except (DMIError, OSError) as error:
            return error
        return None

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.mark.parametrize(
    ("error", "kind"), [(DataError("no data"), DataError), (OSError("no data"), DMIError)]
)
def test_all_ranks_raise_what_one_met(error, kind):
    def failing(rank):
        if rank == 1:
            raise error

    found = on_ranks(3, failing)
    assert found[1] is error
    assert [type(found[0]), type(found[2])] == [kind, kind]
    assert str(found[0]) == str(found[2]) == "rank 1: no data"


def test_without_a_failure_all_go_on():
    assert on_ranks(3, lambda rank: None) == [None] * 3


@pytest.mark.parametrize(
    ("error", "aborts"),
    [(DataError("x"), []), (Interrupted("x"), []), (KeyError("x"), [1]), (RankLost("x"), [69])],
)
def test_what_no_other_rank_can_know_of_aborts_the_mpi_job(error, aborts):
    called = []
    comm = SimpleNamespace(Abort=called.append)
    with pytest.raises(type(error)), collectives._ending_all(comm):
        raise error
    assert called == aborts


@pytest.mark.parametrize(
    ("source", "local_rank", "gpus", "index"),
    [
        ("torchrun", 1, 2, 1),
        ("torchrun", 1, 1, None),
        ("openmpi", 2, 2, None),
        ("slurm", 3, 1, 0),  # --gpus-per-task=1: each rank sees its own alone
    ],
)
def test_a_rank_has_a_gpu_of_its_own_or_is_refused(monkeypatch, source, local_rank, gpus, index):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    world = World(local_rank, 4, local_rank, 4, source)
    if index is None:
        with pytest.raises(LaunchError, match=f"{gpus} GPUs: start at most one rank per GPU"):
            collectives.device_of(world)
    else:
        assert collectives.device_of(world) == torch.device("cuda", index)


MANY = 24


def test_many_jobs_at_once_never_meet_at_the_same_port(monkeypatch):
    """The first rank of each MPI job; the others of a job reach it there, and it alone."""
    comm = SimpleNamespace(allgather=lambda value: [value], bcast=lambda value, root: value)
    monkeypatch.setattr(collectives, "_mpi_comm", lambda world: comm)
    for name in ("DMI_RENDEZVOUS", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    together, world = threading.Barrier(MANY, timeout=60), World(0, 2, 0, 2, "openmpi")

    def first(number):
        together.wait()
        url, store = collectives._rendezvous(world, 30)
        together.wait()
        store.set("job", str(number))
        return url, store

    with ThreadPoolExecutor(MANY) as pool:
        met = list(pool.map(first, range(MANY)))
    assert len({url for url, _ in met}) == MANY
    for number, (url, _) in enumerate(met):
        other = next(iter(rendezvous(url, 1, 2, timeout=timedelta(seconds=30))))[0]
        assert other.get("job") == str(number).encode()


@pytest.mark.parametrize("scheme", ["env", "tcp"])
def test_the_store_of_the_first_rank_listens_where_the_ranks_meet_and_nowhere_else(
    scheme, monkeypatch
):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    url = "env://" if scheme == "env" else f"tcp://127.0.0.1:{port}"
    limit = timedelta(seconds=30)
    assert collectives._own_store(World(1, 2, 1, 2), url, limit) is None
    store = collectives._own_store(World(0, 2, 0, 2), url, limit)
    here = [c.laddr for c in psutil.Process().net_connections() if c.status == "LISTEN"]
    assert [address.ip for address in here if address.port == port] == ["127.0.0.1"]
    store.set("a", "b")
    other = TCPStore("127.0.0.1", port, 2, False, limit)
    assert other.get("a") == b"b"


def test_a_host_name_and_a_store_of_torchruns_are_left_to_torch(monkeypatch):
    limit, first = timedelta(seconds=30), World(0, 2, 0, 2)
    assert collectives._own_store(first, "tcp://node1:1234", limit) is None
    assert collectives._own_store(first, "file:///tmp/store", limit) is None
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert collectives._own_store(first, "tcp://127.0.0.1:1234", limit) is None


def test_an_address_of_another_node_is_an_error_that_says_so():
    with pytest.raises(LaunchError, match=r"could not join.*192\.0\.2\.77"):
        collectives._join(
            World(0, 2, 0, 1), torch.device("cpu"), "tcp://192.0.2.77:1234", 5.0, None
        )


def test_a_first_rank_that_cannot_be_reached_ends_all(monkeypatch):
    monkeypatch.setattr("psutil.net_if_addrs", dict)
    told = []

    def allgather(value):
        told.append(value)
        return [value]

    comm = SimpleNamespace(allgather=allgather)
    with pytest.raises(LaunchError, match="no address besides loopback"):
        collectives._by_mpi(World(0, 2, 0, 1, "openmpi"), comm, 30)
    assert [kind for kind, _ in told] == [LaunchError]


def test_a_closed_terminal_stops_unless_under_nohup():
    before = signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal == signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
