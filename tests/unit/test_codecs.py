"""Codecs of chunks: what HDF5 itself reads and writes, and damaged or hostile bytes."""

import io
import struct
import subprocess
import sys
import threading
import tracemalloc

import blosc2
import h5py
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.data import codecs
from dmi_hpc.data.codecs import FILTERS, DamagedBlockError, decode, encode, load_codec, load_filters
from dmi_hpc.data.manifest import Compression
from dmi_hpc.errors import DataError

ZSTD = Compression(codec="zstd", level=3)
BLOSC2 = Compression(codec="blosc2", level=5)
BOTH = pytest.mark.parametrize("compression", [ZSTD, BLOSC2], ids=["zstd", "blosc2"])
GUARD = 4096


def guarded(compression, stored, size, itemsize):
    """What decode writes; fails if it writes anything beside it."""
    room = np.full(size + 2 * GUARD, 0xA5, np.uint8)
    try:
        decode(compression, stored, room[GUARD:-GUARD], itemsize)
    finally:
        assert (room[:GUARD] == 0xA5).all() and (room[-GUARD:] == 0xA5).all()
    return room[GUARD:-GUARD].tobytes()


def samples():
    rng = np.random.default_rng(0)
    smooth = np.cumsum(rng.normal(size=(40, 33, 17)), axis=1).astype("<f4")
    return {
        "field": smooth,
        "volume": (rng.random((3, 17, 19, 21)) > 0.5).astype("u1"),
        "zeros": np.zeros((512, 86), "<f4"),
        "constant": np.full(1000, 3.25, "<f8"),
        "one": np.ones(1, "<i2"),
        "names": np.array([b"Fe2O3", b"SiO2"] * 50, "S20"),
        "long": rng.integers(97, 101, (9, 300)).astype("u1").view("S300")[:, 0],
    }


def chunked(array, **how):
    file = h5py.File(io.BytesIO(), "w")
    load_filters()
    return file.create_dataset("x", array.shape, array.dtype, chunks=array.shape, **how)


def plan(compression):
    how = FILTERS[compression.codec]
    options = how.options(compression.level)
    return {"compression": how.number, "compression_opts": options, "shuffle": how.shuffle}


@BOTH
@pytest.mark.parametrize("name", samples())
def test_hdf5_reads_what_encode_writes(compression, name):
    array = samples()[name]
    stored = encode(compression, array.tobytes(), array.itemsize)
    data = chunked(array, **plan(compression))
    data.id.write_direct_chunk((0,) * array.ndim, stored)
    assert data[:].tobytes() == array.tobytes()


@BOTH
@pytest.mark.parametrize("name", samples())
def test_decode_reads_what_hdf5_writes(compression, name):
    array = samples()[name]
    data = chunked(array, **plan(compression))
    data[...] = array
    _, stored = data.id.read_direct_chunk((0,) * array.ndim)
    assert guarded(compression, stored, array.nbytes, array.itemsize) == array.tobytes()


@pytest.mark.parametrize("inner", [0, 1, 2, 4, 5])  # blosclz, lz4, lz4hc, zlib, zstd
@pytest.mark.parametrize("shuffle", [0, 1, 2])
def test_decode_reads_other_blosc2_chunks_of_hdf5(inner, shuffle):
    array = samples()["volume"]
    data = chunked(array, compression=32026, compression_opts=(0, 0, 0, 0, 3, shuffle, inner))
    data[...] = array
    _, stored = data.id.read_direct_chunk((0,) * array.ndim)
    assert guarded(BLOSC2, stored, array.nbytes, 1) == array.tobytes()


@settings(deadline=None, max_examples=60)
@given(
    codec=st.sampled_from(["zstd", "blosc2"]),
    level=st.integers(1, 9),
    itemsize=st.integers(1, 70) | st.just(300),
    count=st.integers(1, 200),
    unit=st.binary(min_size=1, max_size=40),
)
def test_round_trip_and_equal_bytes(codec, level, itemsize, count, unit):
    compression = Compression(codec=codec, level=level)
    size = itemsize * count
    block = (unit * size)[:size]
    stored = encode(compression, block, itemsize)
    assert stored == encode(compression, block, itemsize)
    for view in (stored, memoryview(stored), np.frombuffer(stored, np.uint8)):
        assert guarded(compression, view, size, itemsize) == block


def test_bytes_do_not_depend_on_threads_of_the_library(monkeypatch):
    block = samples()["field"].tobytes()
    before = encode(BLOSC2, block, 4)
    monkeypatch.setattr(blosc2, "nthreads", blosc2.nthreads + 3)
    assert encode(BLOSC2, block, 4) == before


