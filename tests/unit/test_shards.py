"""Shard files: what any HDF5 tool reads in them, and that no damage goes unnoticed."""

import errno
import os
import re

import h5py
import numpy as np
import pytest
import toy_build as toy
import xxhash

from dmi_hpc.data.manifest import SPLIT, Field, read_manifest, write_manifest
from dmi_hpc.data.parts import file_checksum
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.shard import check_rows, group_by_split, write_shard
from dmi_hpc.errors import CorruptShardError, DataError

CODECS = [None, "zstd", "blosc2"]
BACKENDS = {
    None: ["mmap", "pread", "direct", "ram"],
    "zstd": ["pread", "direct", "ram"],
    "blosc2": ["pread", "direct", "ram"],
}
CASES = [(codec, backend) for codec in CODECS for backend in BACKENDS[codec]]
FLIPS = 60  # a case


def make_arrays(rows=9, seed=0):
    made = toy.make_rows(range(rows), seed)
    made["split"] = np.array([k % 3 for k in range(rows)], dtype=np.uint8)
    return made


def dataset(name):
    return f"/_axes/{name[6:]}" if name.startswith("_axes.") else f"/{name}"


def has_direct(folder):
    try:
        os.close(os.open(folder / "manifest.json", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.fixture(scope="module", params=CODECS)
def stored(request, tmp_path_factory):
    """(codec, folder, manifest) of a set of three shards, several blocks a field."""
    folder = tmp_path_factory.mktemp(str(request.param))
    manifest = toy.write_set(folder, rows=500, rows_per_shard=200, codec=request.param)
    return request.param, folder, manifest


def test_any_hdf5_tool_reads_a_shard(tmp_path):
    plan, arrays = toy.make_plan(None), group_by_split(make_arrays())
    record = write_shard(tmp_path / "a.h5", plan, arrays)
    with h5py.File(tmp_path / "a.h5") as file:
        assert set(file) == {*toy.NAMES, "split", "_axes", "_blocks"}
        for name, made in arrays.items():
            data, values = file[name], made.values if isinstance(made, Ragged) else made
            assert np.array_equal(data[:], values)
            assert data.chunks is None
            assert (data.id.get_offset() or 0) == record.arrays[name].offset
            assert record.arrays[name].offset % 4096 == 0
        assert np.array_equal(file["_axes/node"][:], arrays["z"].offsets)
        assert np.array_equal(file["_axes/edge"][:], arrays["edge"].offsets)
        assert file["x"].attrs["unit"].decode() == "GPa"
        assert file["x"].attrs["description"].decode() == "noise in Å³"
        assert file["edge"].attrs["refers"].decode() == "node"
        assert file.attrs["fingerprint"].decode() == plan.fingerprint()
    assert record.bytes == (tmp_path / "a.h5").stat().st_size
    assert record.xxh3 == file_checksum(tmp_path / "a.h5")
    assert record.split_rows == (3, 3, 3)


def test_block_tables_are_as_the_format_says(stored):
    codec, folder, manifest = stored
    for shard in manifest.shards:
        raw = (folder / shard.file).read_bytes()
        assert f"{xxhash.xxh3_64_intdigest(raw):016x}" == shard.xxh3
        with h5py.File(folder / shard.file) as file:
            for array in manifest.plan.arrays:
                table = file[f"_blocks/{array.name}"][:]
                info = shard.arrays[array.name]
                assert len(table) == manifest.plan.blocks(array, info.length)
                stored_bytes = [raw[o : o + n] for o, n in table[:, :2].tolist()]
                assert [xxhash.xxh3_64_intdigest(b) for b in stored_bytes] == table[:, 2].tolist()
                if codec is None or array.name.startswith("_"):
                    assert b"".join(stored_bytes) == file[dataset(array.name)][:].tobytes()
    assert max(len(s.arrays) for s in manifest.shards) == len(manifest.plan.arrays)


def test_equal_data_give_equal_bytes(tmp_path):
    for codec in CODECS:
        plan = toy.make_plan(None, codec=codec)
        records = [write_shard(tmp_path / f"{codec}{k}", plan, make_arrays(6)) for k in range(2)]
        assert (tmp_path / f"{codec}0").read_bytes() == (tmp_path / f"{codec}1").read_bytes()
        assert records[0].xxh3 == records[1].xxh3
    assert len(list(tmp_path.iterdir())) == 6


def test_big_endian_and_strided_input_is_stored_little_endian_and_whole(tmp_path):
    arrays, plan = make_arrays(6), toy.make_plan(None)
    wide = np.repeat(arrays["n"], 2).astype(">i8")
    other = arrays | {"n": wide[::2], "x": np.asfortranarray(arrays["x"].astype(">f4"))}
    assert check_rows(plan, other, "rows") == 6
    record = write_shard(tmp_path / "a.h5", plan, other)
    assert record.xxh3 == write_shard(tmp_path / "b.h5", plan, arrays).xxh3


def shorter(ragged):
    return Ragged(ragged.values[:-1], np.minimum(ragged.offsets, len(ragged.values) - 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": np.zeros(9)}, "'n': expected int64 .* found float64"),
        ({"n": np.zeros(8, np.int64)}, "'n': 8 rows, expected 9"),
        ({"n": [1] * 9}, r"'n': expected dense rows, a NumPy array \(n\) of int64; found list"),
        ({"n": np.int64(1)}, "'n': expected dense.*found int64"),
        ({"text": np.zeros(9, "S8")}, r"'text': expected S7.* found \|S8"),
        ({"text": np.zeros(9, "U7")}, "'text': expected S7"),
        ({"x": np.full((9, 3), np.inf, np.float32)}, "'x' has values that are not finite"),
        ({"x": np.zeros((9, 2), np.float32)}, r"'x': expected float32 \(3,\).*\(2,\)"),
        ({"z": np.zeros(9, np.uint8)}, "'z': expected ragged"),
        ({"n": Ragged(np.zeros(9, np.int64), np.arange(10))}, "'n': expected dense.*found Ragged"),
        ({"split": np.full(9, 3, np.uint8)}, "'split': expected 0, 1 or 2, found 3"),
    ],
)
def test_wrong_rows_are_named(changes, message):
    with pytest.raises(DataError, match=f"those rows: field {message}"):
        check_rows(toy.make_plan(None), make_arrays() | changes, "those rows")


def test_a_missing_field_lists_those_that_are_there():
    arrays = make_arrays()
    del arrays["x"]
    with pytest.raises(DataError, match="no field 'x'; found n, text"):
        check_rows(toy.make_plan(None), arrays, "rows")


def test_fields_of_an_axis_have_equally_many_entries():
    fields = (*toy.FIELDS, Field(name="q", dtype="f4", unit="e", description="", axis="node"))
    arrays = make_arrays()
    arrays["q"] = shorter(Ragged(np.zeros(len(arrays["z"].values), "f4"), arrays["z"].offsets))
    with pytest.raises(DataError, match=r"'q', row \d+ of these: \d entries.*'node' has \d"):
        check_rows(toy.make_plan(None, fields=fields), arrays, "rows")


@pytest.mark.parametrize("value", [-1, 6, 2**30])
def test_a_reference_to_nothing_is_an_error(value):
    arrays = make_arrays()
    arrays["edge"].values[-1, 1] = value
    with pytest.raises(DataError, match="'edge' refers to entries of axis 'node'"):
        check_rows(toy.make_plan(None), arrays, "rows")


def test_rows_are_grouped_by_split_in_their_order():
    arrays = make_arrays()
    grouped = group_by_split(arrays)
    order = np.argsort(arrays["split"], kind="stable")
    assert grouped["n"].tolist() == order.tolist()
    assert [row.tolist() for row in grouped["z"]] == [arrays["z"][i].tolist() for i in order]
    assert group_by_split(grouped) == grouped


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dmi_hpc.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "a.h5", toy.make_plan(None), make_arrays(6))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("codec", "backend"), CASES)
def test_what_was_appended_is_read(tmp_path, codec, backend):
    toy.write_set(tmp_path, rows=130, rows_per_shard=40, codec=codec, calls=7)
    if backend == "direct" and not has_direct(tmp_path):
        pytest.skip("no O_DIRECT here")
    with ShardSet.open(tmp_path, backend=backend) as shards:
        found = toy.stored_rows(shards)
    for name, made in toy.make_rows(range(130)).items():
        assert toy.equal(found[name], made), name


