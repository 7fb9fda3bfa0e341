"""Compressed blocks, encoded and decoded outside HDF5 and its lock, one block at a time.

A block is one chunk of an HDF5 dataset: any HDF5 with the filter (in Python: hdf5plugin) reads it.

- zstd: HDF5's byte shuffle, then filter 32015, whose chunk is one plain zstd frame. Smallest.
- blosc2: filter 32026, whose chunk is a Blosc2 frame (`b2frame`): bit shuffle, then lz4. Fastest.

What is decoded is not trusted: sizes are compared with the one expected before anything is
allocated, and of the filters and codecs a Blosc2 frame may name only plain ones are accepted.
Which bytes are right only a checksum of the stored block can tell.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Final

import numpy as np

from dmi_hpc.data.manifest import Compression
from dmi_hpc.errors import DataError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_EXTRA = "pip install 'dmi-hpc[compression]'"
_LARGEST: Final = 2**31 - 2**16  # Blosc2 counts in int32
_LZ4: Final = 1  # numbers of Blosc2
_BIT_SHUFFLE: Final = 2
_INNER_BLOCK: Final = 2**18  # of Blosc2: shuffled and compressed by itself, stays in the L2 cache


class DamagedBlockError(ValueError):
    """Stored bytes that are no block of the expected size."""


@dataclass(frozen=True)
class Filter:
    """A filter as HDF5 registers it."""

    number: int
    shuffle: bool  # HDF5's own byte shuffle runs before it
    options: Callable[[int], tuple[int, ...]]  # level -> compression_opts


FILTERS: Mapping[str, Filter] = {
    "zstd": Filter(32015, True, lambda level: (level,)),
    # the zeros are filled in by the filter: revision, inner block, bytes of an element and a chunk
    "blosc2": Filter(32026, False, lambda level: (0, 0, 0, 0, level, _BIT_SHUFFLE, _LZ4)),
}


def load_filters() -> None:
    """Make HDF5 know the filters. Raises DataError if hdf5plugin is not installed."""
    _load("hdf5plugin", "HDF5 reads and writes compressed sets through hdf5plugin")


def load_codec(codec: str) -> None:
    """Import what encode and decode need. Raises DataError if it is not installed."""
    if codec == "zstd":
        _zstandard()
    else:
        _blosc2()


def encode(compression: Compression, block: bytes, itemsize: int) -> bytes:
    """A whole chunk as the filter stores it; equal blocks, equal bytes (of one library version).

    itemsize: bytes of one element; divides the block. Raises DataError if the block is too large or
    the library is not installed.
    """
    assert block and len(block) % itemsize == 0, "whole elements"
    if len(block) > _LARGEST:
        raise DataError(
            f"a block of {len(block)} bytes: expected at most {_LARGEST} in a compressed set. "
            "Store it without compression."
        )
    if compression.codec == "zstd":
        planes = np.frombuffer(block, np.uint8).reshape(-1, itemsize).T
        compressor = _zstandard().ZstdCompressor(level=compression.level)
        return bytes(compressor.compress(np.ascontiguousarray(planes)))
    return _encode_blosc2(compression.level, block, itemsize)


def decode(
    compression: Compression, stored: bytes | memoryview | Bytes, out: Bytes, itemsize: int
) -> None:
    """Decode one chunk into `out`, (bytes of the chunk,) uint8, contiguous.

    Threads run it in parallel: the interpreter's lock is free for most of the time. Raises
    DamagedBlockError if `stored` is no such chunk; what `out` holds is then undefined. Raises
    DataError if the library is not installed.
    """
    assert out.dtype == np.uint8 and out.ndim == 1 and out.flags.c_contiguous, "plain bytes"
    assert out.size and out.size % itemsize == 0, "whole elements"
    frame = memoryview(stored.data if isinstance(stored, np.ndarray) else stored).cast("B")
    if compression.codec == "zstd":
        _decode_zstd(frame, out, itemsize)
    else:
        _decode_blosc2(frame, out)


def _load(module: str, why: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(f"{why}, which is not installed ({error}): {_EXTRA}") from None


def _zstandard() -> Any:
    return _load("zstandard", "this set is compressed with zstd, read through zstandard")


@cache
def _blosc2() -> Any:
    module = _load("blosc2", "this set is compressed with blosc2, read through Python-Blosc2")
    module.set_releasegil(True)  # a switch of the whole process, off by default
    return module


def _decode_zstd(frame: memoryview, out: Bytes, itemsize: int) -> None:
    zstandard = _zstandard()
    try:
        size = zstandard.get_frame_parameters(frame).content_size
        if size != out.size:  # decompress() allocates what the frame declares
            raise DamagedBlockError(f"zstd frame of {size} bytes, expected {out.size}")
        plain = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise DamagedBlockError(f"no zstd frame: {error}") from None
    planes = np.frombuffer(plain, np.uint8).reshape(itemsize, -1)
    elements = out.reshape(-1, itemsize)
    if itemsize > 64:  # long strings: numpy's own order is the better one
        np.copyto(elements, planes.T)
        return
    for k in range(itemsize):  # several times faster than one transposed copy
        elements[:, k] = planes[k]


def _encode_blosc2(level: int, block: bytes, itemsize: int) -> bytes:
    blosc2 = _blosc2()
    frame = blosc2.SChunk(
        chunksize=len(block),
        data=block,
        contiguous=True,
        cparams={
            "codec": blosc2.Codec.LZ4,
            "clevel": level,
            "typesize": itemsize if itemsize < 256 else 1,
            "blocksize": _INNER_BLOCK,
            "filters": [blosc2.Filter.NOFILTER] * 5 + [blosc2.Filter.BITSHUFFLE],
            "filters_meta": [0] * 6,
            "nthreads": 1,
        },
        dparams={"nthreads": 1},  # stored too
    ).to_cframe()
    return bytes(frame)


# Blosc2's README_CFRAME_FORMAT.rst: msgpack, big endian, at fixed places
_FRAME = struct.Struct(">10s xI xQ 5x xq xq xi xi xi")
_MAGIC: Final = b"\x9e\xa8b2frame\0"
_FRAME_END: Final = 87  # of the part of the header that all frames have
# README_CHUNK_FORMAT.rst: little endian
_CHUNK = struct.Struct("<2xBBiii6sB8sB")
_EXTENDED: Final = 0b101  # flags of a chunk header of 32 bytes
_PLAIN_CODECS: Final = (0, 1, 3, 4)  # blosclz, lz4, zlib, zstd
_ZEROS: Final = struct.pack("<Q", 0x81 << 56)  # stands for a chunk of zeros
_MOST_PADDING: Final = 4  # times the size of the chunk


def _decode_blosc2(frame: memoryview, out: Bytes) -> None:
    if len(frame) < _FRAME_END + _CHUNK.size:
        raise DamagedBlockError(f"{len(frame)} bytes are too few for a Blosc2 frame")
    magic, header, length, size, stored, _, _, chunk_size = _FRAME.unpack_from(frame)
    if magic != _MAGIC or length != len(frame) or chunk_size != size:
        raise DamagedBlockError(f"no Blosc2 frame of one chunk and {len(frame)} bytes")
    if not _FRAME_END <= header <= len(frame) - _CHUNK.size:
        raise DamagedBlockError(f"Blosc2 frame of {len(frame)} bytes with a header of {header}")
    chunk = frame[header:]
    if b"b2nd" in bytes(frame[_FRAME_END:header]):
        shape, blocks = _b2nd_shapes(frame[_FRAME_END:header])
        _check_b2nd(shape, blocks, size, out.size)
        padded = np.empty(size, np.uint8)
        _decode_chunk(chunk, stored, padded)
        _join(padded, shape, blocks, out)
    elif size != out.size:
        raise DamagedBlockError(f"Blosc2 frame of {size} bytes, expected {out.size}")
    else:
        _decode_chunk(chunk, stored, out)


def _decode_chunk(chunk: memoryview, stored: int, out: Bytes) -> None:
    """The one chunk of a frame; `chunk` may go on behind it."""
    if stored == 0:  # only the frame's index, itself a stored chunk, tells what the chunk is
        if bytes(chunk[_CHUNK.size :][:8]) != _ZEROS:
            raise DamagedBlockError("Blosc2 frame without a chunk")
        out[:] = 0
        return
    flags, itemsize, size, inner, length, filters, _, rest, kind = _CHUNK.unpack_from(chunk)
    if size != out.size:  # decompress2() writes what the chunk declares
        raise DamagedBlockError(f"Blosc2 chunk of {size} bytes, expected {out.size}")
    if not (_CHUNK.size <= length == stored <= len(chunk) and 0 < inner <= size and itemsize):
        raise DamagedBlockError(f"Blosc2 chunk of {length} bytes in blocks of {inner}")
    if (
        flags & _EXTENDED != _EXTENDED
        or flags >> 5 not in _PLAIN_CODECS
        or max(filters) > _BIT_SHUFFLE
        or any(rest)
        or kind
    ):
        raise DamagedBlockError("Blosc2 chunk of a kind that HDF5's filter does not write")
    try:
        _blosc2().decompress2(chunk[:length], dst=out, nthreads=1)
    except (ValueError, RuntimeError) as error:
        raise DamagedBlockError(f"no Blosc2 chunk: {error}") from None


def _b2nd_shapes(header: memoryview) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the array and of its inner blocks, of README_B2ND_METALAYER.rst."""
    try:
        at = bytes(header).index(b"\xa4b2nd\xd2") + 6
        (start,) = struct.unpack_from(">i", header, at)
        content = header[start - _FRAME_END + 5 :] if start >= _FRAME_END else header[:0]
        dims = content[2]
        numbers = struct.unpack_from(">4x" + "xq" * dims + 2 * ("x" + "xi" * dims), content)
    except (ValueError, IndexError, struct.error):
        raise DamagedBlockError("Blosc2 frame with a broken b2nd layer") from None
    return numbers[:dims], numbers[2 * dims :]


