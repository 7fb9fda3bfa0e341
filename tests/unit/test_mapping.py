"""Files side by side in one range of addresses."""

import gc
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.data.mapping import Piece, map_pieces
from dmi_hpc.errors import CorruptShardError, DataError

PAGE = 4096


def make_pieces(folder, lengths, dtype, shape, offsets):
    """(pieces, what they hold)."""
    pieces, contents = [], []
    rng = np.random.default_rng(0)
    for k, (length, offset) in enumerate(zip(lengths, offsets, strict=True)):
        size = length * dtype.itemsize * math.prod(shape)
        data = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        path = folder / f"{k}"
        path.write_bytes(b"\xff" * offset + data + b"\xff" * 3)
        pieces.append(Piece(path, offset, length))
        contents.append(np.frombuffer(data, dtype=dtype).reshape(-1, *shape))
    return pieces, contents


def mapped(folder):
    """Lines of this process's maps of files in a folder."""
    gc.collect()
    return [s for s in Path("/proc/self/maps").read_text().splitlines() if str(folder) in s]


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    shape=st.sampled_from([(), (1,), (3,), (5, 7), (4096,), (4095,), (1000, 9)]),
    dtype=st.sampled_from(["u1", "<i2", "<f4", "<f8", "S3", "S131"]),
    pages=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    seed=st.integers(0, 100),
)
@settings(deadline=None, max_examples=60)
def test_gather_is_indexing(tmp_path_factory, lengths, shape, dtype, pages, seed):
    folder, kind = tmp_path_factory.mktemp("pieces"), np.dtype(dtype)
    offsets = [PAGE * page for page in pages[: len(lengths)]]
    pieces, contents = make_pieces(folder, lengths, kind, shape, offsets)
    whole, first = map_pieces(pieces, kind, shape)
    expected = np.concatenate(contents)
    places = np.concatenate(
        [np.arange(f, f + n, dtype=np.int64) for f, n in zip(first, lengths, strict=True)]
    )
    order = np.random.default_rng(seed).permutation(len(expected))
    assert whole.take(places[order], axis=0).tobytes() == expected[order].tobytes()
    assert whole.dtype == kind
    assert whole.shape[1:] == shape
    assert not whole.flags.writeable
    del whole
    assert not mapped(folder)


def test_rows_of_51_cubed_voxels(tmp_path):
    """132651 is odd: each piece starts at a multiple of both the page and the row."""
    pieces, contents = make_pieces(tmp_path, [3, 5, 2], np.dtype("u1"), (51, 51, 51), [PAGE] * 3)
    whole, first = map_pieces(pieces, np.dtype("u1"), (51, 51, 51))
    for start, content in zip(first, contents, strict=True):
        assert np.array_equal(whole[start : start + len(content)], content)
    assert first == [0, 4096, 8192]  # 132651 pages on


def test_maps_live_as_long_as_the_last_view(tmp_path):
    pieces, contents = make_pieces(tmp_path, [4, 6], np.dtype("<f4"), (3,), [PAGE, 0])
    whole, first = map_pieces(pieces, np.dtype("<f4"), (3,))
    assert len(mapped(tmp_path)) == 2
    row = whole[first[1] + 5, 1:]
    del whole
    assert len(mapped(tmp_path)) == 2
    assert np.array_equal(row, contents[1][5, 1:], equal_nan=True)
    links = [str(p.readlink()) for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
    assert not [link for link in links if link.startswith(str(tmp_path))]
    del row
    assert not mapped(tmp_path)


def test_no_entries_are_no_map(tmp_path):
    pieces, _ = make_pieces(tmp_path, [0, 0], np.dtype("u1"), (2,), [0, 0])
    whole, first = map_pieces(pieces, np.dtype("u1"), (2,))
    assert whole.shape == (0, 2)
    assert first == [0, 0]


def test_a_missing_file_is_named_and_leaves_no_map(tmp_path):
    pieces, _ = make_pieces(tmp_path, [4, 4], np.dtype("u1"), (), [0, 0])
    pieces[1].path.unlink()
    with pytest.raises(DataError, match=r"/1: cannot be mapped.*No such file"):
        map_pieces(pieces, np.dtype("u1"), ())
    assert not mapped(tmp_path)


def test_a_file_cut_short_is_an_error_instead_of_a_dead_process(tmp_path):
    pieces, _ = make_pieces(tmp_path, [4, 3 * PAGE], np.dtype("u1"), (), [0, PAGE])
    os.truncate(pieces[1].path, 2 * PAGE)
    with pytest.raises(CorruptShardError, match=r"/1: found 8192 bytes, expected at least 16384"):
        map_pieces(pieces, np.dtype("u1"), ())
    assert not mapped(tmp_path)


@pytest.mark.parametrize("entry", [2**36 + 1, 2**50])
def test_more_addresses_than_there_are_is_an_error(tmp_path, entry):
    pieces = [Piece(tmp_path / "huge", 0, 16)]
    with pytest.raises(DataError, match=r"huge: .* TB of addresses.*Use backend pread"):
        map_pieces(pieces, np.dtype("u1"), (entry,))


AT_EXIT = """
import atexit, sys
atexit.register(lambda: print(int(kept.sum())))
from pathlib import Path
import numpy as np
from dmi_hpc.data.mapping import Piece, map_pieces
kept, _ = map_pieces([Piece(Path(sys.argv[1]), 0, 5000)], np.dtype("u1"), ())
"""


def test_exit_handlers_may_still_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"\x01" * 5000)
    command = [sys.executable, "-c", AT_EXIT, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "5000")
