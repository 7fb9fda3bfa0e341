"""`dmi launch check`: what it makes of the nodes' records, and a real one on this machine."""

import copy
import io
import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from dmi_hpc.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR, LaunchError
from dmi_hpc.watch import StopFlag
from dmi_hpc.world import World
from launch import check, checking
from launch.check import check_here, local_parts, page, run_check, verdict
from launch.network import LOOPBACK, free_port
from launch.preflight import between, judging
from launch.preflight.findings import Expected, Finding, differences, listed, short, size

HOSTS = ("node1", "node2", "node3", "node4")
HEALTHY = {
    "interface": {
        "name": "hsn0",
        "address": "10.0.0.1",
        "Mbit_s": 200_000,
        "mtu": 9000,
        "told": [],
    },
    "software": {"python": "3.11.7", "dmi-hpc": "0.1.0", "torch": "2.13.0", "ray": "2.60.0"},
    "met": [0, 1, 2, 3],
    "joined": {"seconds": 0.1, "ranks": [0, 1, 2, 3]},
    "clocks": {"latency_s": 5e-5, "offset_s": 0.001, "uncertain_s": 5e-5},
    "pairs": [{"rank": 0, "latency_s": 2e-5, "bytes_s": 3e9}],
    "addresses": {"used": ["10.0.0.1"], "meant": "10.0.0.1", "name": "hsn0"},
    "all-reduce": {"backend": "gloo", "ranks": 4, "bytes": 64_000_000, "seconds": 0.05},
    "shared files": {"visible_s": 0.01, "refused": True},
    "cores": {"usable": 64, "quota": None, "omp": 16, "torch": 16, "GFLOP_s": 90.0},
    "memory": {"usable": 256 * 10**9, "node": 256 * 10**9},
    "gpus": [{"name": "A100", "why": ""}] * 4,
    "limits": {"files": [1024, 1_048_576], "processes": [500_000, 500_000], "pids": None},
    "names": {"seconds": 0.001, "address": "10.0.0.1"},
    "ports": {"free": 50, "tried": 50, "outgoing_from": 32_768},
    "time": 3600.0,
    "node storage": [{"path": "/tmp", "kind": "ext4", "free": 10**12, "why": ""}],
    "files": {
        "kind": "lustre",
        "free": 10**14,
        "inodes": 10**8,
        "small_s": 0.01,
        "bytes_s": 1e9,
        "clock_s": 0.01,
        "lock": "",
    },
}
EXPECTED = Expected(HOSTS, gpus=4, cpus=64)


@pytest.fixture
def records():
    """Of four healthy nodes, to be changed and written."""
    made = [
        {
            "rank": rank,
            "size": 4,
            "host": host,
            "values": copy.deepcopy(HEALTHY),
            "failed": {},
            "complete": True,
        }
        for rank, host in enumerate(HOSTS)
    ]
    made[0]["values"]["shared files"] = {"lines": 80, "appended": 80}
    return made


def judged(folder, records, expected=EXPECTED):
    for record in records:
        (folder / f"node-{record['rank']}.json").write_text(json.dumps(record))
    return verdict(folder, expected)


def bad(report):
    return [(one.check, one.level) for one in report.findings if one.level != "OK"]


def shown(report, width=80):
    out = io.StringIO()
    Console(file=out, width=width).print(page(report))
    return out.getvalue()


def test_healthy_nodes_are_found_healthy(tmp_path, records):
    report = judged(tmp_path, records)
    assert bad(report) == []
    assert report.exit_code == EXIT_OK
    assert "all is well" in shown(report)


