"""What a start on 64, 1,024 and 9,000 nodes asks of file system, network and servers.

    python benchmarks/launch_scale.py                      all parts, about ten minutes
    python benchmarks/launch_scale.py --part table         the arithmetic alone, at once
    python benchmarks/launch_scale.py --part store --quick smaller, seconds: does it run?

Parts, all on one machine, with what docs/launch-scale.md makes of them:

starts  metadata calls, files and seconds of each kind of process, by strace
pack    the packed environment: its size, and the seconds to unpack it
store   thousands of real clients at torch's store; heartbeats; gloo's mesh
ray     a real GCS with up to 9,000 nodes that do not exist
files   lines a second that a journal takes (--folder: on which file system)
table   the formulas of launching/arithmetic.py with the values that it holds

--part store names every connection's address, as torch does: without network (as root: unshare -n sh -c
'ip link set lo up && python benchmarks/launch_scale.py --part store') it is the store alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launching.arithmetic import SIZES, Scale, Site, most_ranks
from loading.report import markdown

LOOKUP_S = 0.1  # the mean where some answers get lost, both ends of a connection together
PORT = 23_456

Rows = Iterator[dict[str, Any]]


def starts(folder: Path, quick: bool) -> Rows:
    """Of each kind of process."""
    from launching import starts as measure

    single = {"DMI_WORLD": "single"}
    rank = ["-m", "launch.rank", "--size", "1", "--address", f"127.0.0.1:{PORT}", "--", "/bin/true"]
    kinds = {"python": ["-c", "pass"], "launch.rank": rank}
    if not quick:
        kinds |= {
            "launch.ray_node": ["-c", "import launch.ray_node"],
            "dmi launch --help": ["-m", "dmi_hpc", "launch", "--help"],
            "a training rank": ["-c", "import dmi_hpc.train, dmi_hpc.collectives, deepspeed"],
        }
    folders = measure.environment_folders()
    for name, arguments in kinds.items():
        load = measure.load_of(measure.traced(arguments, folder, single), folders)
        wall, cpu = measure.seconds_of(arguments, single)
        yield {"process": name, **asdict(load), "calls": load.calls, "wall_s": wall, "cpu_s": cpu}
    if quick:
        return
    rays = []
    for workers in (0, 1, 3):
        with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:  # for Ray's sockets
            calls = measure.traced(measure.ray_arguments(workers, Path(short)), folder, single)
        rays.append(measure.load_of(calls, folders))
        load = rays[-1]
        yield {"process": f"Ray, {workers} workers", **asdict(load), "calls": load.calls}
    more = rays[2] - rays[1]
    yield {"process": "a Ray worker", "calls": more.calls // 2, "paths": more.paths // 2}


def pack(folder: Path, quick: bool) -> Rows:
    """The environment of this interpreter."""
    from launch.pack import pack as packed

    if quick:
        return
    target, unpacked = folder / "packed.tar.gz", folder / "unpacked"
    unpacked.mkdir()
    began = time.perf_counter()
    size = packed(target).stat().st_size
    middle = time.perf_counter()
    subprocess.run(["tar", "-xzf", str(target), "-C", str(unpacked)], check=True, timeout=600)
    end = time.perf_counter()
    files = [path.stat().st_size for path in unpacked.rglob("*") if path.is_file()]
    yield {
        "pack_s": middle - began,
        "packed_bytes": size,
        "unpack_s": end - middle,
        "files": len(files),
        "bytes": sum(files),
    }


def store(folder: Path, quick: bool) -> Rows:
    """Joining, beating, and gloo's mesh."""
    from launching import meeting

    yield {"what": "names", **asdict(meeting.lookups())}
    for clients in (64,) if quick else (128, 1024, 16_384):
        found = asdict(meeting.meeting(clients))
        yield {"what": "join", **found}
        if found["join_s"] / clients > 0.02:
            yield {"what": "join", "clients": 0, "join_s": "names are looked up slowly: no larger"}
            break
    for ranks in (64,) if quick else (64, 512, 2048, 8192):
        found = asdict(meeting.heartbeats(ranks, max(2, 20_000 // ranks)))
        yield {"what": "beats", **found}
    for ranks in (4, 8) if quick else (16, 32, 64):
        yield {"what": "gloo", **asdict(meeting.mesh(ranks))}


def ray(folder: Path, quick: bool) -> Rows:
    """A real GCS, at its own pace, and then so quiet that 9,000 nodes can be stood for; real nodes."""
    from launching import gcs

    runs = [([8], gcs.QUIET)] if quick else [([64, 1024], {}), ([9000], gcs.QUIET)]
    for counts, settings in runs:
        with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:
            for load in gcs.loads(counts, Path(short), PORT, settings, 2.0 if quick else 12.0):
                row = {**asdict(load), "calls": round(sum(load.calls.values()), 1)}
                yield {"quiet": bool(settings), **row}
    for nodes in (1,) if quick else (2, 8):
        with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:
            yield {"real": True, **asdict(gcs.real(nodes, Path(short), PORT))}


def files(folder: Path, quick: bool) -> Rows:
    """Lines appended one by one, as a search's journal has them."""
    from dmi_hpc.files import append_json_line
    from search.records.lines import encode

    record = {"kind": "told", "id": 12345, "genome": "x" * 400, "fitness": 0.123}
    for durable in (False, True):
        path, count = folder / f"lines-{durable}", 200 if quick else 2000
        began = time.perf_counter()
        for _ in range(count):
            append_json_line(path, record, durable=durable)
        seconds = time.perf_counter() - began
        yield {"durable": durable, "lines_per_s": count / seconds, "bytes": len(encode(record))}


def table(folder: Path, quick: bool) -> Rows:
    """The three sizes."""
    slow = Site(lookup_s=LOOKUP_S)
    lines: list[tuple[str, Callable[[Scale], Any]]] = [
        ("processes", lambda s: s.processes),
        ("training, shared environment: metadata calls", lambda s: s.rank_metadata),
        ("... seconds", lambda s: s.metadata_s(s.rank_metadata)),
        ("search, shared environment: metadata calls", lambda s: s.search_metadata),
        ("... seconds", lambda s: s.metadata_s(s.search_metadata)),
        ("... seconds, each path once a node", lambda s: s.metadata_s(s.search_metadata_cached)),
        ("... its files, once a node, GB", lambda s: s.read_bytes / 1e9),
        ("packed: broadcast, s", lambda s: s.broadcast_s),
        ("packed: unpacked, s", lambda s: s.measured.unpack_s),
        ("ranks: connections to the store", lambda s: s.connections),
        ("ranks: join, s", lambda s: s.join_s),
        ("ranks: join, names in 0.1 s, s", lambda s: replace(s, site=slow).join_s),
        ("training, packed: bring-up, s", lambda s: s.training_s),
        ("beats: cores of the store", lambda s: s.beats_cores),
        ("all ranks waiting: a round of readings, s", lambda s: s.round_s),
        ("all ranks waiting: a round of readings, GB", lambda s: s.round_bytes / 1e9),
        ("gloo: keys through the store", lambda s: s.mesh_keys),
        ("gloo: GB through the store", lambda s: s.mesh_bytes / 1e9),
        ("Ray: nodes registered, s", lambda s: s.register_s),
        ("Ray: actors made, s", lambda s: s.actors_s),
        ("Ray: cores of the GCS", lambda s: s.gcs_cores),
        ("Ray: memory of the GCS for its nodes, MB", lambda s: s.gcs_memory / 1e6),
        ("Ray: the GCS tells all who joins, GB", lambda s: s.gcs_join_bytes / 1e9),
        ("search: first proposals, one driver, s", lambda s: s.first_asks_s),
        ("search, packed: bring-up, one driver, s", lambda s: s.search_s),
        ("islands for trials of 8 min", lambda s: s.islands(480.0)),
        ("... if Ray takes 57 ms a trial", lambda s: s.islands(480.0, dispatch=True)),
        ("islands for trials of 60 s", lambda s: s.islands(60.0)),
        ("... if Ray takes 57 ms a trial", lambda s: s.islands(60.0, dispatch=True)),
    ]
    for name, value in lines:
        yield {"": name, **{f"{nodes:,} nodes": value(Scale(nodes)) for nodes in SIZES}}
    yield {"most ranks whose readings the store can serve": most_ranks()}


PARTS: dict[str, Callable[[Path, bool], Rows]] = {
    "starts": starts,
    "pack": pack,
    "store": store,
    "ray": ray,
    "files": files,
    "table": table,
}


def shown(value: Any) -> str:
    """Three digits of what is no whole number."""
    if isinstance(value, bool | str):
        return str(value)
    return (
        f"{value:,}"
        if isinstance(value, int)
        else f"{value:,.0f}"
        if value >= 100
        else f"{value:.3g}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=tuple(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--folder", type=Path, help="where files are written for a while")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1]))
    result: dict[str, Any] = {}
    for part in options.part:
        with tempfile.TemporaryDirectory(prefix="launch-scale-", dir=options.folder) as folder:
            rows = list(PARTS[part](Path(folder), options.quick))
        result[part] = rows
        print(f"\n{part}\n")
        for header in dict.fromkeys(tuple(row) for row in rows):
            lines = [map(shown, row.values()) for row in rows if tuple(row) == header]
            print(f"{markdown(header, lines)}\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
