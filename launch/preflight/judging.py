"""What `dmi launch check` makes of the nodes' records: pure functions of plain values.

Each judgement gets the value of one probe by node and returns findings. Its thresholds, and why, are
here; what is compared between nodes needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from dmi_hpc.errors import counted
from launch.job import clock
from launch.preflight.findings import (
    Expected,
    Finding,
    Level,
    Values,
    differences,
    short,
    size,
    worst,
)

# A store's or checkpoint's handshake takes some round trips: beyond this, steps wait for messages.
LATENCY_S = 0.005
# Half of what Ethernet of 1 Gbit/s gives. 10 million weights are 40 MB a step.
NETWORK_BYTES_S = 60e6
# A healthy node is as fast as the median with at least one of its partners; noise is a few tens of
# per cent, a link that has fallen back to a slower mode a factor of ten.
SLOW_LINK = 0.4
SLOW_LATENCY, LATENCY_NOISE_S = 4.0, 0.0005
# Of the median: below it, a core is throttled or shared. All ranks wait for the slowest.
SLOW_CORE = 0.6
LITTLE_MEMORY = 0.7
# Times in the records of a run are of several clocks: they tell who was last heard of, to seconds.
CLOCK_S = 2.0
CLOCK_FAILURE_S = 60.0  # tokens and certificates of the batch system go by it, too
NAME_S = 1.0  # gRPC asks again and again
TIME_S = 300.0  # less than this is left: not worth a start


def software(values: Values, expected: Expected) -> list[Finding]:
    """Equal versions on all nodes: anything else trains another network on each."""
    packages = sorted({name for found in values.values() for name in found})
    unequal = {
        name: text
        for name in packages
        if (text := differences({n: found.get(name, "absent") for n, found in values.items()}))
    }
    if not unequal:
        one = next(iter(values.values()))
        main = ", ".join(
            f"{name} {one[name]}" for name in ("dmi-hpc", "torch", "ray") if name in one
        )
        return [Finding("software", "OK", f"{main}; the same on {counted(len(values), 'node')}")]
    return [
        Finding(
            "software",
            "FAILURE",
            f"{name}: {text}",
            "the same on all nodes",
            "use one environment, on a file system that all nodes see, or pack it anew",
        )
        for name, text in unequal.items()
    ]


def gpus(values: Values, expected: Expected) -> list[Finding]:
    """As many as the machine's description says, alike, and each can compute."""
    broken = {
        node: [i for i, gpu in enumerate(found) if gpu["why"]] for node, found in values.items()
    }
    found = [
        Finding(
            "GPUs",
            "FAILURE",
            f"{node}: GPU {', '.join(map(str, them))}: {values[node][them[0]]['why']}",
            "a product of two matrices",
            "leave the node out (--option=--exclude=...), report it",
        )
        for node, them in broken.items()
        if them
    ]
    counts = {node: len(found) for node, found in values.items()}
    unlike = differences(counts)
    wanted = expected.gpus
    if wanted is not None and any(count != wanted for count in counts.values()):
        text = unlike or f"{next(iter(counts.values()))} on every node"
        level: Level = "FAILURE" if any(count < wanted for count in counts.values()) else "WARNING"
        remedy = "ask the scheduler for them; is torch built for these GPUs?"
        if level == "WARNING":
            remedy = "correct gpus_per_node of the machine's description, or they lie idle"
        found.append(Finding("GPUs", level, text, f"{wanted} on every node", remedy))
    elif unlike:
        found.append(
            Finding("GPUs", "FAILURE", unlike, "as many on every node", "ask for equal nodes")
        )
    if models := differences({n: sorted({g["name"] for g in f}) for n, f in values.items()}):
        remedy = "ask for nodes of one kind (-C)"
        found.append(
            Finding("GPUs", "WARNING", models, "one kind: all wait for the slowest", remedy)
        )
    least = min(counts.values())
    kind = next((one["name"] for found_ in values.values() for one in found_), "")
    well = f"{least} of {kind} on every node, all compute" if least else "none"
    return found or [Finding("GPUs", "OK", well)]