@BOTH
def test_parallel_threads_decode_their_own_blocks(compression):
    rng = np.random.default_rng(1)
    blocks = [rng.integers(0, 9, 2**16).astype("<i4").tobytes() for _ in range(4)]
    stored = [encode(compression, block, 4) for block in blocks]
    wrong = []

    def work(k):
        out = np.empty(2**18, np.uint8)
        for _ in range(20):
            decode(compression, stored[k], out, 4)
            if out.tobytes() != blocks[k]:
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads) and not wrong


def test_blosc2_frees_the_interpreter_lock():
    load_codec("blosc2")
    assert blosc2.set_releasegil(True) is True  # the state before


def valid():
    """(compression, chunk, its array), also of HDF5's own making: b2nd frames."""
    found = []
    for name in ("volume", "zeros", "names", "constant"):
        array = samples()[name]
        for compression in (ZSTD, BLOSC2):
            found.append((compression, encode(compression, array.tobytes(), array.itemsize), array))
        data = chunked(array, **plan(BLOSC2))
        data[...] = array
        found.append((BLOSC2, data.id.read_direct_chunk((0,) * array.ndim)[1], array))
    return found


VALID = valid()


@settings(deadline=None, max_examples=400)
@given(
    which=st.sampled_from(VALID),
    edits=st.lists(
        st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), min_size=1, max_size=5
    ),
)
def test_damaged_chunks_are_refused_or_stay_inside(which, edits):
    compression, stored, array = which
    damaged = bytearray(stored)
    for at, new in edits:
        at %= len(stored)
        damaged[at : at + len(new)] = new[: len(stored) - at]
    if compression is BLOSC2:  # the frame's length, compared first, hides what is behind it
        damaged[16:24] = struct.pack(">Q", len(stored))
    try:
        guarded(compression, bytes(damaged), array.nbytes, array.itemsize)
    except DamagedBlockError as error:
        assert str(error)


@pytest.mark.parametrize("which", VALID, ids=[f"{c.codec}-{a.dtype}" for c, _, a in VALID])
def test_truncated_chunks_are_refused(which):
    compression, stored, array = which
    cuts = {*range(min(200, len(stored))), len(stored) // 2, len(stored) - 1}
    for cut in cuts:
        with pytest.raises(DamagedBlockError):
            guarded(compression, stored[:cut], array.nbytes, array.itemsize)
    with pytest.raises(DamagedBlockError):
        guarded(compression, stored + b"\0", array.nbytes, array.itemsize)


@BOTH
@settings(deadline=None, max_examples=100)
@given(stored=st.binary(max_size=300))
def test_random_bytes_are_refused(compression, stored):
    with pytest.raises(DamagedBlockError):
        guarded(compression, stored, 64, 4)


@BOTH
@pytest.mark.parametrize("wrong", [8, 800, 1600])
def test_chunk_of_another_size_is_refused(compression, wrong):
    stored = encode(compression, bytes(range(100)) * 12, 4)
    with pytest.raises(DamagedBlockError, match=f"1200 bytes, expected {wrong}"):
        guarded(compression, stored, wrong, 4)


def refused_within(compression, stored, size):
    """Refused, without more memory than a few chunks."""
    load_codec(compression.codec)
    out = np.empty(size, np.uint8)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedBlockError):
            decode(compression, stored, out, 4)
        assert tracemalloc.get_traced_memory()[1] < 10 * size + 2**16
    finally:
        tracemalloc.stop()


@BOTH
def test_bombs_are_refused_before_memory_is_taken(compression):
    refused_within(compression, encode(compression, bytes(2**26), 4), 4096)


def test_zstd_frame_with_a_lie_or_without_a_size_is_refused():
    huge = bytearray(zstandard.compress(bytes(2**26)))
    huge[6:10] = struct.pack("<I", 4096)  # behind magic, descriptor, window: the declared size
    assert zstandard.get_frame_parameters(bytes(huge)).content_size == 4096
    refused_within(ZSTD, bytes(huge), 4096)
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**26))
    refused_within(ZSTD, silent, 4096)


def at_chunk(frame, offset, new):
    """A Blosc2 frame with other bytes in the header of its chunk."""
    start = struct.unpack_from(">I", frame, 11)[0] + offset
    return frame[:start] + new + frame[start + len(new) :]


KIND = "of a kind"
SIZES = "in blocks of"
OTHER = "bytes, expected"


