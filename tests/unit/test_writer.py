"""ShardWriter: appended in any pieces the set is the same; it appears whole or not at all."""

import errno
import json
import os
import shutil
import threading

import numpy as np
import pytest
import torch
import toy_build as toy
import toy_disk as disk
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.data.build import Alone, build
from dmi_hpc.data.manifest import Compression, read_manifest, split_of
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.writer import ShardWriter
from dmi_hpc.errors import DataError, FormatVersionError, RunError
from dmi_hpc.files import exclusive

CODECS = [None, "zstd", "blosc2"]


def check(folder, rows, seed=0):
    """The folder holds exactly this set."""
    with ShardSet.open(folder) as shards:
        found = toy.stored_rows(shards)
        names = {shard.file for shard in shards.manifest.shards}
    for name, made in toy.make_rows(range(rows), seed).items():
        assert toy.equal(found[name], made), name
    assert {path.name for path in folder.iterdir()} == names | {"manifest.json"}


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any),
    rows_per_shard=st.integers(1, 50),
    codec=st.sampled_from(CODECS),
)
@settings(deadline=None, max_examples=25)
def test_pieces_do_not_matter(tmp_path_factory, sizes, rows_per_shard, codec):
    folder = tmp_path_factory.mktemp("set")
    rows, plan = sum(sizes), toy.make_plan(None, rows_per_shard, codec)
    with ShardWriter(folder / "pieces", plan) as writer:
        ends = np.cumsum(sizes)
        for start, stop in zip(ends - sizes, ends, strict=True):
            made = toy.make_rows(range(start, stop)) if stop > start else empty_rows()
            writer.append(made)
    whole = toy.write_set(folder / "whole", rows, 0, rows_per_shard, codec)
    assert writer.manifest == whole
    assert whole.identity == writer.manifest.identity
    assert toy.content(folder / "pieces") == toy.content(folder / "whole")
    assert [s.rows for s in whole.shards[:-1]] == [rows_per_shard] * (len(whole.shards) - 1)
    check(folder / "pieces", rows)


def empty_rows():
    one = toy.make_rows([1])
    return {
        name: v.take(np.array([], int)) if isinstance(v, Ragged) else v[:0]
        for name, v in one.items()
    }


def test_built_and_appended_rows_are_the_same_data(tmp_path):
    built = toy.build_alone(tmp_path / "built")
    written = toy.write_set(tmp_path / "written", rows_per_shard=17)
    assert built.statistics == written.statistics
    assert built.split_rows == written.split_rows
    with ShardSet.open(tmp_path / "built") as a, ShardSet.open(tmp_path / "written") as b:
        for name in (*toy.NAMES, "split"):
            assert toy.equal(a.gather(name, a.rows("all")), b.gather(name, b.rows("all")))


def test_statistics_are_those_of_the_training_rows(tmp_path):
    manifest = toy.write_set(tmp_path)
    with ShardSet.open(tmp_path) as shards:
        train = shards.rows("train")
        assert set(manifest.statistics) == {"x", "n", "volume", "z", "edge"}
        for name, found in manifest.statistics.items():
            rows = shards.gather(name, train)
            values = (rows.values if isinstance(rows, Ragged) else rows).astype(np.float64)
            assert (found.min, found.max, found.count) == (values.min(), values.max(), values.size)
            assert found.mean == pytest.approx(values.mean(), rel=1e-13)
            assert found.std == pytest.approx(values.std(), rel=1e-12)
            counts, _ = np.histogram(values, found.histogram.edges)
            assert counts.tolist() == list(found.histogram.counts)


def test_the_caller_may_use_its_arrays_again(tmp_path):
    plan, rows = toy.make_plan(None, 10_000), toy.make_rows(range(20))
    with ShardWriter(tmp_path, plan) as writer:
        writer.append(rows)
        for values in rows.values():
            array = values.values if isinstance(values, Ragged) else values
            array[...] = 0
    check(tmp_path, 20)


def test_splits_are_of_row_numbers_or_of_the_caller(tmp_path):
    manifest = toy.write_set(tmp_path, calls=3)
    rule = manifest.plan.split_rule
    with ShardSet.open(tmp_path) as shards:
        for code, name in enumerate(("train", "validation", "test")):
            numbers = shards.gather("n", shards.rows(name))
            assert sorted(numbers.tolist()) == [
                i for i in range(100) if split_of(rule.seed, str(i), 0.2, 0.1) == code
            ]
    with ShardWriter(tmp_path / "mine", toy.make_plan(None)) as writer:
        mine = np.arange(9, dtype=np.uint8) % 3
        writer.append({**toy.make_rows(range(9)), "split": mine})
    assert writer.manifest.split_rows == {"train": 3, "validation": 3, "test": 3}


