import errno
import os
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.data.manifest import SPLIT, Field, Manifest, SplitRule, write_manifest
from dmi_hpc.data.shards import ShardSet, file_checksum, recover_shard, write_shard
from dmi_hpc.errors import CorruptShardError, DataError

FIELDS = (
    Field(name="volume", dtype="uint8", shape=(3, 3), unit="1", description="phases"),
    Field(name="C1111", dtype="float64", unit="GPa", description="stiffness in µ-units: Å³"),
    Field(name="formula", dtype="S7", unit="", description="text"),
    SPLIT,
)


def make_arrays(rows, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "volume": rng.integers(0, 2, (rows, 3, 3), dtype=np.uint8),
        "C1111": rng.normal(size=rows),
        "formula": np.array([f"Fe{i}O".encode() for i in range(rows)], dtype="S7"),
        "split": rng.integers(0, 3, rows).astype(np.uint8),
    }


def make_set(folder, rows=11, rows_per_shard=4):
    """A committed set and its data in memory."""
    arrays = make_arrays(rows)
    shards = []
    for k, start in enumerate(range(0, rows, rows_per_shard)):
        part = {name: array[start : start + rows_per_shard] for name, array in arrays.items()}
        shards.append(write_shard(folder / f"shard-{k:05d}.h5", part, FIELDS, "f"))
    counts = np.bincount(arrays["split"], minlength=3)
    manifest = Manifest(
        task="toy",
        rows=rows,
        rows_per_shard=rows_per_shard,
        fields=FIELDS,
        split_rule=SplitRule(seed=0, validation=0, test=0, key=""),
        seed=0,
        shards=tuple(shards),
        split_rows=dict(zip(("train", "validation", "test"), counts.tolist(), strict=True)),
        statistics={},
    )
    write_manifest(folder, manifest)
    return manifest, arrays


def test_any_hdf5_tool_reads_a_shard(tmp_path):
    arrays = make_arrays(5)
    record = write_shard(tmp_path / "a.h5", arrays, FIELDS, "ab12")
    with h5py.File(tmp_path / "a.h5") as file:
        assert set(file) == set(arrays)
        for name, array in arrays.items():
            data = file[name]
            assert np.array_equal(data[:], array)
            assert data.chunks is None
            assert data.id.get_offset() == record.offsets[name]
            assert record.offsets[name] % 4096 == 0
        assert file["C1111"].attrs["unit"].decode() == "GPa"
        assert file["C1111"].attrs["description"].decode() == "stiffness in µ-units: Å³"
        assert file.attrs["fingerprint"].decode() == "ab12"
    assert record.bytes == (tmp_path / "a.h5").stat().st_size
    assert record.xxh3 == file_checksum(tmp_path / "a.h5")


