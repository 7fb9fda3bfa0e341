"""benchmarks/launch_scale.py: how calls are counted, and the arithmetic of large jobs."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from launching.arithmetic import SIZES, Measured, Scale, Site, most_ranks, reading_s
from launching.starts import Call, calls_of, load_of

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

TRACE = """\
7 execve("/env/bin/python", ["python"], 0x7ff /* 3 vars */) = 0
7 openat(AT_FDCWD</home>, "/env/lib/a.py", O_RDONLY|O_CLOEXEC) = 3</env/lib/a.py>
7 newfstatat(3</env/lib/a.py>, "", {st_mode=S_IFREG|0644, ...}, AT_EMPTY_PATH) = 0
7 newfstatat(AT_FDCWD</home>, "/env/lib/b.py", 0x7ff, 0) = -1 ENOENT (No such file or directory)
7 getdents64(4</env/lib>, 0x55 /* 9 entries */, 32768) = 280
8 openat(4</env/lib>, "c.so", O_RDONLY <unfinished ...>
7 openat(AT_FDCWD</env/lib>, "../../proc/1/stat", O_RDONLY) = 5</proc/1/stat>
8 <... openat resumed>) = -1 ENOENT (No such file or directory)
7 clone(child_stack=NULL) = 9
7 +++ exited with 0 +++
"""


def test_calls_of_a_trace_have_kind_path_and_success():
    assert calls_of(TRACE.splitlines(keepends=True)) == [
        Call("open", "/env/bin/python", True),
        Call("open", "/env/lib/a.py", True),
        Call("stat", "/env/lib/b.py", False),
        Call("list", "/env/lib", True),
        Call("open", "/proc/1/stat", True),
        Call("open", "/env/lib/c.so", False),
    ]


def test_a_load_counts_below_its_folders_alone(tmp_path):
    inside, outside = tmp_path / "env", tmp_path / "environment"
    inside.mkdir()
    (inside / "a").write_bytes(b"12345")
    calls = [
        *(Call("open", str(inside / "a"), True) for _ in range(3)),
        Call("stat", str(inside / "b"), False),
        Call("list", str(inside), True),
        Call("open", str(outside / "a"), True),
    ]
    load = load_of(calls, [inside])
    assert (load.opens, load.stats, load.lists, load.missing, load.calls) == (3, 1, 1, 1, 5)
    assert (load.paths, load.files, load.bytes) == (3, 1, 5)
    assert (load - load).calls == 0


@pytest.mark.parametrize(
    ("name", "power"),
    [
        ("rank_metadata", 1),
        ("search_metadata", 1),
        ("read_bytes", 1),
        ("join_s", 1),
        ("gcs_cores", 1),
        ("round_bytes", 2),
        ("gcs_join_bytes", 2),
    ],
)
def test_twice_the_nodes_cost(name, power):
    once, twice = Scale(500), Scale(1000)
    assert getattr(twice, name) / getattr(once, name) == pytest.approx(2**power)


def test_gloos_addresses_grow_with_the_third_power():
    assert Scale(2000).mesh_bytes / Scale(1000).mesh_bytes == pytest.approx(8, rel=1e-3)


def test_a_broadcast_takes_a_step_more_for_each_level_of_the_tree():
    seconds = [Scale(nodes).broadcast_s for nodes in (8, 64, 65, 512)]
    assert seconds[1] == pytest.approx(2 * seconds[0])
    assert seconds[2] == seconds[3] == pytest.approx(3 * seconds[0])


def test_names_that_are_looked_up_are_paid_for_each_connection():
    slow = Scale(1024, site=Site(lookup_s=0.1))
    assert slow.join_s - Scale(1024).join_s == pytest.approx(2 * 8192 * 0.1)


def test_readings_pass_through_what_was_measured():
    for ranks, seconds in Measured().readings:
        assert reading_s(Measured().readings, ranks) == pytest.approx(seconds)
    square = ((10, 1.0), (100, 100.0))
    assert reading_s(square, 50) == pytest.approx(25.0)
    assert reading_s(square, 1000) == pytest.approx(1e4)


def test_most_ranks_are_the_last_that_are_served_in_time():
    linear = replace(Measured(), readings=((10, 1e-3), (100, 1e-2)))  # 1e-4 s a key
    assert most_ranks(linear) == 141  # the root of 2 s / 1e-4 s


def test_islands_are_as_many_as_keep_their_drivers_below_seventy_percent():
    scale = Scale(9000, measured=replace(Measured(), driver_s=6e-3, dispatch_s=6e-3))
    assert scale.islands(trial_s=480.0) == 2  # 150 trials a second, 116 for each
    assert scale.islands(trial_s=480.0, dispatch=True) == 3
    assert Scale(64).islands(60.0) == 1


def test_a_start_is_the_sum_of_its_parts_and_grows_with_the_job():
    small, large = Scale(64), Scale(9000)
    assert small.training_s == pytest.approx(
        small.broadcast_s + Measured().unpack_s + Measured().rank_start_s + small.join_s
    )
    more = large.search_s - small.search_s
    parts = ("broadcast_s", "register_s", "actors_s", "first_asks_s")
    assert more == pytest.approx(sum(getattr(large, p) - getattr(small, p) for p in parts))


def test_the_table_has_a_column_for_each_size_and_names_every_line():
    command = [sys.executable, str(BENCHMARKS / "launch_scale.py"), "--part", "table"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line[2:-2].split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert lines[0] == ["", *(f"{nodes:,} nodes" for nodes in SIZES)]
    numbers = [cells for cells in lines if len(cells) == 4][2:]
    assert len({cells[0] for cells in numbers}) > 15
    assert all(re.fullmatch(r"[\d,.e+-]+", cell) for cells in numbers for cell in cells[1:])