@pytest.mark.parametrize(("values", "std"), [([-1e300, 1e300], 1e300), ([7.5, 7.5], 0.0)])
def test_the_largest_and_the_most_constant_values_are_stored(tmp_path, values, std):
    field = toy.FIELDS[0].model_copy(update={"dtype": "float64", "shape": (), "name": "y"})
    plan = toy.make_plan(None, 1, fields=(field,))
    with ShardWriter(tmp_path, plan) as writer:
        for value in values:
            writer.append({"y": np.array([value]), "split": np.zeros(1, np.uint8)})
    assert read_manifest(tmp_path).statistics["y"].std == std


@pytest.mark.parametrize("codec", CODECS)
def test_a_new_set_replaces_the_old_one_when_it_is_whole(tmp_path, codec):
    toy.write_set(tmp_path, rows=100, seed=1)
    before = toy.content(tmp_path)
    with ShardWriter(tmp_path, toy.make_plan(None, 30, codec, seed=2)) as writer:
        writer.append(toy.make_rows(range(95), 2))
        now = toy.content(tmp_path)
        assert {name: now[name] for name in before} == before
        with ShardSet.open(tmp_path) as shards:
            assert shards.manifest.plan.seed == 1
    check(tmp_path, 95, 2)
    toy.write_set(tmp_path, rows=10, seed=3)
    check(tmp_path, 10, 3)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_set_or_nothing(tmp_path, old, error):
    if old:
        toy.write_set(tmp_path)
    before = toy.content(tmp_path)
    with pytest.raises(error), ShardWriter(tmp_path, toy.make_plan(None, 10, seed=1)) as writer:
        writer.append(toy.make_rows(range(35), 1))
        raise error
    assert writer.manifest is None
    assert toy.content(tmp_path) == before


def test_wrong_rows_leave_the_old_set(tmp_path):
    toy.write_set(tmp_path)
    before = toy.content(tmp_path)
    wrong = toy.make_rows(range(20)) | {"split": np.zeros(20, np.uint8)}
    wrong["x"] = wrong["x"][:-1]
    refused = pytest.raises(DataError, match="rows from 20: field 'x': 19 rows, expected 20")
    with refused, ShardWriter(tmp_path, toy.make_plan(None, 10)) as writer:
        writer.append(toy.make_rows(range(20)))
        writer.append(wrong)
    assert toy.content(tmp_path) == before


def test_no_rows_are_an_error(tmp_path):
    refused = pytest.raises(DataError, match="no rows were appended")
    with refused, ShardWriter(tmp_path / "set", toy.make_plan(None)):
        pass
    assert list((tmp_path / "set").iterdir()) == []


def test_a_plan_of_so_many_rows_is_to_be_built(tmp_path):
    with pytest.raises(DataError, match="no fixed number of rows"):
        ShardWriter(tmp_path, toy.make_plan(5))


def test_an_interrupt_just_behind_the_commit_keeps_the_new_set(tmp_path, monkeypatch):
    """The manifest is on disk; the writer must not take its shards away."""
    from dmi_hpc.data import writer as module

    toy.write_set(tmp_path, seed=1)
    real = module.write_manifest

    def interrupted(folder, manifest):
        real(folder, manifest)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toy.write_set(tmp_path, seed=2)
    check(tmp_path, 100, 2)


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    with ShardWriter(tmp_path, toy.make_plan(None, 10, seed=1)) as first:
        first.append(toy.make_rows(range(15), 1))
        with pytest.raises(RunError, match="another build of a data set is running here"):
            toy.write_set(tmp_path, seed=2)
        with pytest.raises(RunError, match="another build of a data set"):
            toy.build_alone(tmp_path)
        first.append(toy.make_rows(range(15, 30), 1))
    check(tmp_path, 30, 1)


