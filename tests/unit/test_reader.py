"""Every way of reading returns the bytes that were written."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_sets import NAMES, assert_same, content, make_set, numbers, pick

from dmi_hpc.data import ShardSet
from dmi_hpc.data.blocks import ArrayBlocks
from dmi_hpc.data.sources import BlockSource
from dmi_hpc.errors import CorruptShardError, DataError

BACKENDS = ("mmap", "pread", "direct", "ram", "h5py")
TINY = (1, 9000, 40000)  # arenas of one, two and nine blocks


def opened(folder, backend, **options):
    """The set, or a skipped test where the file system has no O_DIRECT."""
    shards = ShardSet.open(folder, backend=backend, **options)
    if backend == "direct":
        try:
            shards.gather("n", np.array([0]))
        except DataError as error:
            pytest.skip(str(error))
    return shards


def ways(codec):
    """(backend, verify, arena) that a set of this codec is read with."""
    for backend in BACKENDS:
        if codec and backend == "mmap":
            continue
        for verify in ("read", "none"):
            for arena in TINY if backend in ("pread", "direct") else (2**20,):
                yield backend, {"verify": verify, "arena_bytes": arena}


@given(
    rows=st.integers(1, 45),
    rows_per_shard=st.sampled_from([1, 2, 7, 45]),
    atoms=st.sampled_from([(0,), (0, 0, 5), (1,), (90, 0, 3), (0, 3, 1, 0, 40, 2)]),
    codec=st.sampled_from([None, "zstd", "blosc2"]),
    data=st.data(),
)
@settings(deadline=None, max_examples=10)
def test_every_backend_gives_what_was_written(
    tmp_path_factory, rows, rows_per_shard, atoms, codec, data
):
    folder = tmp_path_factory.mktemp("set") / "data"
    made = make_set(folder, rows, rows_per_shard, codec, atoms=atoms)
    asked = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=60)), dtype=np.int64)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, rows)] * 2)))
    with ShardSet.open(folder) as shards:
        n = numbers(shards)
    assert sorted(n) == list(range(rows))
    for backend, options in ways(codec):
        with opened(folder, backend, **options) as shards:
            together = shards.fields(NAMES, asked)
            for name in NAMES:
                expected = pick(made[name], n[asked])
                assert_same(shards.gather(name, asked), expected)
                assert_same(together[name], expected)
                if shards.manifest.field(name).axis is None:
                    assert_same(shards.read(name, start, stop), pick(made[name], n[start:stop]))
                    out = np.empty_like(expected)
                    assert shards.gather(name, asked, out) is out
                    assert_same(out, expected)
            lengths = made["z"].lengths[n]
            np.testing.assert_array_equal(np.diff(shards.offsets("node")), lengths)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(folder, content by row of the set) of 200 rows in shards of 23."""
    folder = tmp_path_factory.mktemp("toy") / "data"
    made = make_set(folder, 200, 23)
    with ShardSet.open(folder) as shards:
        n = numbers(shards)
    return folder, {name: pick(values, n) for name, values in made.items()}


