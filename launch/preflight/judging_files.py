"""What `dmi launch check` makes of file systems and of the limits of a process. Pure."""

from __future__ import annotations

from launch.preflight.findings import (
    Expected,
    Finding,
    Level,
    Values,
    listed,
    short,
    size,
    worst,
)

# NFS shows a new file after 3 to 60 s; whoever waits for another node's checkpoint waits as long.
VISIBLE_S = 5.0
SMALL_FILE_S = 0.5  # a search writes a record and a checkpoint for every network
WRITE_BYTES_S = 30e6  # of a node, while all write: a checkpoint of 3 GB takes 100 s
FREE_BYTES, FREE_FAILURE_BYTES = 20e9, 1e9
FREE_INODES = 20_000  # some files a network, thousands of networks
FILE_CLOCK_S = 5.0  # the last sign of life of a killed job is the time of a file
NODE_BYTES = 2e9  # Ray's object store and spilled files, an unpacked environment
# Ray asks for 65,536 on the head of a large cluster: some sockets for every worker of every node.
FILES, FILES_FAILURE = 65_536, 4_096
PROCESSES_OF_A_CORE, PROCESSES = 64, 1_000  # a Ray worker has about 40 threads, which count


def shared_files(values: Values, expected: Expected) -> list[Finding]:
    """One and the same folder on all nodes, whose locks and appended lines hold between them."""
    guests = {n: v for n, v in values.items() if "refused" in v}
    if not guests:
        return []
    blind = [n for n, v in guests.items() if v["visible_s"] is None]
    found = []
    if blind:
        found.append(
            Finding(
                "shared files",
                "FAILURE",
                f"{listed(blind)}: a file of rank 0 is not seen",
                "one file system on all nodes",
                "choose a run folder (--out) on a file system that all nodes mount",
            )
        )
    seen = {n: v["visible_s"] for n, v in guests.items() if n not in blind}
    node, slowest = worst(seen, high=True) if seen else ("", 0.0)
    if slowest > VISIBLE_S:
        remedy = "prefer a parallel file system; NFS mounted with a short actimeo"
        text = f"{node}: a new file is seen after {short(slowest)}"
        found.append(Finding("shared files", "WARNING", text, f"within {VISIBLE_S:g} s", remedy))
    loose = [n for n in seen if not guests[n]["refused"]]
    if loose:
        text = f"{listed(loose)}: a lock held on another node does not hold there"
        remedy = "do not start two jobs in one run folder; or have it mounted with flock"
        found.append(Finding("shared files", "WARNING", text, "locks hold between nodes", remedy))
    lost = sum(v["appended"] - v["lines"] for v in values.values() if "lines" in v)
    if lost:
        text = f"{lost} lines lost that several nodes appended to one file"
        remedy = "nothing of dmi does so; let your own code write one file a node"
        found.append(Finding("shared files", "WARNING", text, "none lost", remedy))
    text = f"a new file is seen after {short(slowest)} ({node}), locks hold between nodes"
    return found or [Finding("shared files", "OK", text)]


def files(values: Values, expected: Expected) -> list[Finding]:
    """The run folder's file system, as each node sees it."""
    found = _locks_and_room(values)
    node, took = worst({n: v["small_s"] for n, v in values.items()}, high=True)
    if took > SMALL_FILE_S:
        text = f"{node}: {short(took)} to write, sync and rename a small file"
        remedy = "choose a run folder (--out) on the parallel file system"
        found.append(Finding("files", "WARNING", text, f"at most {SMALL_FILE_S:g} s", remedy))
    slow, speed = worst({n: v["bytes_s"] for n, v in values.items()}, high=False)
    if speed < WRITE_BYTES_S:
        text = f"{slow}: writes {size(speed)}/s while all nodes write"
        remedy = "choose a run folder (--out) on the parallel file system"
        found.append(Finding("files", "WARNING", text, f"{size(WRITE_BYTES_S)}/s or more", remedy))
    off, clock_s = worst({n: abs(v["clock_s"]) for n, v in values.items()}, high=True)
    if clock_s > FILE_CLOCK_S:
        text = f"{off}: the file system's clock is {short(clock_s)} off"
        remedy = "times of files in `dmi launch status` are off as much; report it"
        found.append(Finding("files", "WARNING", text, f"at most {FILE_CLOCK_S:g} s", remedy))
    kind = next(iter(values.values()))["kind"] or "unknown"
    text = f"{kind}, small file {short(took)}, {size(speed)}/s a node at the least"
    return found or [Finding("files", "OK", text)]