@pytest.mark.parametrize(
    ("offset", "new", "why"),
    [
        (2, b"\xd5", KIND),  # a codec of the user
        (2, b"\x30", KIND),  # the short header, which has no room for the filters
        (3, b"\x00", SIZES),  # elements of no bytes: a division by zero
        (4, struct.pack("<i", 2**30), OTHER),  # it would be written past the end
        (4, struct.pack("<i", -1), OTHER),
        (8, struct.pack("<i", 0), SIZES),
        (8, struct.pack("<i", 2**30), SIZES),
        (12, struct.pack("<i", 2**30), SIZES),
        (12, struct.pack("<i", 64), SIZES),
        (21, b"\x20", KIND),  # a filter of the user
        (30, b"\x01", KIND),
        (31, b"\x08", KIND),  # a lazy chunk: bytes would be looked for in a file
        (31, b"\x40", KIND),  # not initialised
    ],
)
def test_hostile_blosc2_chunk_headers_are_refused(offset, new, why):
    block = samples()["field"].tobytes()
    with pytest.raises(DamagedBlockError, match=why):
        guarded(BLOSC2, at_chunk(encode(BLOSC2, block, 4), offset, new), len(block), 4)


def test_blosc2_frame_that_only_says_not_initialised_is_refused():
    zeros = encode(BLOSC2, bytes(4096), 4)
    assert guarded(BLOSC2, zeros, 4096, 4) == bytes(4096)
    with pytest.raises(DamagedBlockError, match="without a chunk"):
        guarded(BLOSC2, at_chunk(zeros, 32 + 7, b"\x84"), 4096, 4)


def b2nd(array, blocks):
    cparams = {"nthreads": 1, "filters": [blosc2.Filter.BITSHUFFLE], "filters_meta": [0]}
    return blosc2.asarray(array, chunks=array.shape, blocks=blocks, cparams=cparams).to_cframe()


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
    .filter(lambda sizes: 0 < len(sizes) <= 4)
    .map(lambda sizes: tuple(zip(*sizes, strict=True)))
)
def test_b2nd_blocks_find_their_places_or_are_refused_for_their_padding(sizes):
    shape, blocks = sizes
    array = np.arange(np.prod(shape), dtype="<i4").reshape(shape) + 1
    whole = np.prod([-(-n // b) * b for n, b in zip(shape, blocks, strict=True)])
    stored = b2nd(array, blocks)
    if whole > 4 * array.size:
        with pytest.raises(DamagedBlockError, match="padding included"):
            guarded(BLOSC2, stored, array.nbytes, 4)
    else:
        assert guarded(BLOSC2, stored, array.nbytes, 4) == array.tobytes()


def test_much_padding_is_refused():
    array = np.ones((17, 17, 17), "<i4")
    with pytest.raises(DamagedBlockError, match="padding included"):
        guarded(BLOSC2, b2nd(array, (16, 16, 16)), array.nbytes, 4)


def test_hostile_b2nd_blocks_are_refused():
    array = samples()["volume"]
    stored = next(z for c, z, a in VALID if b"b2nd" in z and a.nbytes == array.nbytes)
    layer = stored.index(b"\x97\x00\x04")
    blocks = layer + 4 + 4 * 9 + 1 + 4 * 5 + 2
    for new in (0, -1, 2**31 - 1, 22):
        bad = stored[:blocks] + struct.pack(">i", new) + stored[blocks + 4 :]
        with pytest.raises(DamagedBlockError, match="b2nd array"):
            guarded(BLOSC2, bad, array.nbytes, 1)


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("zstandard", lambda: encode(ZSTD, bytes(8), 4)),
        ("zstandard", lambda: decode(ZSTD, bytes(8), np.empty(8, np.uint8), 4)),
        ("zstandard", lambda: load_codec("zstd")),
        ("blosc2", lambda: encode(BLOSC2, bytes(8), 4)),
        ("blosc2", lambda: load_codec("blosc2")),
        ("hdf5plugin", load_filters),
    ],
)
def test_missing_extra_says_what_to_install(monkeypatch, module, call):
    codecs._blosc2.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"pip install 'dmi-hpc\[compression\]'") as caught:
        call()
    assert not isinstance(caught.value, DamagedBlockError) and module in str(caught.value).lower()


def test_import_loads_no_codec():
    code = (
        "import sys, dmi_hpc.data.codecs;"
        "sys.exit(any(name in sys.modules for name in ('zstandard', 'blosc2', 'hdf5plugin')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