def test_equal_data_give_equal_bytes(tmp_path):
    for name in "ab":
        write_shard(tmp_path / name, make_arrays(5), FIELDS, "f")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_big_endian_input_is_stored_little_endian(tmp_path):
    arrays = make_arrays(5)
    swapped = arrays | {"C1111": arrays["C1111"].astype(">f8")}
    record = write_shard(tmp_path / "a.h5", swapped, FIELDS, "f")
    assert record.xxh3 == write_shard(tmp_path / "b.h5", arrays, FIELDS, "f").xxh3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"C1111": np.zeros(5, np.float32)}, "C1111.*expected float64.*found float32"),
        ({"C1111": np.zeros(4)}, r"C1111.*\(5,\).*found float64 \(4,\)"),
        ({"formula": np.zeros(5, "S8")}, r"formula.*expected S7.*found \|S8"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path / "a.h5", make_arrays(5) | changes, FIELDS, "f")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("dmi_hpc.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path / "a.h5", make_arrays(5), FIELDS, "f")
    assert list(tmp_path.iterdir()) == []


@given(data=st.data(), rows_per_shard=st.sampled_from([3, 4, 11, 100]))
@settings(deadline=None, max_examples=20)
def test_gather_is_indexing(tmp_path_factory, data, rows_per_shard):
    folder = tmp_path_factory.mktemp("set")
    _, arrays = make_set(folder, rows_per_shard=rows_per_shard)
    rows = np.array(data.draw(st.lists(st.integers(0, 10), max_size=30)), dtype=np.int64)
    with ShardSet.open(folder) as shards:
        for name, found in shards.fields(list(arrays), rows).items():
            assert np.array_equal(found, arrays[name][rows])
            assert found.flags.owndata
        out = np.empty((len(rows), 3, 3), np.uint8)
        assert shards.gather("volume", rows, out=out) is out
        assert np.array_equal(out, arrays["volume"][rows])


def test_rows_of_splits(tmp_path):
    manifest, arrays = make_set(tmp_path)
    with ShardSet.open(tmp_path) as shards:
        for code, name in enumerate(("train", "validation", "test")):
            assert np.array_equal(shards.rows(name), np.flatnonzero(arrays["split"] == code))
            assert len(shards.rows(name)) == manifest.split_rows[name]
        assert np.array_equal(shards.rows("all"), np.arange(11))


@pytest.mark.parametrize("rows_per_shard", [4, 11])
@pytest.mark.parametrize("row", [-1, 11])
def test_a_row_outside_is_an_error(tmp_path, rows_per_shard, row):
    make_set(tmp_path, rows_per_shard=rows_per_shard)
    with ShardSet.open(tmp_path) as shards, pytest.raises(IndexError, match="of a set of 11"):
        shards.gather("C1111", np.array([0, row]))


def test_an_unknown_field_lists_the_known(tmp_path):
    make_set(tmp_path)
    with ShardSet.open(tmp_path) as shards, pytest.raises(DataError, match=r"'c'.*volume, C1111"):
        shards.gather("c", np.array([0]))


def test_close_leaves_no_file_open(tmp_path):
    make_set(tmp_path)

    def mapped():
        maps = psutil.Process().memory_maps(grouped=False)
        links = [str(p.readlink()) for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
        return [m for m in [*(m.path for m in maps), *links] if m.startswith(str(tmp_path))]

    with ShardSet.open(tmp_path) as shards:
        shards.fields(("volume", "C1111"), np.arange(11))
        assert mapped()
    assert not mapped()


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_a_corrupt_shard_is_named_with_both_checksums(tmp_path):
    manifest, _ = make_set(tmp_path)
    shard = manifest.shards[1]
    path = tmp_path / shard.file
    flip(path, shard.offsets["C1111"])
    found = file_checksum(path)
    with pytest.raises(CorruptShardError, match=f"shard-00001.*{shard.xxh3}.*{found}.*Delete"):
        ShardSet.open(tmp_path)
    ShardSet.open(tmp_path, verify=False).close()


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_a_truncated_shard_is_named(tmp_path, keep):
    manifest, _ = make_set(tmp_path)
    shard = manifest.shards[2]
    path = tmp_path / shard.file
    path.write_bytes(path.read_bytes()[:keep])
    size = path.stat().st_size
    for verify in (True, False):
        message = f"shard-00002.*expected {shard.bytes} bytes.*{shard.xxh3}.*found {size} bytes"
        with pytest.raises(CorruptShardError, match=message):
            ShardSet.open(tmp_path, verify=verify)


def test_a_missing_shard_is_named(tmp_path):
    manifest, _ = make_set(tmp_path)
    (tmp_path / "shard-00000.h5").unlink()
    for verify in (True, False):
        with pytest.raises(CorruptShardError, match=f"shard-00000.*{manifest.shards[0].xxh3}"):
            ShardSet.open(tmp_path, verify=verify)


def test_offsets_of_another_layout_are_found(tmp_path):
    manifest, _ = make_set(tmp_path)
    first = manifest.shards[0]
    moved = first.model_copy(update={"offsets": {**first.offsets, "C1111": 4096}})
    changed = manifest.model_copy(update={"shards": (moved, *manifest.shards[1:])})
    write_manifest(tmp_path, changed)
    with pytest.raises(CorruptShardError, match="offsets"):
        ShardSet.open(tmp_path)


def test_recover_takes_whole_shards_only(tmp_path):
    path, arrays = tmp_path / "a.h5", make_arrays(5)
    assert recover_shard(path, 5, FIELDS, "f") is None
    record = write_shard(path, arrays, FIELDS, "f")
    kept = recover_shard(path, 5, FIELDS, "f")
    assert kept is not None
    assert kept[0] == record
    assert all(np.array_equal(kept[1][name], arrays[name]) for name in arrays)
    with pytest.raises(DataError, match="another, unfinished"):
        recover_shard(path, 5, FIELDS, "g")
    flip(path, record.offsets["volume"])
    assert recover_shard(path, 5, FIELDS, "f") is None
    path.write_bytes(b"torn")
    assert recover_shard(path, 5, FIELDS, "f") is None