def cores(values: Values, expected: Expected) -> list[Finding]:
    """As many as were given, no more threads than cores, and all about as fast."""
    found = []
    usable = {n: min(v["usable"], v["quota"] or v["usable"]) for n, v in values.items()}
    node, least = worst(usable, high=False)
    if expected.cpus is not None and least < expected.cpus:
        found.append(
            Finding(
                "cores",
                "WARNING",
                f"{least:g} usable on {node}",
                f"{expected.cpus}, as the job was given",
                "the launcher binds to fewer (srun -c), or a cgroup limits them",
            )
        )
    elif unlike := differences(usable):
        found.append(
            Finding("cores", "WARNING", unlike, "as many on every node", "ask for equal nodes")
        )
    crowded = {n: v["omp"] for n, v in values.items() if (v["omp"] or 0) > usable[n]}
    if crowded:
        node, threads = worst(crowded, high=True)
        text = f"OMP_NUM_THREADS={threads} on {usable[node]:g} cores ({node})"
        remedy = "unset OMP_NUM_THREADS: dmi launch sets it by the cores of a rank"
        found.append(Finding("cores", "WARNING", text, "at most as many threads as cores", remedy))
    speeds = {n: v["GFLOP_s"] for n, v in values.items()}
    usual = median(speeds.values())
    for node in (n for n, speed in speeds.items() if speed < SLOW_CORE * usual):
        text = f"{node}: {speeds[node]:.3g} GFLOP/s on a core"
        remedy = "is something else running there? Leave the node out (--option=--exclude=...)"
        found.append(Finding("cores", "WARNING", text, f"about {usual:.3g}, the median", remedy))
    least_text = f"{min(usable.values()):g} usable on every node, {usual:.3g} GFLOP/s each"
    return found or [Finding("cores", "OK", least_text)]


def memory(values: Values, expected: Expected) -> list[Finding]:
    """Free for this job, within its cgroups."""
    usable = {n: v["usable"] for n, v in values.items()}
    node, least = worst(usable, high=False)
    usual = median(usable.values())
    if least < LITTLE_MEMORY * usual:
        remedy = "ask for all of the nodes' memory (Slurm: --mem=0) or leave the node out"
        text = f"{size(least)} usable on {node}"
        return [Finding("memory", "WARNING", text, f"about {size(usual)}, the median", remedy)]
    return [Finding("memory", "OK", f"{size(least)} usable on every node")]


def clocks(values: Values, expected: Expected) -> list[Finding]:
    """Offsets from rank 0, less what the measurement cannot tell."""
    sure = {n: abs(v["offset_s"]) - v["uncertain_s"] for n, v in values.items()}
    node, skew = worst(sure, high=True)
    one = values[node]
    text = f"{node}: {short(one['offset_s'])} ± {short(one['uncertain_s'])} off rank 0"
    if skew <= CLOCK_S:
        return [Finding("clocks", "OK", f"largest: {text}")]
    level: Level = "WARNING" if skew < CLOCK_FAILURE_S else "FAILURE"
    remedy = "have the administrators look at its NTP (chrony); leave the node out until then"
    return [Finding("clocks", level, text, f"at most {CLOCK_S:g} s", remedy)]


def reduction(values: Values, expected: Expected) -> list[Finding]:
    """How fast gradients are summed; the same on all nodes, which end together."""
    one = next(iter(values.values()))
    count = one["ranks"]
    speed = 2 * (count - 1) / count * one["bytes"] / one["seconds"]
    text = f"{size(one['bytes'])} in {short(one['seconds'])} ({one['backend']}: {size(speed)}/s)"
    if speed >= NETWORK_BYTES_S:
        return [Finding("all-reduce", "OK", text)]
    remedy = "the fast network is not used, or one node is slow: see interface and links"
    return [Finding("all-reduce", "WARNING", text, f"{size(NETWORK_BYTES_S)}/s or more", remedy)]


def links(values: Values, expected: Expected) -> list[Finding]:
    """Each node's best over its partners: one that is slow with all of them is slow itself."""
    speeds = {n: max(p["bytes_s"] for p in v) for n, v in values.items() if v}
    delays = {n: min(p["latency_s"] for p in v) for n, v in values.items() if v}
    if not speeds:
        return []
    usual, delay = median(speeds.values()), median(delays.values())
    few = len(speeds) < 3  # with one partner only: nobody can tell which of the two is slow
    found = []
    for node in speeds:
        slow = speeds[node] < SLOW_LINK * usual
        late = delays[node] > SLOW_LATENCY * delay + LATENCY_NOISE_S
        if (slow or late) and not few:
            text = f"{node}: {size(speeds[node])}/s, {short(delays[node])}, with its best partner"
            wanted = f"about {size(usual)}/s and {short(delay)}, the median"
            remedy = "leave the node out (--option=--exclude=...), report it"
            found.append(Finding("links", "FAILURE" if slow else "WARNING", text, wanted, remedy))
    if found:
        return found
    text = f"{size(min(speeds.values()))}/s, {short(max(delays.values()))} one way, node to node"
    if delay > LATENCY_S or usual < NETWORK_BYTES_S:
        wanted = f"{size(NETWORK_BYTES_S)}/s or more, at most {short(LATENCY_S)}"
        remedy = "is this the fast network? Set `interfaces` of the machine's description"
        return [Finding("links", "WARNING", text, wanted, remedy)]
    return [Finding("links", "OK", f"{text}, on the slowest node")]


