import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import toy_build as toy
import toy_disk as disk

from dmi_hpc.data.build import Alone, build
from dmi_hpc.data.manifest import read_manifest
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.sampler import Order
from dmi_hpc.errors import CorruptShardError, DataError, RunError
from dmi_hpc.files import exclusive

SUPPORT = Path(toy.__file__).parent
CODECS = [None, "zstd", "blosc2"]


def called(path):
    """First rows of the calls of make_rows that were noted in a file."""
    return [int(line.split()[0]) for line in path.read_text().splitlines()]


def read_all(folder, backend="mmap"):
    with ShardSet.open(folder, backend=backend) as shards:
        return toy.stored_rows(shards)


@pytest.mark.parametrize("codec", CODECS)
def test_what_is_built_is_what_was_made(tmp_path, codec):
    manifest = toy.build_alone(tmp_path, toy.make_plan(codec=codec))
    found = read_all(tmp_path, "pread")
    for name, made in toy.make_rows(range(100)).items():
        assert toy.equal(found[name], made), name
    assert [shard.rows for shard in manifest.shards] == [17, 17, 17, 17, 17, 15]
    with ShardSet.open(tmp_path) as shards:
        train = shards.gather("x", shards.rows("train")).astype(np.float64)
        splits = {name: len(shards.rows(name)) for name in ("train", "validation", "test")}
    assert manifest.split_rows == splits
    statistics = manifest.statistics["x"]
    assert statistics.mean == pytest.approx(train.mean(), rel=1e-13)
    assert statistics.std == pytest.approx(train.std(), rel=1e-11)
    assert (statistics.min, statistics.max) == (train.min(), train.max())
    assert statistics.count == train.size
    assert set(manifest.statistics) == {"x", "n", "volume", "z", "edge"}
    assert {path.name for path in tmp_path.iterdir()} == {
        "manifest.json",
        *(shard.file for shard in manifest.shards),
    }


@pytest.mark.parametrize("codec", CODECS)
def test_processes_and_ranks_change_nothing(tmp_path, codec):
    plan, done = toy.make_plan(codec=codec), []
    reference = toy.build_alone(tmp_path / "one", plan)
    assert toy.build_on_ranks(tmp_path / "ranks", 2, plan=plan) == [reference, reference]
    assert toy.build_on_ranks(tmp_path / "many", 8, plan=plan) == [reference] * 8  # > shards
    one = toy.content(tmp_path / "one")
    assert one == toy.content(tmp_path / "ranks") == toy.content(tmp_path / "many")
    if codec is None:
        three = toy.build_alone(tmp_path / "three", plan, processes=3, progress=done.append)
        assert three == reference
        assert one == toy.content(tmp_path / "three")
        assert sum(done) == 100


def test_a_shuffled_plan_asks_for_the_rows_in_the_order_of_its_seed(tmp_path):
    plan = toy.make_plan(shuffled=True, seed=3)
    toy.build_alone(tmp_path / "a", plan)
    order = Order(3, 100).index(0, np.arange(100, dtype=np.int64))
    with ShardSet.open(tmp_path / "a") as shards:
        first = np.arange(17)
        assert sorted(shards.gather("n", first)) == sorted(order[:17])
        assert sorted(shards.gather("n", shards.rows("all"))) == list(range(100))
        assert not np.array_equal(shards.gather("n", shards.rows("all")), np.arange(100))
    toy.build_on_ranks(tmp_path / "b", 3, plan=plan)
    assert toy.content(tmp_path / "a") == toy.content(tmp_path / "b")
    same = toy.build_alone(tmp_path / "c", toy.make_plan(seed=3))
    assert same.identity != read_manifest(tmp_path / "a").identity
    assert same.split_rows == read_manifest(tmp_path / "a").split_rows  # keys are row numbers


def test_progress_counts_rows(tmp_path):
    done = []
    toy.build_alone(tmp_path / "set", progress=done.append)
    assert sum(done) == 100
    assert max(done) < 17  # finer than shards


def test_an_equal_plan_is_not_built_again(tmp_path):
    manifest = toy.build_alone(tmp_path)
    assert toy.build_alone(tmp_path, rows=toy.Rows(fail_at=0)) == manifest