FAULTS = [
    ("software", {"torch": "2.12.0"}, "software", "FAILURE", "torch: 2.12.0 on node3, 2.13.0 on 3"),
    ("gpus", [{"name": "A100", "why": ""}] * 3, "GPUs", "FAILURE", "3 on node3"),
    (
        "gpus",
        [{"name": "A100", "why": "ECC error"}] * 4,
        "GPUs",
        "FAILURE",
        "node3: GPU 0, 1, 2, 3: ECC error",
    ),
    ("gpus", [{"name": "V100", "why": ""}] * 4, "GPUs", "WARNING", "V100"),
    ("cores", {"usable": 1, "omp": 1}, "cores", "WARNING", "1 usable on node3"),
    ("cores", {"quota": 1.5, "omp": 1}, "cores", "WARNING", "1.5 usable on node3"),
    ("cores", {"omp": 128}, "cores", "WARNING", "OMP_NUM_THREADS=128 on 64 cores (node3)"),
    ("cores", {"GFLOP_s": 20.0}, "cores", "WARNING", "node3: 20 GFLOP/s"),
    ("memory", {"usable": 10**9}, "memory", "WARNING", "1 GB usable on node3"),
    ("clocks", {"offset_s": -5.0}, "clocks", "WARNING", "node3: -5 s"),
    ("clocks", {"offset_s": 3600.0}, "clocks", "FAILURE", "node3"),
    (
        "pairs",
        [{"rank": 0, "latency_s": 2e-5, "bytes_s": 1e8}],
        "links",
        "FAILURE",
        "node3: 100 MB/s",
    ),
    (
        "pairs",
        [{"rank": 0, "latency_s": 0.005, "bytes_s": 3e9}],
        "links",
        "WARNING",
        "node3: 3 GB/s",
    ),
    ("addresses", {"used": ["192.168.0.7"]}, "interface", "WARNING", "node3: connections from 192"),
    ("shared files", {"visible_s": None}, "shared files", "FAILURE", "node3: a file of rank 0"),
    ("shared files", {"visible_s": 30.0}, "shared files", "WARNING", "node3: a new file"),
    ("shared files", {"refused": False}, "shared files", "WARNING", "node3: a lock held"),
    (
        "files",
        {"lock": "not supported"},
        "files",
        "FAILURE",
        "node3: no file locks (not supported)",
    ),
    ("files", {"free": 10**7}, "files", "FAILURE", "10 MB free (node3)"),
    ("files", {"free": 10**10}, "files", "WARNING", "10 GB free (node3)"),
    ("files", {"inodes": 10}, "files", "WARNING", "room for 10 more files"),
    ("files", {"small_s": 4.0}, "files", "WARNING", "node3: 4 s to write"),
    ("files", {"bytes_s": 1e6}, "files", "WARNING", "node3: writes 1 MB/s"),
    ("files", {"clock_s": -90.0}, "files", "WARNING", "node3"),
    (
        "node storage",
        [{"path": "/nvme", "kind": "", "free": 0, "why": "No such file or directory"}],
        "node storage",
        "WARNING",
        "/nvme on node3: No such file",
    ),
    (
        "node storage",
        [{"path": "/tmp", "kind": "ext4", "free": 10**8, "why": ""}],
        "node storage",
        "WARNING",
        "100 MB free in /tmp on node3",
    ),
    ("limits", {"files": [1024, 4096]}, "limits", "WARNING", "node3: at most 4,096 open files"),
    ("limits", {"files": [1024, 1024]}, "limits", "FAILURE", "node3: at most 1,024 open files"),
    ("limits", {"pids": 300}, "limits", "WARNING", "node3: at most 300 processes"),
    ("names", {"seconds": 5.0}, "host names", "WARNING", "node3: its own name took 5 s"),
    ("ports", {"free": 3}, "ports", "FAILURE", "node3: 6 %"),
    ("ports", {"outgoing_from": 1024}, "ports", "WARNING", "from 1,024 on"),
    ("time", 100.0, "time left", "WARNING", "00:01:40"),
]


@pytest.mark.parametrize(("probe", "change", "check_", "level", "words"), FAULTS)
def test_what_is_wrong_with_a_node_is_found_and_nothing_else(
    tmp_path, records, probe, change, check_, level, words
):
    values = records[2]["values"]
    values[probe] = {**values[probe], **change} if isinstance(change, dict) else change
    report = judged(tmp_path, records)
    assert bad(report) == [(check_, level)]
    (finding,) = (one for one in report.findings if one.level != "OK")
    assert words in finding.found
    assert finding.expected
    assert finding.remedy
    assert report.exit_code == (EXIT_USER_ERROR if level == "FAILURE" else EXIT_OK)


def test_a_network_that_is_slow_for_all_is_no_single_node_s_fault(tmp_path, records):
    for record in records:
        record["values"]["pairs"] = [{"rank": 0, "latency_s": 0.01, "bytes_s": 1e7}]
        record["values"]["all-reduce"]["seconds"] = 20.0
    report = judged(tmp_path, records)
    assert bad(report) == [("links", "WARNING"), ("all-reduce", "WARNING")]
    assert "node3" not in shown(report)


