import errno
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from dmi_hpc.data.build import Alone, build
from dmi_hpc.data.shards import ShardSet
from dmi_hpc.errors import CorruptShardError, DataError, RunError
from dmi_hpc.files import exclusive

HERE = Path(__file__).parent


@pytest.fixture
def toy(monkeypatch):
    """The module of row makers, importable here and in spawned workers."""
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("build_fixture")


class ThreadRanks:
    """Ranks that are threads of this process."""

    def __init__(self, size):
        self.size, self.values = size, [None] * size
        self.meet = threading.Barrier(size, timeout=30)

    def rank(self, rank):
        ranks = self

        class Rank:
            size = ranks.size

            def share(self, value):
                ranks.values[rank] = value
                ranks.meet.wait()
                shared = list(ranks.values)
                ranks.meet.wait()  # all have read before one writes again
                return shared

            def gather(self, value):
                shared = self.share(value)
                return shared if rank == 0 else None

        Rank.rank = rank
        return Rank()


def build_alone(target, toy, plan=None, rows=None, processes=1, progress=lambda n: None):
    plan, rows = plan or toy.make_plan(), rows or toy.Rows()
    return build(target, plan, rows, Alone(), processes, progress)


def build_on_ranks(target, toy, size, rows=None):
    """The outcome of each rank: a manifest or the error."""
    ranks = ThreadRanks(size)

    def one(rank):
        try:
            made = rows or toy.Rows()
            return build(target, toy.make_plan(), made, ranks.rank(rank), 1, lambda n: None)
        except DataError as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_built_is_what_was_made(tmp_path, toy):
    manifest = build_alone(tmp_path / "set", toy)
    made = toy.Rows()(np.arange(100))
    assert [shard.rows for shard in manifest.shards] == [17, 17, 17, 17, 17, 15]
    with ShardSet.open(tmp_path / "set") as shards:
        found = shards.fields(("x", "n"), shards.rows("all"))
        assert np.array_equal(found["x"], made["x"])
        train = made["x"][shards.rows("train")].astype(np.float64)
        assert manifest.split_rows["train"] == len(train)
    statistics = manifest.statistics["x"]
    assert statistics.mean == pytest.approx(train.mean(), rel=1e-13)
    assert statistics.std == pytest.approx(train.std(), rel=1e-11)
    assert (statistics.min, statistics.max) == (train.min(), train.max())
    assert statistics.count == train.size
    assert set(manifest.statistics) == {"x", "n"}


def test_processes_and_ranks_change_nothing(tmp_path, toy):
    reference = build_alone(tmp_path / "one", toy)
    done = []
    assert build_alone(tmp_path / "three", toy, processes=3, progress=done.append) == reference
    assert build_on_ranks(tmp_path / "ranks", toy, 2) == [reference, reference]
    assert build_on_ranks(tmp_path / "many", toy, 8) == [reference] * 8  # more ranks than shards
    one = content(tmp_path / "one")
    assert one == content(tmp_path / "three") == content(tmp_path / "ranks")
    assert sum(done) == 100


def test_progress_counts_rows(tmp_path, toy):
    done = []
    build_alone(tmp_path / "set", toy, progress=done.append)
    assert sum(done) == 100
    assert max(done) < 17  # finer than shards


def test_an_equal_plan_is_not_built_again(tmp_path, toy):
    manifest = build_alone(tmp_path, toy)
    assert build_alone(tmp_path, toy, rows=toy.Rows(fail_at=0)) == manifest


def test_another_plan_is_refused_with_the_difference(tmp_path, toy):
    build_alone(tmp_path, toy)
    before = content(tmp_path)
    with pytest.raises(DataError, match=r"rows: found 100, expected 90\n.*another folder"):
        build_alone(tmp_path, toy, toy.make_plan(rows=90))
    with pytest.raises(DataError, match=r"provenance: found \{\}, expected \{'voxels': 15\}"):
        build_alone(tmp_path, toy, toy.make_plan(provenance={"voxels": 15}))
    assert content(tmp_path) == before