def test_another_plan_is_refused_with_the_difference(tmp_path):
    toy.build_alone(tmp_path)
    before = toy.content(tmp_path)
    with pytest.raises(DataError, match=r"rows: found 100, expected 90\n.*another folder"):
        toy.build_alone(tmp_path, toy.make_plan(rows=90))
    with pytest.raises(DataError, match=r"provenance: found \{\}, expected \{'voxels': 15\}"):
        toy.build_alone(tmp_path, toy.make_plan(provenance={"voxels": 15}))
    assert toy.content(tmp_path) == before


def test_only_a_lost_shard_is_made_again(tmp_path):
    target, calls = tmp_path / "set", tmp_path / "calls"
    manifest = toy.build_alone(target)
    before = toy.content(target)
    times = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    (target / "shard-00003.h5").unlink()
    assert toy.build_alone(target, rows=toy.Rows(calls=str(calls))) == manifest
    assert toy.content(target) == before
    again = {p.name for p in target.iterdir() if p.stat().st_mtime_ns != times[p.name]}
    assert again == {"shard-00003.h5", "manifest.json"}
    assert called(calls) == [51, 67]  # shard 3 in calls of 16 rows


def test_parts_left_by_a_kill_behind_the_commit_are_removed(tmp_path):
    target = tmp_path / "set"
    toy.build_alone(target)
    before = toy.content(target)
    (target / "shard-00001.h5.part.json").write_text("{}")
    shutil.copy(target / "shard-00001.h5", target / "shard-00099.h5")
    (target / ".tmp-manifest.json-1-0123abcd").write_bytes(b"half")
    toy.build_alone(target, rows=toy.Rows(fail_at=0))
    assert toy.content(target) == before


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_row_stops_the_build_and_finished_shards_stay(tmp_path, processes, capfd):
    with pytest.raises(DataError, match="ZeroDivisionError: no solution for row 40"):
        toy.build_alone(tmp_path, rows=toy.Rows(fail_at=40), processes=processes)
    with pytest.raises(DataError, match=r"manifest\.json: no such file"):
        ShardSet.open(tmp_path)
    assert "Traceback" not in capfd.readouterr().err  # of workers that lost their parent
    assert not list(tmp_path.glob(".tmp*"))
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.h5")}
    assert processes > 1 or "shard-00000.h5" in kept
    toy.build_alone(tmp_path)
    assert all((tmp_path / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items())


def test_a_failure_stops_the_other_workers(tmp_path):
    plan = toy.make_plan(rows=4000, rows_per_shard=100)
    with pytest.raises(DataError, match="row 0"):
        toy.build_alone(tmp_path, plan, toy.Rows(sleep_s=0.05, fail_at=0), processes=2)
    assert len(list(tmp_path.glob("shard-*"))) < 20


def test_a_dead_worker_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"a worker process died.*fewer processes"):
        toy.build_alone(tmp_path, rows=toy.Rows(die_at=40), processes=2)


def test_every_rank_hears_of_a_failure(tmp_path):
    first, second = toy.build_on_ranks(tmp_path, 2, toy.Rows(fail_at=20))  # in shard 1: rank 1
    assert isinstance(first, DataError)
    assert isinstance(second, DataError)
    assert "rank 1" in str(first)
    assert "no solution for row 20" in str(first)
    assert not (tmp_path / "manifest.json").exists()


def test_every_rank_hears_of_another_set_in_the_folder(tmp_path):
    toy.build_alone(tmp_path, toy.make_plan(seed=1))
    outcomes = toy.build_on_ranks(tmp_path, 3)
    assert all("holds another data set" in str(error) for error in outcomes)