def test_lines_that_several_nodes_appended_and_that_are_gone_are_counted(tmp_path, records):
    records[0]["values"]["shared files"] = {"lines": 73, "appended": 80}
    (finding,) = (one for one in judged(tmp_path, records).findings if one.level != "OK")
    assert "7 lines lost" in finding.found


def test_a_node_that_never_answered_is_named(tmp_path, records):
    for record in records:
        record["values"]["met"] = [0, 1, 3]
        record["host"] += ".cluster"  # a node may know itself by its long name
    report = judged(tmp_path, [records[0], records[1], records[3]])
    assert bad(report) == [("nodes", "FAILURE")]
    assert "node3: no answer" in shown(report)


def test_nodes_that_share_a_host_are_known_by_their_rank(tmp_path, records):
    for record in records:
        record["host"] = "laptop"
    report = judged(tmp_path, records[:3], Expected(("laptop",) * 4, gpus=4))
    assert "rank 3: no answer" in shown(report)
    records[2]["values"]["names"]["seconds"] = 9.0
    report = judged(tmp_path, records, Expected(("laptop",) * 4, gpus=4))
    assert "laptop/2: its own name" in shown(report)


def test_no_records_at_all_are_a_failure(tmp_path):
    report = verdict(tmp_path, EXPECTED)
    assert report.exit_code == EXIT_USER_ERROR
    assert "node1, node2, node3, node4: no answer" in shown(report)


def test_a_node_that_died_in_the_middle_or_came_too_late_is_named(tmp_path, records):
    records[1] |= {"complete": False, "values": {}}
    records[3]["values"]["met"] = records[0]["values"]["met"] = [0, 2, 3]
    assert "node2: ended before everything was measured" in shown(judged(tmp_path, records))
    records[1] |= {"complete": True, "values": {"software": HEALTHY["software"]}}
    assert "node2: did not meet the others" in shown(judged(tmp_path, records))


def test_probes_that_failed_are_said_with_their_reason_and_what_to_do(tmp_path, records):
    for record in records[1:3]:
        del record["values"]["files"]
        record["failed"]["files"] = "no answer within 120 s"
    report = judged(tmp_path, records)
    assert bad(report) == [("files", "FAILURE")]
    assert "node2, node3: no answer within 120 s" in shown(report)
    assert "choose another folder" in shown(report, 200)


def test_the_world_that_mpi_sees_is_judged_if_it_was_tried(tmp_path, records):
    tried = Expected(HOSTS, gpus=4, cpus=64, mpi=True)
    assert bad(judged(tmp_path, records, tried)) == [("MPI", "FAILURE")]
    for count, found in ((1, [("MPI", "FAILURE")]), (4, [])):
        (tmp_path / "mpi.json").write_text(json.dumps({"size": count, "why": ""}))
        assert bad(judged(tmp_path, records, tried)) == found


def test_the_page_fits_a_terminal_and_shows_text_as_it_is(tmp_path, records):
    records[2]["failed"]["ports"] = "[bold]no[/bold] " + "word " * 40
    text = shown(judged(tmp_path, records))
    assert max(map(len, text.splitlines())) <= 80
    assert "[bold]no[/bold]" in text


@given(st.integers(2, 40))
def test_in_a_round_each_node_meets_another_and_never_the_same_twice(count):
    rounds = count - 1 + count % 2
    met = {index: [] for index in range(count)}
    for round_ in range(rounds):
        partners = [between.partner(index, round_, count) for index in range(count)]
        assert partners.count(None) == count % 2
        for index, other in enumerate(partners):
            if other is not None:
                assert other != index
                assert partners[other] == index
                met[index].append(other)
    assert all(sorted(met[i]) == [j for j in range(count) if j != i] for i in met)


@given(
    st.integers(3, 20),
    st.data(),
    st.floats(0.02, 0.25),
    st.floats(1e6, 1e11),
)
def test_the_slow_node_is_named_whoever_its_partners_were(count, data, factor, usual):
    slow = data.draw(st.integers(0, count - 1))
    noise = data.draw(st.lists(st.floats(0.8, 1.2), min_size=count, max_size=count))
    speeds = {}
    for index in range(count):
        partners = [between.partner(index, round_, count) for round_ in range(between.ROUNDS)]
        shared = [
            usual * min(noise[index], noise[other]) * (factor if slow in (index, other) else 1)
            for other in partners
            if other is not None
        ]
        speeds[f"node{index}"] = [{"latency_s": 1e-5, "bytes_s": speed} for speed in shared]
    found = judging.links(speeds, EXPECTED)
    named = [one.found.partition(":")[0] for one in found if one.level == "FAILURE"]
    assert named == [f"node{slow}"]


