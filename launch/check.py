"""``dmi launch check``: measures the nodes of a job before it is started, and says what is wrong.

On each node runs `launch.checking`, which writes a record; `verdict` reads the records, `page` shows
it. A node that said nothing, or not everything, is named.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir, mkdtemp
from typing import TYPE_CHECKING, Any

from dmi_hpc import knobs
from dmi_hpc.errors import EXIT_OK, EXIT_USER_ERROR, LaunchError, counted
from dmi_hpc.files import writing
from launch.cluster import Part, leave, stand_by
from launch.network import LOOPBACK, free_port
from launch.preflight import judging, judging_files
from launch.preflight.findings import Expected, Finding, Judge, Level, listed

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dmi_hpc.watch import StopFlag

LIMIT_S = 420.0  # all of it; what the nodes had found until then is judged
LEVELS: tuple[Level, ...] = ("OK", "WARNING", "FAILURE")
_STYLES: Mapping[Level, str] = {"OK": "green", "WARNING": "yellow", "FAILURE": "bold red"}

_NETWORK = (
    "is a firewall between the nodes, or the wrong interface in use? (dmi launch machines NAME)"
)
_FILES = (
    "the file system does not answer there: choose another folder (--out), or leave the node out"
)
_ODD = "the node's output in the job's log says more"

# probe -> (its name for people, what judges it, what to do if it failed); rows come in this order
JUDGES: Mapping[str, tuple[str, Judge | None, str]] = {
    "software": (
        "software",
        judging.software,
        "install dmi-hpc anew in the environment of the nodes",
    ),
    "gpus": (
        "GPUs",
        judging.gpus,
        "the driver does not answer there: leave the node out, report it",
    ),
    "cores": ("cores", judging.cores, _ODD),
    "memory": ("memory", judging.memory, _ODD),
    "interface": ("interface", judging.interfaces, "correct `interfaces` of the machine"),
    "met": ("network", None, _NETWORK),
    "joined": ("network", None, _NETWORK),
    "addresses": ("interface", judging.addresses, _ODD),
    "pairs": ("links", judging.links, _NETWORK),
    "all-reduce": ("all-reduce", judging.reduction, _NETWORK),
    "clocks": ("clocks", judging.clocks, _NETWORK),
    "shared files": ("shared files", judging_files.shared_files, _FILES),
    "files": ("files", judging_files.files, _FILES),
    "node storage": ("node storage", judging_files.node_storage, _ODD),
    "limits": ("limits", judging_files.limits, _ODD),
    "names": ("host names", judging.names, "the name service hangs: report it, or set /etc/hosts"),
    "ports": ("ports", judging.ports, _ODD),
    "time": ("time left", judging.time_left, "unset SLURM_JOB_END_TIME: it is of another job"),
}


@dataclass(frozen=True)
class Node:
    """The record of one rank; `name` is its host's, with the rank where several share one."""

    rank: int
    name: str
    host: str
    values: Mapping[str, Any]
    failed: Mapping[str, str]
    complete: bool


@dataclass(frozen=True)
class Report:
    """Everything that was found, in order, about so many nodes; 1: about this machine alone."""

    findings: tuple[Finding, ...]
    nodes: int

    @property
    def level(self) -> Level:
        return max((one.level for one in self.findings), key=LEVELS.index, default="FAILURE")

    @property
    def exit_code(self) -> int:
        """2 if anything failed; warnings do not stop a job."""
        return EXIT_USER_ERROR if self.level == "FAILURE" else EXIT_OK


def storage_of(node_storage: str | None, env: Mapping[str, str]) -> tuple[str, ...]:
    """Folders of each node's own that a job may use; `node_storage`: of the machine."""
    return tuple(
        dict.fromkeys(("/dev/shm", env.get("TMPDIR") or gettempdir(), node_storage or "/tmp"))
    )


def rank_command(folder: Path, storage: Sequence[str], *, cuda: bool) -> tuple[str, ...]:
    """What every rank runs, one on each node. folder: of the records, on the run's file system; cuda:
    the nodes have GPUs whose network is to be tried."""
    return (
        *(sys.executable, "-P", "-m", "launch.checking", "--folder", str(folder)),
        *(word for path in storage for word in ("--storage", path)),
        *("--device", "cuda" if cuda else "cpu"),
    )


def mpi_command(folder: Path) -> tuple[str, ...]:
    """What every rank runs of the step that is started through MPI's own start (kind "mpi")."""
    return (sys.executable, "-P", "-m", "launch.checking", "--folder", str(folder), "--mpi")