def test_a_second_build_in_the_folder_is_refused(tmp_path):
    with exclusive(tmp_path, "build"), pytest.raises(RunError, match="another build of a data set"):
        toy.build_alone(tmp_path)
    toy.build_alone(tmp_path)
    with exclusive(tmp_path, "build"):  # a finished set is only read
        toy.build_alone(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made.pop("x"), "no field 'x'"),
        (lambda made: made.update(x=made["x"][:, :2]), r"'x': expected float32 \(3,\)"),
        (lambda made: made.update(x=made["x"] * np.float32(np.nan)), "'x' has values that are not"),
        (lambda made: made.update(split=np.full(16, 3, np.uint8)), "expected 0, 1 or 2"),
        (
            lambda made: made.update(x=made["x"].tolist()),
            r"'x': expected dense rows, a NumPy array \(n, 3\) of float32; found list",
        ),
        (lambda made: made.update(z=made["n"]), "'z': expected ragged rows.*found ndarray"),
        (lambda made: made.update(n=made["n"][:3]), "'n': 3 rows, expected 16"),
    ],
)
def test_wrong_rows_are_named(tmp_path, change, message):
    def rows(ids):
        made = toy.make_rows(ids)
        change(made)
        return made

    with pytest.raises(DataError, match=f"rows 0 to 15: .*{message}"):
        toy.build_alone(tmp_path, rows=rows)


def test_rows_may_bring_their_split(tmp_path):
    def rows(ids):
        return toy.Rows()(ids) | {"split": (ids % 3).astype(np.uint8)}

    manifest = toy.build_alone(tmp_path, rows=rows)
    assert manifest.split_rows == {"train": 34, "validation": 33, "test": 33}


def test_a_set_without_training_rows_has_no_statistics(tmp_path):
    rule = toy.make_plan().split_rule.model_copy(update={"validation": 0.0, "test": 1.0})
    manifest = toy.build_alone(tmp_path, toy.make_plan(split_rule=rule))
    assert manifest.statistics == {}
    assert manifest.split_rows == {"train": 0, "validation": 0, "test": 100}