@given(
    st.floats(-1e4, 1e4),
    st.lists(st.tuples(*[st.floats(0.0, 0.5)] * 4), min_size=1, max_size=20),
)
def test_the_clock_s_offset_lies_within_its_uncertainty(offset, delays):
    mine, theirs, now = [], [], 1.7e9
    for enter_a, enter_b, leave_a, leave_b in delays:
        entered = (now + enter_a, now + enter_b)
        together = max(entered)  # nobody leaves before all have entered
        mine.append((entered[0] + offset, together + leave_a + offset))
        theirs.append((entered[1], together + leave_b))
        now = together + 1
    found, uncertain = between.clock_offset(mine, theirs)
    assert abs(found - offset) <= uncertain + 1e-5


@given(st.dictionaries(st.text(min_size=1), st.sampled_from("abc"), min_size=1, max_size=12))
def test_differences_are_said_if_there_are_any(values):
    text = differences(values)
    assert (text == "") == (len(set(values.values())) == 1)
    assert all(f"{value} on " in text for value in set(values.values()) if text)


def test_figures_are_said_in_units_for_people():
    assert [size(n) for n in (512, 2e6, 1.5e9, 2e13)] == ["0.512 kB", "2 MB", "1.5 GB", "20 TB"]
    assert [short(s) for s in (2.5, 0.0123, 4.2e-5, -0.5)] == [
        "2.5 s",
        "12.3 ms",
        "42 µs",
        "-500 ms",
    ]
    assert listed([f"n{i}" for i in range(8)]) == "n0, n1, n2, n3, n4, n5 and 2 others"


def test_a_probe_that_hangs_or_fails_is_noted_and_the_rest_goes_on(tmp_path):
    record = checking.Record(tmp_path, World(rank=3, size=4))
    never = threading.Event()

    def fails():
        raise LaunchError("no such\n network")

    assert not record.add("hangs", lambda: never.wait(20), 0.05)
    assert not record.add("fails", fails)
    assert record.add("works", lambda: 7)
    record.save()
    never.set()
    written = json.loads((tmp_path / "node-3.json").read_text())
    assert written["values"] == {"works": 7}
    assert written["failed"] == {"hangs": "no answer within 0 s", "fails": "no such network"}
    assert "complete" not in written


def test_the_nodes_that_came_in_time_go_on_without_the_others():
    port = free_port(LOOPBACK, os.getpid())

    def come(rank):
        store = between.open_store(rank, 3, LOOPBACK, port, 5.0)
        return between.meet(rank, 3, store, 0.5)

    with ThreadPoolExecutor(2) as ranks:
        met = list(ranks.map(come, (0, 2)))
    assert [(m.ranks, m.index) for m in met] == [((0, 2), 0), ((0, 2), 1)]
    late = between.open_store(1, 3, LOOPBACK, port, 5.0)
    with pytest.raises(LaunchError, match="came later"):
        between.meet(1, 3, late, 0.5)
    listening = {
        c.laddr.ip
        for c in psutil.Process().net_connections(kind="tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }
    assert listening == {LOOPBACK}


def test_a_check_of_this_machine_finds_its_ranks_and_leaves_nothing_behind(tmp_path):
    report = check_here(tmp_path / "new", StopFlag())
    found = {one.check: one.level for one in report.findings}
    assert {name for name, *_ in check.JUDGES.values()} - found.keys() == {"network"}
    measured = ("nodes", "software", "shared files", "interface", "clocks")
    assert [found[name] for name in measured] == ["OK"] * len(measured)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_check_that_is_stopped_gives_no_verdict(tmp_path):
    stop = StopFlag()
    stop.signal = signal.SIGTERM
    with pytest.raises(SystemExit) as left:
        check_here(tmp_path, stop)
    assert left.value.code == EXIT_INTERRUPTED
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_is_judged_by_what_its_nodes_wrote(tmp_path):
    (tmp_path / "file").touch()
    parts = local_parts(tmp_path / "file")  # nothing can be written there
    report = run_check([parts], tmp_path, Expected(("a", "b")), StopFlag())
    assert bad(report) == [("nodes", "FAILURE"), ("step", "WARNING")]
    assert report.exit_code == EXIT_USER_ERROR
    assert isinstance(report.findings[0], Finding)