def _check_b2nd(
    shape: tuple[int, ...], blocks: tuple[int, ...], padded: int, expected: int
) -> None:
    fits = 0 < len(shape) <= 16 and all(0 < b <= n for b, n in zip(blocks, shape, strict=True))
    if not fits or math.prod(shape) > expected or expected % math.prod(shape):
        raise DamagedBlockError(
            f"b2nd array of {shape} in blocks of {blocks}: not {expected} bytes"
        )
    whole = math.prod(-(-n // b) * b for n, b in zip(shape, blocks, strict=True))
    if padded != whole * (expected // math.prod(shape)) or padded > _MOST_PADDING * expected:
        raise DamagedBlockError(f"b2nd array of {padded} bytes, padding included, for {expected}")


def _join(padded: Bytes, shape: tuple[int, ...], blocks: tuple[int, ...], out: Bytes) -> None:
    """Put the inner blocks of an array, one after the other and padded, in their places."""
    dims = len(shape)
    grid = [-(-n // b) for n, b in zip(shape, blocks, strict=True)]
    axes = [axis for k in range(dims) for axis in (k, dims + k)]
    parts = padded.reshape(*grid, *blocks, -1).transpose(*axes, 2 * dims)
    whole = parts.reshape(*(g * b for g, b in zip(grid, blocks, strict=True)), -1)
    out.reshape(*shape, -1)[...] = whole[tuple(slice(n) for n in shape)]