def interfaces(values: Values, expected: Expected) -> list[Finding]:
    """The network that the ranks were told to use."""
    unlike = differences({n: v["name"] for n, v in values.items()})
    one = next(iter(values.values()))
    speed = f", {one['Mbit_s']:,} Mbit/s" if one["Mbit_s"] else ""
    text = f"{unlike or one['name']}{speed}, MTU {min(v['mtu'] for v in values.values()):,}"
    return [Finding("interface", "OK", text)]


def addresses(values: Values, expected: Expected) -> list[Finding]:
    """Whether connections to other nodes have the address that was meant; no news is good news."""
    others = {n: v for n, v in values.items() if set(v["used"]) - {v["meant"]}}
    return [
        Finding(
            "interface",
            "WARNING",
            f"{node}: connections from {', '.join(v['used'])}",
            f"from {v['meant']} ({v['name']}) alone",
            "the route to the other nodes leads elsewhere: set `interfaces` of the machine",
        )
        for node, v in list(others.items())[:3]
    ]


def names(values: Values, expected: Expected) -> list[Finding]:
    """A name service that answers late, or not, holds up whatever asks it: Ray's gRPC among others."""
    node, took = worst({n: v["seconds"] for n, v in values.items()}, high=True)
    if took <= NAME_S:
        return [Finding("host names", "OK", f"looked up in {short(took)} at most ({node})")]
    text = f"{node}: its own name took {short(took)} to look up"
    remedy = "dmi launch uses addresses; your own code may hang. Report it, or set /etc/hosts"
    return [Finding("host names", "WARNING", text, f"at most {NAME_S:g} s", remedy)]


def ports(values: Values, expected: Expected) -> list[Finding]:
    """Jobs of several users share a node's ports."""
    node, free = worst({n: v["free"] / v["tried"] for n, v in values.items()}, high=False)
    if free < 0.5:
        remedy = "another job has taken them; ask for whole nodes (--option=--exclusive)"
        text = f"{node}: {100 * free:.0f} % of the ports tried are free"
        return [Finding("ports", "FAILURE", text, "most of 20,000 to 29,999", remedy)]
    begins = min(v["outgoing_from"] for v in values.values())
    if begins < 30_000:
        text = f"outgoing connections take ports from {begins:,} on"
        remedy = "a start may meet a taken port: repeat it; report net.ipv4.ip_local_port_range"
        return [Finding("ports", "WARNING", text, "from 30,000 on", remedy)]
    return [Finding("ports", "OK", f"{100 * free:.0f} % of those tried are free, at least")]


def time_left(values: Values, expected: Expected) -> list[Finding]:
    """Of the job, as its nodes are told."""
    known = {n: v for n, v in values.items() if v is not None}
    if not known:
        return [Finding("time left", "OK", "no end is known")]
    _, least = worst(known, high=False)
    text = f"{clock(max(0, int(least)))} of this job"
    if least < TIME_S:
        remedy = "ask for more (-t)"
        return [Finding("time left", "WARNING", text, f"{clock(int(TIME_S))} or more", remedy)]
    return [Finding("time left", "OK", text)]


def mpi(record: Mapping[str, Any], expected: Expected) -> list[Finding]:
    """The world that MPI sees; record: of rank 0, empty if it said nothing."""
    if not expected.mpi:
        return []
    count, seen = len(expected.hosts), record.get("size")
    if seen == count and not record["why"]:
        return [Finding("MPI", "OK", f"{counted(count, 'rank')}, as started")]
    text = record.get("why") or (f"a world of {seen}" if record else "it did not start")
    remedy = "set `mpi` of the machine's description to what fits the MPI library (srun --mpi=list)"
    return [Finding("MPI", "FAILURE", text, f"a world of {count}", remedy)]