def test_two_writers_at_once_one_set(tmp_path):
    """Started together many times, each time one wins, and the set is the winner's."""
    meet = threading.Barrier(2, timeout=30)
    for k in range(10):
        outcomes = [None, None]

        def write(i, outcomes=outcomes, k=k):
            meet.wait()
            try:
                toy.write_set(tmp_path, rows=30, seed=2 * k + i, rows_per_shard=10)
            except RunError as error:
                outcomes[i] = error

        threads = [threading.Thread(target=write, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        won = [i for i in range(2) if outcomes[i] is None]
        assert won
        found = read_manifest(tmp_path).plan.seed
        assert found in [2 * k + i for i in won]
        check(tmp_path, 30, found)


def test_a_failed_start_leaves_no_lock(tmp_path):
    toy.write_set(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 1}))
    for _ in range(2):
        with pytest.raises(FormatVersionError, match="in a new folder"):
            toy.write_set(tmp_path)
    with exclusive(tmp_path, "test"):
        pass
    assert not (tmp_path / ".dmi-lock").exists()


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path):
    toy.write_set(tmp_path, seed=1)
    for name in ("shard-00009.h5", "shard3-00012.h5"):
        shutil.copy(tmp_path / "shard-00000.h5", tmp_path / name)
    (tmp_path / ".tmp-shard-00001.h5-1-0123abcd").write_text("content")
    mine = ["notes.txt", "master.h5", "my-shard-00001.h5", "shard-1.h5", "lock", ".tmp-mine"]
    mine += ["shard-00008.h5", "shard1-00000.h5"]  # named as ours, but not written by us
    for name in mine:
        (tmp_path / name).write_text("content")
    toy.write_set(tmp_path, seed=2)
    names = {shard.file for shard in read_manifest(tmp_path).shards}
    assert {path.name for path in tmp_path.iterdir()} == names | {"manifest.json", *mine}
    assert {(tmp_path / name).read_text() for name in mine} == {"content"}


def full_once(monkeypatch, shard):
    """The disk is full when this shard is written, and has room again later."""
    from dmi_hpc.data import writer as module

    real, calls = module.make_part, []

    def make_part(*arguments):
        calls.append(1)
        if len(calls) == shard + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(module, "make_part", make_part)


def test_a_failed_append_is_not_forgotten(tmp_path, monkeypatch):
    full_once(monkeypatch, 1)
    with (
        pytest.raises(DataError, match="rows are lost since an append failed"),
        ShardWriter(tmp_path, toy.make_plan(None, 10)) as writer,
    ):
        with pytest.raises(DataError, match="no space left"):
            writer.append(toy.make_rows(range(35)))
        with pytest.raises(DataError, match="rows are lost"):
            writer.append(toy.make_rows(range(35)))
    assert list(tmp_path.iterdir()) == []


def test_refused_rows_may_be_mended_and_appended_again(tmp_path):
    with ShardWriter(tmp_path, toy.make_plan(None, 10)) as writer:
        with pytest.raises(DataError, match="expected dense rows"):
            writer.append(toy.make_rows(range(35)) | {"x": [1]})
        writer.append(toy.make_rows(range(35)))
    check(tmp_path, 35)


def test_a_writer_is_used_in_its_block_and_once(tmp_path):
    writer, rows = ShardWriter(tmp_path, toy.make_plan(None, 10)), toy.make_rows(range(35))
    with pytest.raises(DataError, match=r"appended in the block of `with ShardWriter"):
        writer.append(rows)
    with writer:
        writer.append(rows)
    with pytest.raises(DataError, match="block of this writer has ended"):
        writer.append(rows)
    with pytest.raises(DataError, match="a writer writes one set"), writer:
        pass
    check(tmp_path, 35)


@pytest.mark.parametrize(
    "value", [3.0, [1.0], None, np.float32(1), torch.ones(2, 3), np.array(1.0)], ids=str
)
def test_rows_that_are_no_array_are_named(tmp_path, value):
    plan = toy.make_plan(None, fields=(toy.FIELDS[0],))
    name = plan.fields[0].name
    found = f"field '{name}': expected dense rows, a NumPy array .*; found {type(value).__name__}"
    with pytest.raises(DataError, match=found), ShardWriter(tmp_path, plan) as writer:
        writer.append({name: value})


