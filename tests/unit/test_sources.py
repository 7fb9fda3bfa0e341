"""Sources under failure, forks, replaced and closed sets, and bounds of what they cost."""

import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from shard_sets import make_set, numbers, pick

from dmi_hpc.data import ShardSet, sources
from dmi_hpc.data.blockreader import BlockReader
from dmi_hpc.data.blocks import ArrayBlocks
from dmi_hpc.data.sources import BlockSource, RamSource
from dmi_hpc.errors import CorruptShardError, DataError

ALL = np.arange(30)


@pytest.fixture
def toy(tmp_path):
    make_set(tmp_path / "data", 30)
    return tmp_path / "data"


@pytest.fixture
def image(toy):
    """Blocks of the field "image": 12, of four rows and less."""
    with ShardSet.open(toy) as shards:
        yield ArrayBlocks(toy, shards.manifest, shards.manifest.field("image"))


def wait_until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.005)


@pytest.mark.parametrize("backend", ["mmap", "pread", "ram", "h5py"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_set_replaced_while_open_is_never_mixed_with_the_old_one(toy, backend, times):
    with ShardSet.open(toy, backend=backend) as shards:
        shards.gather("n", ALL[:1])
        for atoms in [(1,), (2,)][:times]:  # names of files alternate
            make_set(toy, 30, atoms=atoms)
        with pytest.raises(DataError) as failed:
            shards.gather("x", ALL)
        if times == 2:
            assert isinstance(failed.value, CorruptShardError)
            assert "replaced since the set was opened: open it again" in str(failed.value)


@pytest.mark.parametrize(
    ("backend", "codec"), [("pread", None), ("pread", "zstd"), ("ram", "zstd")]
)
def test_the_child_of_a_fork_waits_for_no_thread_of_its_parent(
    tmp_path, monkeypatch, backend, codec
):
    made = make_set(tmp_path / "data", 30, codec=codec)["image"]
    started, go, usual = threading.Event(), threading.Event(), BlockReader.__call__

    def slow(self, block, out):
        started.set()
        assert go.wait(30)
        usual(self, block, out)

    with ShardSet.open(tmp_path / "data", backend=backend) as shards:
        expected = pick(made, numbers(shards))
        monkeypatch.setattr(BlockReader, "__call__", slow)
        thread = threading.Thread(target=shards.gather, args=("image", ALL))
        thread.start()
        assert started.wait(20)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                BlockReader.__call__ = usual
                code = int(shards.gather("image", ALL).tobytes() != expected.tobytes())
                shards.close()
            finally:
                os._exit(code)
        ended = []
        try:
            wait_until(lambda: ended.append(os.waitpid(child, os.WNOHANG)) or ended[-1][0])
        finally:
            go.set()
            thread.join(30)
            if not ended[-1][0]:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        assert ended[-1] == (child, 0)
        assert shards.gather("image", ALL).tobytes() == expected.tobytes()


def test_a_failing_disk_is_named_and_not_called_corruption(toy, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    with ShardSet.open(toy, backend="pread") as shards:
        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(DataError, match=r"0\.h5: field 'image', block 0 .*Input/output") as bad:
            shards.gather("image", ALL[:1])
    assert not isinstance(bad.value, CorruptShardError)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (DataError("no disk"), DataError, "no disk"),
        (CorruptShardError("bad"), CorruptShardError, "bad"),
        (
            MemoryError("full"),
            DataError,
            r"block 0 .*another thread failed to read it: MemoryError",
        ),
    ],
)
def test_threads_that_wait_for_a_block_get_the_error_of_its_reader(image, error, kind, text):
    def fetch(block, out):
        wait_until(lambda: source._pins[0] == 2)
        raise error

    source = BlockSource(image, fetch, slots=4)
    with ThreadPoolExecutor(2) as pool:
        out = np.empty((2, 1, 7, 11, 13), dtype=np.uint8)
        both = [pool.submit(source.take, ALL[:1], out[k]) for k in range(2)]
        errors = [done.exception(30) for done in both]
    other = next(e for e in errors if e is not error)
    assert any(e is error for e in errors)
    assert type(other) is kind
    with pytest.raises(kind, match=text):
        raise other


def test_a_large_gather_sorts_its_rows_once(image, monkeypatch):
    """Not once for each part that fits the arena."""
    searched, usual = [], np.searchsorted
    source = BlockSource(image, lambda block, out: out.fill(block), slots=2)
    monkeypatch.setattr(
        np,
        "searchsorted",
        lambda a, *rest, **named: (searched.append(len(a)), usual(a, *rest, **named))[1],
    )
    rows = np.tile(ALL, 50)[::-1]
    out = np.empty((len(rows), 7, 11, 13), dtype=np.uint8)
    source.take(rows, out)
    np.testing.assert_array_equal(out[:, 0, 0, 0], image.of(rows))
    assert sum(length >= len(rows) for length in searched) == 1


def test_a_ragged_gather_does_nothing_for_each_shard(toy):
    with ShardSet.open(toy, backend="mmap") as shards:
        first = shards.gather("z", ALL)
        shards._numbered(shards.manifest.field("z")).stored = None  # the list of shards
        assert shards.gather("z", ALL).values.tobytes() == first.values.tobytes()


def test_memory_is_filled_by_several_threads(image, monkeypatch):
    monkeypatch.setattr(sources, "_STEP_BYTES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    together = threading.Barrier(2)

    def read(start, stop, out):
        if start < 8:  # the first two steps
            together.wait(20)
        out[...] = start

    out = np.empty((30, 7, 11, 13), dtype=np.uint8)
    RamSource(image, read).take(ALL, out)
    firsts = [image.span(int(block))[0] for block in image.of(ALL)]
    np.testing.assert_array_equal(out[:, 3, 3, 3], firsts)


def test_a_set_larger_than_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    make_set(tmp_path / "data", 30, codec="zstd")
    monkeypatch.setattr(sources, "free_memory", lambda: 30 * 1001 - 1)
    with ShardSet.open(tmp_path / "data", backend="ram") as shards:
        shards.gather("x", ALL)
        with pytest.raises(DataError, match=r"'image' is 30 kB in memory.* Use backend pread"):
            shards.gather("image", ALL)


@pytest.mark.parametrize("verify", ["read", "none"])
def test_pickled_sets_are_opened_by_their_path(toy, monkeypatch, verify):
    monkeypatch.chdir(toy.parent)
    with ShardSet.open("data", backend="pread", verify=verify, arena_bytes=1) as shards:
        packed = pickle.dumps(shards)
        monkeypatch.chdir("/")
        with pickle.loads(packed) as again:
            assert again.access == shards.access
            assert again.gather("x", ALL).tobytes() == shards.gather("x", ALL).tobytes()
    make_set(toy, 30, atoms=(5,))
    with pytest.raises(DataError, match=r"expected data set .*, found .*replaced since"):
        pickle.loads(packed)


def test_a_file_is_not_closed_under_the_thread_that_reads_it(toy, monkeypatch):
    """Else its number may be another file's, and the bytes too."""
    reading, go, usual = threading.Event(), threading.Event(), os.preadv

    def slow(*arguments):
        reading.set()
        assert go.wait(30)
        return usual(*arguments)

    shards = ShardSet.open(toy, backend="pread")
    expected = shards.gather("x", ALL[:1])
    with ShardSet.open(toy, backend="pread") as closed, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(os, "preadv", slow)
        found = pool.submit(closed.gather, "x", ALL[:1])
        assert reading.wait(20)
        closed.close()
        with (toy / "manifest.json").open("rb"):
            go.set()
            np.testing.assert_array_equal(found.result(30), expected)
        with pytest.raises(DataError, match="the shard set is closed"):
            closed.gather("x", ALL[:1])
    shards.close()
    links = [link.resolve() for link in Path("/proc/self/fd").iterdir()]
    assert not [link for link in links if link.is_relative_to(toy)]


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_the_oracle_checks_blocks_when_asked_to(tmp_path, codec):
    folder = tmp_path / "data"
    make_set(folder, 30, codec=codec)
    with ShardSet.open(folder) as shards:
        blocks = ArrayBlocks(folder, shards.manifest, shards.manifest.field("image"))
        offset = int(blocks.table(1)[0, 0])
    with blocks.path(1).open("r+b") as file:
        file.seek(offset + 3)  # of a compressed block: in its header
        byte = file.read(1)
        file.seek(offset + 3)
        file.write(bytes([byte[0] ^ 1]))
    with ShardSet.open(folder, verify="read", backend="h5py") as shards:
        shards.gather("image", ALL[:10])
        with pytest.raises(CorruptShardError, match=r"1\.h5: field 'image', block 0 .*xxh3"):
            shards.gather("image", ALL[10:11])