class Damaged:
    """A copy of a set in which one shard at a time is damaged and mended."""

    def __init__(self, folder, target, manifest):
        self.folder, self.manifest = target, manifest
        for path in folder.iterdir():
            (target / path.name).write_bytes(path.read_bytes())
        self.raw = {s.file: (target / s.file).read_bytes() for s in manifest.shards}
        with ShardSet.open(target) as shards:
            self.right = shards.fields([*toy.NAMES, "split"], shards.rows("all"))

    def write(self, file, raw):
        (self.folder / file).write_bytes(raw)

    def flip(self, file, bit):
        raw = bytearray(self.raw[file])
        raw[bit // 8] ^= 1 << bit % 8
        self.write(file, raw)

    def regions(self, shard):
        """(first byte, one past the last, array, block) of all data."""
        with h5py.File(self.folder / shard.file) as file:
            for array in self.manifest.plan.arrays:
                for block, row in enumerate(file[f"_blocks/{array.name}"][:].tolist()):
                    yield row[0], row[0] + row[1], array.name, block

    def read(self, backend, verify):
        """Each field that can be read, and the errors of the others."""
        found, errors = {}, {}
        with ShardSet.open(self.folder, backend=backend, verify=verify) as shards:
            for name in self.right:
                try:
                    found[name] = shards.gather(name, np.arange(len(shards)))
                except CorruptShardError as error:
                    errors[name] = str(error)
        return found, errors


def readers_of(array):
    """Fields whose reading needs the bytes of an array."""
    if not array.startswith("_axes."):
        return [array]
    return [field.name for field in toy.FIELDS if field.axis == array[6:]]


@pytest.mark.parametrize("backend", ["mmap", "pread", "direct", "ram"])
def test_a_flipped_bit_is_found_when_it_is_read(stored, tmp_path, backend):
    codec, folder, manifest = stored
    if backend not in BACKENDS[codec]:
        pytest.skip("compressed sets cannot be mapped")
    if backend == "direct" and not has_direct(folder):
        pytest.skip("no O_DIRECT here")
    damaged, rng = Damaged(folder, tmp_path, manifest), np.random.default_rng(7)
    inside = 0
    for k in range(FLIPS):
        shard = manifest.shards[k % len(manifest.shards)]
        regions = list(damaged.regions(shard))
        if k % 3:  # in data, each array as often as the others
            name = manifest.plan.arrays[k % len(manifest.plan.arrays)].name
            start, stop, *_ = regions[
                rng.choice([i for i, r in enumerate(regions) if r[2] == name])
            ]
        else:
            start, stop = 0, shard.bytes
        bit = int(rng.integers(8 * start, 8 * stop))
        damaged.flip(shard.file, bit)
        found, errors = damaged.read(backend, "read")
        for name, values in found.items():
            assert toy.equal(values, damaged.right[name]), (name, bit)
        hit = [r for r in regions if r[0] <= bit // 8 < r[1]]
        for _, _, array, block in hit:
            inside += 1
            for name in readers_of(array):
                assert f"{shard.file}: field '{array}', block {block} " in errors[name]
                assert "dmi data verify --repair-from" in errors[name]
        for message in errors.values():
            assert re.search(rf"{shard.file}: field '\w[\w.]*'", message), message
        damaged.write(shard.file, damaged.raw[shard.file])
    assert inside > FLIPS / 2


def test_a_flipped_bit_is_found_when_the_set_is_opened(stored, tmp_path):
    codec, folder, manifest = stored
    damaged, rng = Damaged(folder, tmp_path, manifest), np.random.default_rng(8)
    backend = BACKENDS[codec][0]
    for k in range(2 * FLIPS):
        shard = manifest.shards[k % len(manifest.shards)]
        regions = list(damaged.regions(shard))
        bit = int(rng.integers(0, 8 * shard.bytes))
        if k % 2:
            start, stop, *_ = regions[rng.integers(len(regions))]
            bit = int(rng.integers(8 * start, 8 * stop))
        damaged.flip(shard.file, bit)
        with pytest.raises(CorruptShardError, match=f"{shard.file}: ") as caught:
            ShardSet.open(tmp_path, backend=backend)
        message = str(caught.value)
        assert f"expected checksum xxh3 {shard.xxh3}, found " in message
        for start, stop, array, block in regions:
            if start <= bit // 8 < stop:
                assert f"field '{array}', block {block} " in message
        damaged.write(shard.file, damaged.raw[shard.file])
    ShardSet.open(tmp_path, backend=backend).close()


@pytest.mark.parametrize("verify", ["open", "read", "none"])
def test_a_shard_of_another_length_is_named(stored, tmp_path, verify):
    codec, folder, manifest = stored
    damaged, shard = Damaged(folder, tmp_path, manifest), manifest.shards[2]
    raw = damaged.raw[shard.file]
    rng = np.random.default_rng(9)
    sizes = [0, 1, 100, len(raw) // 2, len(raw) - 1, *rng.integers(0, len(raw), 10).tolist()]
    for other in [raw[:size] for size in sizes] + [raw + b"\0", raw + raw]:
        damaged.write(shard.file, other)
        message = (
            f"{shard.file}: expected {shard.bytes} bytes with checksum xxh3 {shard.xxh3}, found "
            f"{len(other)} bytes"
        )
        with pytest.raises(CorruptShardError, match=message):
            ShardSet.open(tmp_path, verify=verify, backend=BACKENDS[codec][0])


@pytest.mark.parametrize("verify", ["open", "read", "none"])
def test_a_missing_shard_is_named(stored, tmp_path, verify):
    codec, folder, manifest = stored
    Damaged(folder, tmp_path, manifest)
    shard = manifest.shards[0]
    (tmp_path / shard.file).unlink()
    for _ in range(2):
        with pytest.raises(CorruptShardError, match=f"{shard.file}: missing.*{shard.xxh3}"):
            ShardSet.open(tmp_path, verify=verify, backend=BACKENDS[codec][0])
        (tmp_path / shard.file).mkdir(exist_ok=True)


@pytest.mark.parametrize(("codec", "backend"), CASES)
def test_a_shard_that_vanishes_after_opening_is_named(tmp_path, codec, backend):
    manifest = toy.write_set(tmp_path, codec=codec)
    if backend == "direct" and not has_direct(tmp_path):
        pytest.skip("no O_DIRECT here")
    with ShardSet.open(tmp_path, backend=backend) as shards:
        for shard in manifest.shards:
            (tmp_path / shard.file).unlink()
        with pytest.raises(DataError, match=r"shard-0000\d\.h5: "):
            shards.gather("x", np.arange(len(shards)))


@pytest.mark.parametrize(("codec", "backend"), CASES)
def test_a_shard_cut_short_after_opening_is_named(tmp_path, codec, backend):
    manifest = toy.write_set(tmp_path, rows=500, codec=codec)
    if backend == "direct" and not has_direct(tmp_path):
        pytest.skip("no O_DIRECT here")
    with ShardSet.open(tmp_path, backend=backend, verify="none") as shards:
        for shard in manifest.shards:
            os.truncate(tmp_path / shard.file, 3000)
        with pytest.raises(CorruptShardError, match=r"shard-0000\d\.h5: "):
            shards.gather("volume", np.arange(len(shards)))


def test_zeroed_and_exchanged_blocks_are_found(stored, tmp_path):
    codec, folder, manifest = stored
    damaged, shard = Damaged(folder, tmp_path, manifest), manifest.shards[0]
    raw = damaged.raw[shard.file]
    places = [r for r in damaged.regions(shard) if r[2] == "volume"]
    (a, b, *_), (c, d, *_) = places[:2]
    size = min(b - a, d - c)
    exchanged = bytearray(raw)
    exchanged[a : a + size], exchanged[c : c + size] = raw[c : c + size], raw[a : a + size]
    zeroed = raw[:a] + bytes(b - a) + raw[b:]
    for other in (bytes(exchanged), zeroed):
        damaged.write(shard.file, other)
        for backend in BACKENDS[codec]:
            if backend != "direct" or has_direct(folder):
                errors = damaged.read(backend, "read")[1]
                assert "field 'volume', block 0 " in errors["volume"]


def edited(manifest, index, array, **changes):
    """The manifest with another place of one array of one shard."""
    shard = manifest.shards[index]
    stored = shard.arrays[array].model_copy(update=changes)
    moved = shard.model_copy(update={"arrays": {**shard.arrays, array: stored}})
    shards = list(manifest.shards)
    shards[index] = moved
    return manifest.model_copy(update={"shards": tuple(shards)})


def test_places_of_another_layout_are_found(tmp_path):
    manifest = toy.write_set(tmp_path)
    arrays = manifest.shards[0].arrays
    for changes in ({"offset": arrays["n"].offset}, {"blocks": arrays["n"].blocks}):
        write_manifest(tmp_path, edited(manifest, 0, "x", **changes))
        with pytest.raises(CorruptShardError, match=r"shard-00000\.h5: x: data and block table at"):
            ShardSet.open(tmp_path)
        refused = pytest.raises(CorruptShardError, match=r"shard-00000\.h5: field 'x'")
        with ShardSet.open(tmp_path, verify="read") as shards, refused:
            shards.gather("x", np.arange(10))


def test_a_plan_edited_afterwards_is_found(tmp_path):
    manifest = toy.write_set(tmp_path)
    other = manifest.plan.fields[0].model_copy(update={"unit": "MPa"})
    plan = manifest.plan.model_copy(update={"fields": (other, *manifest.plan.fields[1:])})
    write_manifest(tmp_path, manifest.model_copy(update={"plan": plan}))
    assert read_manifest(tmp_path).field("x").unit == "MPa"
    with pytest.raises(CorruptShardError, match=r"written for plan .*was edited or belongs"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_offsets_that_lie_are_no_way_out_of_the_array(tmp_path, backend):
    """A shard made to deceive, checksums and all: rows that reach outside their field."""
    manifest = toy.write_set(tmp_path)
    shard = manifest.shards[0]
    raw = bytearray((tmp_path / shard.file).read_bytes())
    axis = shard.arrays["_axes.node"]
    lies = np.frombuffer(raw, "<i8", axis.length, axis.offset).copy()
    lies[3:] += 10**6
    raw[axis.offset : axis.offset + lies.nbytes] = lies.tobytes()
    table = np.frombuffer(raw, "<u8", 3, axis.blocks).copy()
    table[2] = xxhash.xxh3_64_intdigest(lies.tobytes())
    raw[axis.blocks : axis.blocks + 24] = table.tobytes()
    (tmp_path / shard.file).write_bytes(raw)
    digest = xxhash.xxh3_64_hexdigest(bytes(raw))
    forged = edited(manifest, 0, "_axes.node", xxh3=xxhash.xxh3_64_hexdigest(table.tobytes()))
    first = forged.shards[0].model_copy(update={"xxh3": digest})
    write_manifest(tmp_path, forged.model_copy(update={"shards": (first, *forged.shards[1:])}))
    refused = pytest.raises(CorruptShardError, match=r"shard-00000.*axis 'node': row 2 of the set")
    with ShardSet.open(tmp_path, backend=backend) as shards, refused:
        shards.gather("z", np.arange(20))


def test_an_axis_all_of_whose_rows_are_empty(tmp_path):
    fields = (Field(name="z", dtype="u1", unit="", description="", axis="node"), SPLIT)
    none = Ragged(np.empty(0, np.uint8), np.zeros(4, np.int64))
    arrays = {"z": none, "split": np.zeros(3, np.uint8)}
    record = write_shard(tmp_path / "a", toy.make_plan(None, fields=fields), arrays)
    assert record.arrays["z"].model_dump(exclude={"xxh3"}) == {
        "offset": 0,
        "length": 0,
        "blocks": 0,
    }