def test_only_a_lost_shard_is_made_again(tmp_path, toy):
    manifest = build_alone(tmp_path, toy)
    before = content(tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    (tmp_path / "shard-00003.h5").unlink()
    assert build_alone(tmp_path, toy) == manifest
    assert content(tmp_path) == before
    again = {p.name for p in tmp_path.iterdir() if p.stat().st_mtime_ns != times[p.name]}
    assert again == {"shard-00003.h5", "manifest.json"}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_row_stops_the_build_and_finished_shards_stay(tmp_path, toy, processes, capfd):
    with pytest.raises(DataError, match="ZeroDivisionError: no solution for row 40"):
        build_alone(tmp_path, toy, rows=toy.Rows(fail_at=40), processes=processes)
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        ShardSet.open(tmp_path)
    assert "Traceback" not in capfd.readouterr().err  # of workers that lost their parent
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert processes > 1 or "shard-00000.h5" in kept
    assert not [name for name in kept if name.startswith(".tmp")]
    build_alone(tmp_path, toy)
    assert all((tmp_path / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items())


def test_a_failure_stops_the_other_workers(tmp_path, toy):
    plan = toy.make_plan(rows=4000, rows_per_shard=100)
    with pytest.raises(DataError, match="row 0"):
        build_alone(tmp_path, toy, plan, toy.Rows(sleep_s=0.05, fail_at=0), processes=2)
    assert len(list(tmp_path.glob("shard-*"))) < 20


def test_a_dead_worker_is_an_error(tmp_path, toy):
    with pytest.raises(DataError, match=r"a worker process died.*fewer processes"):
        build_alone(tmp_path, toy, rows=toy.Rows(die_at=40), processes=2)


def test_every_rank_hears_of_a_failure(tmp_path, toy):
    first, second = build_on_ranks(tmp_path, toy, 2, toy.Rows(fail_at=20))  # in shard 1: rank 1
    assert isinstance(first, DataError)
    assert isinstance(second, DataError)
    assert "rank 1" in str(first)
    assert "no solution for row 20" in str(first)
    assert not (tmp_path / "manifest.json").exists()


def test_every_rank_hears_of_another_set_in_the_folder(tmp_path, toy):
    build_alone(tmp_path, toy, toy.make_plan(seed=1))
    outcomes = build_on_ranks(tmp_path, toy, 3)
    assert all("holds another data set" in str(error) for error in outcomes)


def test_a_second_build_in_the_folder_is_refused(tmp_path, toy):
    with exclusive(tmp_path, "build"), pytest.raises(RunError, match="another build of a data set"):
        build_alone(tmp_path, toy)
    build_alone(tmp_path, toy)
    with exclusive(tmp_path, "build"):  # a finished set is only read
        build_alone(tmp_path, toy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.pop("x"), "no field 'x'"),
        (lambda made: made.update(x=made["x"][:, :2]), r"'x': expected float32 \(16, 3\)"),
        (lambda made: made.update(x=made["x"] * np.float32(np.nan)), "'x' has values that are not"),
        (lambda made: made.update(split=np.full(16, 3, np.uint8)), "expected 0, 1 or 2"),
    ],
)
def test_wrong_rows_are_named(tmp_path, toy, change, message):
    def rows(ids):
        made = toy.Rows()(ids)
        change(made)
        return made

    with pytest.raises(DataError, match=f"rows 0 to 15.*{message}"):
        build_alone(tmp_path, toy, rows=rows)


def test_rows_may_bring_their_split(tmp_path, toy):
    def rows(ids):
        return toy.Rows()(ids) | {"split": (ids % 3).astype(np.uint8)}

    manifest = build_alone(tmp_path, toy, rows=rows)
    assert manifest.split_rows == {"train": 34, "validation": 33, "test": 33}


def test_a_set_without_training_rows_has_no_statistics(tmp_path, toy):
    rule = toy.make_plan().split_rule.model_copy(update={"validation": 0.0, "test": 1.0})
    manifest = build_alone(tmp_path, toy, toy.make_plan(split_rule=rule))
    assert manifest.statistics == {}
    assert manifest.split_rows == {"train": 0, "validation": 0, "test": 100}


def test_a_full_disk_says_so_and_leaves_whole_shards_only(tmp_path, toy, monkeypatch):
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr("dmi_hpc.files.os.fsync", full)
    with pytest.raises(DataError, match=r"no space left.*needs about .* MB, .* MB are free"):
        build_alone(tmp_path, toy)
    assert sorted(content(tmp_path)) == ["shard-00000.h5", "shard-00001.h5"]
    monkeypatch.undo()
    monkeypatch.syspath_prepend(HERE)
    build_alone(tmp_path, toy)
    ShardSet.open(tmp_path).close()


def test_an_unfinished_set_of_another_plan_is_not_overwritten(tmp_path, toy):
    with pytest.raises(DataError, match="row 40"):
        build_alone(tmp_path, toy, rows=toy.Rows(fail_at=40))
    before = content(tmp_path)
    with pytest.raises(DataError, match="another, unfinished data set"):
        build_alone(tmp_path, toy, toy.make_plan(seed=1))
    assert content(tmp_path) == before


def test_a_damaged_shard_of_an_interrupted_build_is_made_again(tmp_path, toy):
    build_alone(tmp_path, toy)
    before = content(tmp_path)
    (tmp_path / "manifest.json").unlink()
    path = tmp_path / "shard-00002.h5"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    build_alone(tmp_path, toy)
    assert content(tmp_path) == before


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import build_fixture as toy
from dmi_hpc.data.build import Alone, build
build(Path(sys.argv[2]), toy.make_plan(), toy.Rows(sleep_s=0.2), Alone(), 2, lambda n: None)
"""


def test_kill_and_repeat(tmp_path, toy):
    target = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(HERE), str(target)])
    try:
        while len(list(target.glob("shard-*"))) < 2:
            assert process.poll() is None, "it ended too early"
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert workers
    assert not psutil.wait_procs(workers, timeout=20)[1], "workers outlive their parent"
    (target / ".tmp-shard-00005.h5-1-abc").write_bytes(b"half")
    kept = {path.name: path.stat().st_mtime_ns for path in target.glob("shard-*")}
    assert not (target / "manifest.json").exists()
    reference = build_alone(tmp_path / "whole", toy)
    assert build_alone(target, toy) == reference
    assert content(target) == content(tmp_path / "whole")
    assert all((target / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items())


def test_a_corrupt_shard_is_mended_as_its_message_says(tmp_path, toy):
    build_alone(tmp_path, toy)
    before = content(tmp_path)
    path = tmp_path / "shard-00001.h5"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptShardError, match="Delete the file and repeat"):
        ShardSet.open(tmp_path)
    path.unlink()
    build_alone(tmp_path, toy)
    assert content(tmp_path) == before