@pytest.fixture(scope="module", params=[None, "zstd", "blosc2"])
def coded(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("coded") / "data"
    made = make_set(folder, 120, 23, request.param)
    with ShardSet.open(folder) as shards:
        n = numbers(shards)
    return folder, {name: pick(values, n) for name, values in made.items()}, request.param


def test_several_threads_share_one_set(coded):
    folder, made, codec = coded
    for backend, options in ways(codec):
        if options["verify"] == "none":
            continue
        with opened(folder, backend, **options) as shards, ThreadPoolExecutor(6) as pool:
            start = threading.Barrier(6)

            def work(seed, shards=shards, start=start):
                rng = np.random.default_rng(seed)
                start.wait(30)
                names = ("image", "z", "edge")
                for _ in range(3):
                    rows = rng.integers(0, 120, 9)
                    for name, values in shards.fields(names, rows).items():
                        assert_same(values, pick(made[name], rows))
                        if seed % 2:
                            shards.prefetch((name,), rows)

            for done in [pool.submit(work, seed) for seed in range(6)]:
                done.result(60)


def test_a_block_that_fails_never_gives_another_ones_bytes(toy):
    """Threads that wait for a block whose reader fails must not take what its slot holds next."""
    folder, made = toy
    with ShardSet.open(folder, verify="none", backend="mmap") as shards:
        blocks = ArrayBlocks(folder, shards.manifest, shards.manifest.field("image"))
        lock, rng = threading.Lock(), np.random.default_rng(0)

        def fetch(block, out):
            with lock:
                bad = rng.random() < 0.3
            out[:] = 0xEE  # a slot holds rubbish while it is being read
            if bad:
                raise blocks.corrupt(block, "in the test")
            start, stop = blocks.span(block)
            out[:] = shards.read("image", start, stop).reshape(-1)

        source = BlockSource(blocks, fetch, slots=3)
        failed = []

        def work(seed):
            rng = np.random.default_rng(seed)
            for _ in range(400):
                rows = rng.integers(0, 30, 3)
                out = np.empty((3, 7, 11, 13), dtype=np.uint8)
                try:
                    source.take(rows, out)
                except CorruptShardError:
                    failed.append(seed)
                else:
                    np.testing.assert_array_equal(out, made["image"][rows])

        with ThreadPoolExecutor(6) as pool:
            for done in [pool.submit(work, seed) for seed in range(6)]:
                done.result(60)
        assert len(set(failed)) == 6


def test_splits_are_ranges_of_rows(toy):
    folder, _ = toy
    with ShardSet.open(folder) as shards:
        everything = np.asarray(shards.rows("all"))
        np.testing.assert_array_equal(everything, np.arange(200))
        split = shards.gather("split", everything)
        for number, name in enumerate(("train", "validation", "test")):
            rows = np.asarray(shards.rows(name))
            np.testing.assert_array_equal(rows, np.flatnonzero(split == number))
            assert len(rows) == shards.manifest.split_rows[name] > 0
        with pytest.raises(DataError, match="no split 'training'; expected all, train"):
            shards.rows("training")


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_questions_are_refused(toy, backend):
    folder, _ = toy
    with opened(folder, backend) as shards:
        with pytest.raises(DataError, match="no field 'y'; found n, x, image"):
            shards.gather("y", np.array([0]))
        for rows in ([-1], [200], [0, 10**12]):
            with pytest.raises(IndexError, match="of a set of 200"):
                shards.gather("x", np.array(rows))
        for rows in (np.ones(200, dtype=bool), np.array([1.0])):
            with pytest.raises(IndexError, match="expected an array of row numbers"):
                shards.gather("x", rows)
        with pytest.raises(ValueError, match="'z' is ragged"):
            shards.gather("z", np.array([0]), np.empty(1))
        with pytest.raises(ValueError, match="'z' is ragged: use gather"):
            shards.read("z", 0, 1)
        with pytest.raises(IndexError):
            shards.read("x", 5, 201)
        wide = np.empty((3, 6), "f4")
        for out in (wide[:2, :3].copy(), wide, wide[:, ::2], wide[:, :3].astype("f8")):
            with pytest.raises(ValueError, match=r"C-contiguous float32 \(3, 3\), found"):
                shards.gather("x", np.arange(3), out)
            with pytest.raises(ValueError, match=r"C-contiguous float32 \(3, 3\), found"):
                shards.read("x", 2, 5, out)


def open_files(folder):
    links = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
    return [link for link in links if link.is_relative_to(folder.resolve())]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_stays_open(toy, backend):
    folder, made = toy
    with opened(folder, backend) as shards:
        found = shards.fields(NAMES, np.arange(200))
    assert open_files(folder) == []
    for name, values in found.items():  # copies outlive the set
        assert_same(values, made[name])
    with pytest.raises(DataError, match="closed: open it again"):
        shards.gather("x", np.array([0]))


def test_a_compressed_set_is_not_mapped(tmp_path):
    make_set(tmp_path / "data", 5, codec="zstd")
    with pytest.raises(DataError, match=r"cannot be mapped: expected backend pread"):
        ShardSet.open(tmp_path / "data", backend="mmap")


def test_too_few_open_files_are_explained(toy, monkeypatch):
    folder, _ = toy

    def no_more(*_, **__):
        raise OSError(24, "Too many open files")

    with ShardSet.open(folder, backend="pread") as shards:
        monkeypatch.setattr(os, "open", no_more)
        with pytest.raises(DataError, match=r"ulimit -n.*backend mmap"):
            shards.gather("x", np.array([0]))


def test_a_file_system_without_direct_reads_is_explained(toy, monkeypatch):
    folder, _ = toy
    usual = os.open

    def strict(path, flags, *more, **named):
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return usual(path, flags, *more, **named)

    with ShardSet.open(folder, backend="direct") as shards:
        monkeypatch.setattr(os, "open", strict)
        with pytest.raises(DataError, match=r"no O_DIRECT\. Use backend pread"):
            shards.gather("x", np.array([0]))


def test_content_has_empty_rows():
    """What the tests above claim to cover."""
    lengths = content(12)["z"].lengths
    assert (lengths == 0).any()
    assert (lengths > 30).any()