def test_an_unfinished_build_survives_a_failed_writer_only(tmp_path):
    with pytest.raises(DataError, match="row 40"):
        toy.build_alone(tmp_path, rows=toy.Rows(fail_at=40))
    plan, noted = toy.make_plan(None), set(toy.content(tmp_path))
    assert "shard-00001.h5.part.json" in noted
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, plan):
        raise ZeroDivisionError
    assert set(toy.content(tmp_path)) == noted
    toy.build_alone(tmp_path / "other")
    toy.write_set(tmp_path, seed=4)
    shutil.rmtree(tmp_path / "other")
    check(tmp_path, 100, 4)


def total_bytes(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("old", [True, False])
def test_a_disk_full_at_any_byte_leaves_the_old_set_or_nothing(tmp_path, old):
    toy.write_set(tmp_path / "whole", seed=1)
    whole, manifest = total_bytes(tmp_path / "whole"), tmp_path / "whole" / "manifest.json"
    target = tmp_path / "set"
    target.mkdir()
    if old:
        toy.write_set(target)
    before = toy.content(target)
    last = whole - manifest.stat().st_size
    sizes = [0, 1, 5000, whole // 3, whole // 2, last - 1, last, last + 1, whole - 1]
    for size in sizes:
        with disk.room(size), pytest.raises(DataError, match=r"set: no space left.*MB are free"):
            toy.write_set(target, seed=1)
        assert toy.content(target) == before, size
    with disk.room(whole + 100):  # names of files are a digit longer
        toy.write_set(target, seed=1)
    check(target, 100, 1)


@pytest.mark.parametrize("size", [8 << 10, 100 << 10, 300 << 10])
def test_a_small_disk_says_so_and_keeps_the_old_set(tmp_path, size):
    with disk.small_disk(tmp_path / "disk", size + (300 << 10)) as folder:
        toy.write_set(folder, rows=5)
        before = toy.content(folder)
        with pytest.raises(DataError, match=r"disk: no space left.*Make room and repeat"):
            toy.write_set(folder, rows=3000, seed=1, rows_per_shard=100)
        assert toy.content(folder) == before
        check(folder, 5)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    toy.write_set(tmp_path / "set")
    before = toy.content(tmp_path / "set")
    with disk.read_only(tmp_path / "set"):
        with pytest.raises(RunError, match=r"cannot write: .*set/\.dmi-lock"):
            toy.write_set(tmp_path / "set", seed=1)
        with pytest.raises(RunError, match="cannot write"):
            toy.write_set(tmp_path / "set" / "inner", seed=1)
        check(tmp_path / "set", 100)
    assert toy.content(tmp_path / "set") == before


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "set").write_text("mine")
    with pytest.raises(RunError, match=r"cannot write: .*set"):
        toy.write_set(tmp_path / "set")
    assert (tmp_path / "set").read_text() == "mine"


def test_an_open_reader_keeps_the_old_rows(tmp_path):
    toy.write_set(tmp_path, seed=1)
    with ShardSet.open(tmp_path, backend="mmap") as shards:
        x = shards.gather("x", np.arange(100))
        toy.write_set(tmp_path, seed=2)
        assert np.array_equal(shards.gather("x", np.arange(100)), x)
        with pytest.raises(DataError, match=r"shard-0000\d\.h5: .*No such file"):
            shards.gather("volume", np.arange(100))


def test_identity_is_that_of_content(tmp_path):
    first = toy.write_set(tmp_path / "a")
    again = toy.write_set(tmp_path / "b", calls=5)
    assert first.identity == again.identity
    assert toy.write_set(tmp_path / "c", seed=1).identity != first.identity
    assert toy.write_set(tmp_path / "d", rows=99).identity != first.identity
    zstd = toy.write_set(tmp_path / "e", codec="zstd")
    assert zstd.identity != first.identity
    assert zstd.statistics == first.statistics
    assert zstd.plan.compression == Compression(codec="zstd", level=3)


def test_build_and_writer_share_one_lock(tmp_path):
    inside, go = threading.Event(), threading.Event()

    def rows(ids):
        inside.set()
        assert go.wait(30)
        return toy.make_rows(ids)

    outcome = []

    def run():
        outcome.append(build(tmp_path, toy.make_plan(), rows, Alone(), 1, lambda n: None))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert inside.wait(30)
        with pytest.raises(RunError, match="another build of a data set"):
            toy.write_set(tmp_path)
        with pytest.raises(RunError, match="another build of a data set"):
            toy.build_alone(tmp_path)
    finally:
        go.set()
        thread.join(60)
    assert outcome[0].rows == 100
    check(tmp_path, 100)