def local_parts(folder: Path, ranks: int = 2) -> list[Part]:
    """The ranks of a check on this machine alone."""
    port = free_port(LOOPBACK, os.getpid())
    world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), knobs.LAUNCHED: str(ranks)}
    world |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return [
        Part(
            f"rank {rank} of the check",
            rank_command(folder, storage_of(None, os.environ), cuda=False),
            {**os.environ, **world, knobs.WORLD: "", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]


def check_here(folder: Path, stop: StopFlag) -> Report:
    """This machine alone, and the file system of `folder`, by two ranks; nothing stays behind."""
    host = socket.gethostname()
    with records(folder) as written:
        return run_check([local_parts(written)], written, Expected((host, host)), stop)


@contextmanager
def records(folder: Path) -> Iterator[Path]:
    """A private folder in `folder`, for the records of one check; removed in the end.

    RunError if it cannot be made.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        made = Path(mkdtemp(prefix=".dmi-check-", dir=folder))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def run_check(
    steps: Sequence[Sequence[Part]], folder: Path, expected: Expected, stop: StopFlag
) -> Report:
    """Run the steps one after the other, and judge what their ranks wrote to `folder`, which was empty.

    A step that fails, or lasts when all of them have taken LIMIT_S, is ended: its nodes' records say
    how far they came. SystemExit(75) if a signal stopped it.
    """
    trouble: list[Finding] = []
    look = _deadline(time.monotonic() + LIMIT_S)
    for parts in steps:
        try:
            if stand_by(parts, stop, look=look):
                leave()
        except LaunchError as error:
            first = str(error).splitlines()[0]
            trouble.append(Finding("step", "WARNING", first, "it ends by itself", _ODD))
    report = verdict(folder, expected)
    return Report((*report.findings, *trouble), report.nodes)


def _deadline(end: float) -> Callable[[], None]:
    def look() -> None:
        if time.monotonic() > end:
            raise LaunchError(f"the nodes were not done within {LIMIT_S:.0f} s")

    return look


def verdict(folder: Path, expected: Expected) -> Report:
    """What the records in `folder` say about the nodes that were expected. Reads, changes nothing."""
    nodes = read_nodes(folder)
    findings = [*answers(nodes, expected)]
    for probe, (title, judge, remedy) in JUDGES.items():
        findings += _failures(nodes, probe, title, remedy)
        values = {node.name: node.values[probe] for node in nodes if probe in node.values}
        if values and judge is not None:
            findings += judge(values, expected)
    if len(expected.hosts) == 1:
        findings.append(Finding("network", "OK", "one node: nothing between nodes was measured"))
    seen = _read(folder / "mpi.json")
    return Report((*findings, *judging.mpi(seen, expected)), len(set(expected.hosts)))


def _read(path: Path) -> dict[str, Any]:
    """A record; empty if there is none."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}


def read_nodes(folder: Path) -> list[Node]:
    """The records in `folder`, by rank."""
    raw = sorted((_read(path) for path in folder.glob("node-*.json")), key=lambda one: one["rank"])
    often = Counter(one["host"] for one in raw)
    return [
        Node(
            rank=one["rank"],
            name=one["host"] if often[one["host"]] == 1 else f"{one['host']}/{one['rank']}",
            host=one["host"],
            values=one["values"],
            failed=one["failed"],
            complete=one.get("complete", False),
        )
        for one in raw
    ]


def answers(nodes: Sequence[Node], expected: Expected) -> list[Finding]:
    """Who said nothing, not everything, or came too late to be measured with the others."""
    count = len(expected.hosts)
    heard = {node.host.partition(".")[0] for node in nodes}
    ranks = [str(rank) for rank in range(count) if rank not in {node.rank for node in nodes}]
    silent = [host for host in expected.hosts if host.partition(".")[0] not in heard]
    if len(silent) != len(ranks):  # nodes that know themselves by other names
        silent = [f"rank {rank}" for rank in ranks]
    found = []
    if silent:
        remedy = "its processes did not start, or cannot write the run folder: see the job's log"
        text = f"{listed(silent)}: no answer"
        found.append(Finding("nodes", "FAILURE", text, f"{counted(count, 'node')}", remedy))
    if torn := [node.name for node in nodes if not node.complete]:
        remedy = "the node or its process died, or its file system hangs: see the job's log"
        text = f"{listed(torn)}: ended before everything was measured"
        found.append(Finding("nodes", "FAILURE", text, "all checks", remedy))
    met = next((node.values["met"] for node in nodes if "met" in node.values), None)
    late = [
        node.name
        for node in nodes
        if node.complete and met is not None and node.rank not in met and "met" not in node.failed
    ]
    if late:
        text = f"{listed(late)}: did not meet the others"
        found.append(Finding("network", "FAILURE", text, "all nodes meet", _NETWORK))
    return found or [
        Finding("nodes", "OK", f"all {count} answered" if count > 1 else "it answered")
    ]


def _failures(nodes: Sequence[Node], probe: str, title: str, remedy: str) -> list[Finding]:
    """Probes that failed; where several nodes failed together, the first one's reason."""
    failed = {node.name: node.failed[probe] for node in nodes if probe in node.failed}
    if not failed:
        return []
    reason = next(iter(failed.values()))
    text = f"{listed(list(failed))}: {reason}"
    return [Finding(title, "FAILURE", text, "an answer", remedy)]


def shown(report: Report) -> int:
    """Print the page of `report`; returns its exit code."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 100).print(page(report))
    return report.exit_code


def page(report: Report) -> RenderableType:
    """The report for a terminal: a line for each check, what to do, and the verdict."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in report.findings:
        table.add_row(Text(one.level, _STYLES[one.level]), one.check, Text(one.found))
        if one.level != "OK":
            table.add_row("", "", Text(f"expected: {one.expected}", "dim"))
            table.add_row("", "", Text(f"do: {one.remedy}"))
    return Group(table, Text(""), Text(_summary(report), _STYLES[report.level]))


def _summary(report: Report) -> str:
    counts = Counter(one.level for one in report.findings)
    failures, warnings = (
        counted(counts["FAILURE"], "failure"),
        counted(counts["WARNING"], "warning"),
    )
    about = counted(report.nodes, "node") if report.nodes > 1 else "this node"
    if report.level == "FAILURE":
        return (
            f"{about}: {failures}, {warnings}. Do not start a job before the failures are mended."
        )
    if report.level == "WARNING":
        return f"{about}: {warnings}. A job will run; look at what is said above."
    return f"{about}: all is well."