def _locks_and_room(values: Values) -> list[Finding]:
    found = []
    unlocked = {n: v["lock"] for n, v in values.items() if v["lock"]}
    if unlocked:
        text = f"{listed(list(unlocked))}: no file locks ({next(iter(unlocked.values()))})"
        remedy = "choose another file system, or have it mounted with flock: no run starts without"
        found.append(Finding("files", "FAILURE", text, "flock works", remedy))
    node, free = worst({n: v["free"] for n, v in values.items()}, high=False)
    if free < FREE_BYTES:
        level: Level = "FAILURE" if free < FREE_FAILURE_BYTES else "WARNING"
        wanted = f"{size(FREE_BYTES)} or more"
        found.append(Finding("files", level, f"{size(free)} free ({node})", wanted, "make room"))
    inodes = {n: v["inodes"] for n, v in values.items() if v["inodes"] is not None}
    if inodes and min(inodes.values()) < FREE_INODES:
        text, wanted = f"room for {min(inodes.values()):,} more files", f"{FREE_INODES:,} or more"
        found.append(Finding("files", "WARNING", text, wanted, "remove files that you do not need"))
    return found


def node_storage(values: Values, expected: Expected) -> list[Finding]:
    """Folders of each node's own."""
    found: list[Finding] = []
    room: dict[str, float] = {}
    for node, folders in values.items():
        for one in folders:
            place = f"{one['path']} on {node}"
            room[one["path"]] = min(one["free"], room.get(one["path"], one["free"]))
            if one["why"]:
                remedy = "correct node_storage of the machine's description, or set TMPDIR"
                text = f"{place}: {one['why']}"
                found.append(
                    Finding("node storage", "WARNING", text, "a folder to write in", remedy)
                )
            elif one["free"] < NODE_BYTES:
                remedy = (
                    "remove what earlier jobs left there; Ray and unpacked environments need it"
                )
                text = f"{size(one['free'])} free in {place}"
                wanted = f"{size(NODE_BYTES)} or more"
                found.append(Finding("node storage", "WARNING", text, wanted, remedy))
    well = ", ".join(f"{path} {size(free)}" for path, free in room.items())
    return found[:6] or [Finding("node storage", "OK", f"free: {well}")]


def limits(values: Values, expected: Expected) -> list[Finding]:
    """Open files and processes; Ray raises its soft limit of files to the hard one by itself."""
    most = float("inf")
    files_, node = min((v["files"][1] or most, n) for n, v in values.items())
    found = []
    if files_ < FILES:
        level: Level = "FAILURE" if files_ < FILES_FAILURE else "WARNING"
        remedy = "small jobs run; for large ones ask the administrators (LimitNOFILE of slurmd)"
        wanted = f"{FILES:,} or more: Ray's head has some for each worker"
        text = f"{node}: at most {files_:,.0f} open files"
        found.append(Finding("limits", level, text, wanted, remedy))
    counts = {n: min(v["processes"][0] or most, v["pids"] or most) for n, v in values.items()}
    node, processes = worst(counts, high=False)
    needed = PROCESSES + PROCESSES_OF_A_CORE * (expected.cpus or 0)
    if processes < needed:
        text = f"{node}: at most {processes:,.0f} processes and threads"
        remedy = "ulimit -u in `setup` of the machine, or ask the administrators"
        found.append(Finding("limits", "WARNING", text, f"{needed:,} or more", remedy))
    texts = ["no limit" if n == most else f"{n:,.0f}" for n in (files_, processes)]
    return found or [Finding("limits", "OK", f"open files {texts[0]}, processes {texts[1]}")]