@pytest.mark.parametrize("where", ["shard", "part", "last shard", "last part", "manifest"])
def test_a_full_disk_says_so_and_leaves_whole_shards_only(tmp_path, where):
    target, calls = tmp_path / "set", tmp_path / "calls"
    with disk.room(10**9) as left:
        toy.build_alone(tmp_path / "whole")
        needed = 10**9 - left[0]
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole").iterdir()}
    shard = sizes["shard-00000.h5"]
    part = (needed - sum(sizes.values())) // 6
    rooms = {
        "shard": (shard // 2, 0),
        "part": (shard + part // 2, 0),
        "last shard": (needed - sizes["manifest.json"] - part - shard // 2, 5),
        "last part": (needed - sizes["manifest.json"] - part // 2, 5),
        "manifest": (needed - sizes["manifest.json"] // 2, 6),
    }
    size, kept = rooms[where]
    with disk.room(size), pytest.raises(DataError, match=r"no space left.*MB are free"):
        toy.build_alone(target)
    found = toy.content(target)
    whole = {f"shard-{k:05d}.h5" for k in range(kept)}
    notes = {f"{name}.part.json" for name in whole}
    unnoted = {f"shard-{kept:05d}.h5"} if "part" in where else set()
    assert set(found) == whole | notes | unnoted
    toy.build_alone(target, rows=toy.Rows(calls=str(calls)) if kept < 6 else toy.Rows(fail_at=0))
    assert toy.content(target) == toy.content(tmp_path / "whole")
    if kept < 6:
        assert called(calls)[0] == 17 * kept


def test_a_full_disk_tells_how_much_is_needed(tmp_path):
    plan = toy.make_plan(rows=10**6, fields=toy.FIELDS[:2])
    with (
        disk.room(0),
        pytest.raises(DataError, match=r"whole set needs about 21\.0 MB; .* are free"),
    ):
        toy.build_alone(tmp_path, plan)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_small_disk_says_so_and_more_room_goes_on(tmp_path, processes):
    calls = tmp_path / "calls"
    with disk.small_disk(tmp_path / "disk", 2 << 20) as folder:
        with pytest.raises(DataError, match=r"no space left.*Make room and repeat"):
            toy.build_alone(folder / "set", toy.make_plan(rows=200), processes=processes)
        names = {path.name for path in (folder / "set").iterdir()}
        kept = {name for name in names if name + ".part.json" in names}
        assert 0 < len(kept) < 12
        assert not [name for name in names if name.startswith((".tmp", ".dmi-lock", "manifest"))]
        moved = tmp_path / "roomy"
        shutil.copytree(folder / "set", moved)
    toy.build_alone(moved, toy.make_plan(rows=200), toy.Rows(calls=str(calls)))
    assert {f"shard-{first // 17:05d}.h5" for first in called(calls)}.isdisjoint(kept)
    toy.build_alone(tmp_path / "whole", toy.make_plan(rows=200))
    assert toy.content(moved) == toy.content(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(DataError, match="row 40"):
        toy.build_alone(tmp_path / "set", rows=toy.Rows(fail_at=40))
    before = toy.content(tmp_path / "set")
    refused = pytest.raises(RunError, match=r"cannot write: .*set/\.dmi-lock")
    with disk.read_only(tmp_path / "set"), refused:
        toy.build_alone(tmp_path / "set")
    assert toy.content(tmp_path / "set") == before
    toy.build_alone(tmp_path / "set")
    with disk.read_only(tmp_path / "set"):
        toy.build_alone(tmp_path / "set", rows=toy.Rows(fail_at=0))  # there already


def test_an_unfinished_set_of_another_plan_is_not_overwritten(tmp_path):
    with pytest.raises(DataError, match="row 40"):
        toy.build_alone(tmp_path, rows=toy.Rows(fail_at=40))
    before = toy.content(tmp_path)
    with pytest.raises(DataError, match="another, unfinished data set"):
        toy.build_alone(tmp_path, toy.make_plan(seed=1))
    assert toy.content(tmp_path) == before


def test_a_damaged_shard_of_an_interrupted_build_is_made_again(tmp_path):
    toy.build_alone(tmp_path)
    before = toy.content(tmp_path)
    (tmp_path / "manifest.json").unlink()
    path = tmp_path / "shard-00002.h5"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    toy.build_alone(tmp_path)
    assert toy.content(tmp_path) == before


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import toy_build as toy
toy.build_alone(Path(sys.argv[2]), rows=toy.Rows(sleep_s=0.2), processes=2)
"""


def test_kill_and_repeat(tmp_path):
    target, calls = tmp_path / "killed", tmp_path / "calls"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(SUPPORT), str(target)])
    try:
        stop = time.monotonic() + 60
        while len(list(target.glob("*.part.json"))) < 2:
            assert process.poll() is None, "it ended too early"
            assert time.monotonic() < stop, "it does not begin"
            time.sleep(0.02)
        workers = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert workers
    assert not psutil.wait_procs(workers, timeout=60)[1], "workers outlive their parent"
    (target / ".tmp-shard-00005.h5-1-0123abcd").write_bytes(b"half")
    noted = [path.name.removesuffix(".part.json") for path in target.glob("*.part.json")]
    kept = {name: (target / name).stat().st_mtime_ns for name in noted}
    assert not (target / "manifest.json").exists()
    reference = toy.build_alone(tmp_path / "whole")
    assert toy.build_alone(target, rows=toy.Rows(calls=str(calls))) == reference
    assert toy.content(target) == toy.content(tmp_path / "whole")
    assert all((target / name).stat().st_mtime_ns == time_ns for name, time_ns in kept.items())
    made = {f"shard-{first // 17:05d}.h5" for first in called(calls)}
    assert made == {shard.file for shard in reference.shards} - set(kept)


def test_two_builds_at_once_in_one_folder(tmp_path):
    inside, go = threading.Event(), threading.Event()

    def rows(ids):
        inside.set()
        assert go.wait(30)
        return toy.make_rows(ids)

    outcomes = []

    def run():
        outcomes.append(build(tmp_path, toy.make_plan(), rows, Alone(), 1, lambda n: None))

    first = threading.Thread(target=run)
    first.start()
    try:
        assert inside.wait(30)
        for error in toy.build_on_ranks(tmp_path, 2):
            assert isinstance(error, RunError)
            assert "another build of a data set is running here" in str(error)
    finally:
        go.set()
        first.join(60)
    assert outcomes == [toy.build_alone(tmp_path)]
    assert not (tmp_path / ".dmi-lock").exists()


def test_a_corrupt_shard_is_mended_as_its_message_says(tmp_path):
    toy.build_alone(tmp_path)
    before = toy.content(tmp_path)
    path = tmp_path / "shard-00001.h5"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptShardError, match="delete the shard and repeat the command"):
        ShardSet.open(tmp_path)
    path.unlink()
    toy.build_alone(tmp_path)
    assert toy.content(tmp_path) == before
