"""From one machine's figures to 64, 1,024 and 9,000 nodes: every formula of docs/launch-scale.md.

Pure. Seconds, bytes, calls; a rank is a process of a training, a worker one of a search.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log

SIZES = (64, 1024, 9000)
PER_NODE = 8


@dataclass(frozen=True)
class Measured:
    """By the other parts of launch_scale.py: four shared cores of an AMD EPYC, torch 2.13 for CPUs,
    Ray 2.60; November 2026."""

    # metadata calls below the environment: all of a process, and different paths
    rank_calls: int = 19_821  # imports of trainer and DeepSpeed
    worker_calls: int = 28_543  # a Ray worker with what a trial needs
    node_calls: int = 32_316  # Ray's own processes on a node
    node_paths: int = 7_847  # of Ray and its workers together
    node_files_bytes: int = 936_504_819  # of the files that are opened
    rank_start_s: float = 2.4  # processor time of a rank's imports, files warm
    worker_start_s: float = 3.6
    packed_bytes: int = 869_036_288
    unpack_s: float = 24.5
    # torch's store
    connection_s: float = 43e-6  # of the server, no name looked up
    connection_bytes: int = 1_000
    set_s: float = 3.2e-6
    # (ranks, seconds of the store for one rank that reads the beats of all)
    readings: tuple[tuple[int, float], ...] = ((512, 0.256e-3), (8192, 6e-3))
    key_bytes: int = 76
    mesh_key_bytes: float = 10.6  # times ranks, for one key
    # Ray's GCS
    gcs_call_s: float = 0.18e-3
    gcs_calls_per_node: float = 1.33  # a second
    gcs_register_s: float = 0.25e-3
    gcs_node_bytes: int = 75_000  # of its memory
    gcs_files: float = 5.1  # of a node without workers
    table_bytes: int = 55  # of a node, to each who joins
    # search
    head_s: float = 2.5  # Ray's head, from its start until it names itself
    first_ask_s: float = 3.75e-3  # before any result
    driver_s: float = 5e-3  # ask, tell and journal, 10,000 evaluations behind them
    dispatch_s: float = 57e-3  # of Ray Tune for a trial: the worst seen, else nothing


@dataclass(frozen=True)
class Site:
    """What we do not measure; assumptions, with their sources in docs/launch-scale.md."""

    metadata_per_s: float = 100_000.0
    network_bytes_per_s: float = 1e9  # of one stream of sbcast
    sbcast_fanout: int = 8
    sbcast_block: int = 8 << 20
    lookup_s: float = 0.0  # to name an address, at one end of a connection
    actors_per_s: float = 389.0


@dataclass(frozen=True)
class Scale:
    """One size of job."""

    nodes: int
    per_node: int = PER_NODE
    measured: Measured = Measured()
    site: Site = Site()

    @property
    def processes(self) -> int:
        return self.nodes * self.per_node

    # files

    @property
    def rank_metadata(self) -> int:
        """Calls of a training's start from a shared file system, nothing cached."""
        return self.processes * self.measured.rank_calls

    @property
    def search_metadata(self) -> int:
        """Of a search's start."""
        worker = self.per_node * self.measured.worker_calls
        return self.nodes * (self.measured.node_calls + worker)

    @property
    def search_metadata_cached(self) -> int:
        """Of a search's start if each node asks for each path once."""
        return self.nodes * self.measured.node_paths

    def metadata_s(self, calls: float) -> float:
        return calls / self.site.metadata_per_s

    @property
    def read_bytes(self) -> int:
        """Of the environment's files, once to each node."""
        return self.nodes * self.measured.node_files_bytes

    @property
    def broadcast_s(self) -> float:
        """The packed environment through a tree, block by block, each sent on when it is whole:
        every block takes one step a level, and goes to `fanout` children over one interface."""
        depth = max(1, ceil(log(self.nodes, self.site.sbcast_fanout)))
        size, fanout = self.measured.packed_bytes, self.site.sbcast_fanout
        one = fanout * self.site.sbcast_block / self.site.network_bytes_per_s
        blocks = ceil(size / self.site.sbcast_block)
        return blocks * depth * one

    # training ranks

    @property
    def connections(self) -> int:
        """To the store, which the first rank holds: its own client's and the heartbeat's of each."""
        return 2 * self.processes

    @property
    def join_s(self) -> float:
        """Until all are connected; the store accepts one after the other and names each."""
        return self.connections * (self.measured.connection_s + self.site.lookup_s)

    @property
    def beats_cores(self) -> float:
        """Of the store's one thread, for the beats alone."""
        return self.processes / 2.0 * self.measured.set_s

    @property
    def round_s(self) -> float:
        """Of the store's one thread, until each waiting rank has read all beats once; below the two
        seconds of a beat it keeps up."""
        return self.processes * reading_s(self.measured.readings, self.processes)

    @property
    def round_bytes(self) -> int:
        return self.processes**2 * self.measured.key_bytes

    @property
    def mesh_keys(self) -> int:
        """Gloo: each rank writes one and reads all."""
        return self.processes * (self.processes + 1)

    @property
    def mesh_bytes(self) -> float:
        """Through the store: a key has an address for each pair."""
        return self.mesh_keys * self.processes * self.measured.mesh_key_bytes

    @property
    def training_s(self) -> float:
        """Until all ranks have met, from a packed environment; without Slurm's own time."""
        own = self.measured.unpack_s + self.measured.rank_start_s
        return self.broadcast_s + own + self.join_s

    # search

    @property
    def gcs_cores(self) -> float:
        return self.nodes * self.measured.gcs_calls_per_node * self.measured.gcs_call_s

    @property
    def gcs_memory(self) -> int:
        return self.nodes * self.measured.gcs_node_bytes

    @property
    def gcs_join_bytes(self) -> int:
        """Who the nodes are, to each node and each worker that joins."""
        return (self.nodes + self.processes) * self.nodes * self.measured.table_bytes

    @property
    def register_s(self) -> float:
        return self.nodes * self.measured.gcs_register_s

    @property
    def actors_s(self) -> float:
        return self.processes / self.site.actors_per_s

    @property
    def first_asks_s(self) -> float:
        """One driver, which all workers ask at once."""
        return self.processes * self.measured.first_ask_s

    @property
    def search_s(self) -> float:
        """Until the last worker has begun its first trial, one thing after the other."""
        own = self.measured.unpack_s + self.measured.head_s + self.measured.worker_start_s
        return self.broadcast_s + own + self.register_s + self.actors_s + self.first_asks_s

    def islands(self, trial_s: float, *, dispatch: bool = False) -> int:
        """Whose drivers are busy at most 70 % of their time, as docs/search-figures.md has it."""
        cost = self.measured.driver_s + (self.measured.dispatch_s if dispatch else 0.0)
        return ceil(self.processes / trial_s * cost / 0.7)


def reading_s(readings: tuple[tuple[int, float], ...], ranks: int) -> float:
    """A power law through the two measured points around `ranks`, or the last two beyond them."""
    pairs = list(pairwise(readings))
    (low, low_s), (high, high_s) = next((p for p in pairs if ranks <= p[1][0]), pairs[-1])
    power = log(high_s / low_s) / log(high / low)
    return float(low_s * (ranks / low) ** power)


def most_ranks(measured: Measured = Measured(), period_s: float = 2.0) -> int:
    """The most that the store can serve within a period while all wait."""
    ranks = 1
    while Scale(ranks, 1, measured).round_s <= period_s:
        ranks += 1
    return ranks - 1
