"""Every kind of damage is found, named, and mended from a copy; a wrong copy mends nothing."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_set import toy_set

from dmi_hpc import files
from dmi_hpc.data import repair as repair_module
from dmi_hpc.data.check import find_damage
from dmi_hpc.data.hdf5 import write_master
from dmi_hpc.data.manifest import BLOCK_ENTRY, read_manifest
from dmi_hpc.data.parts import file_checksum
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.repair import repair
from dmi_hpc.errors import CorruptShardError, DataError, RunError
from dmi_hpc.files import exclusive


@pytest.fixture(scope="module", params=[None, "zstd"], ids=["plain", "zstd"])
def original(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "set"
    return folder, toy_set(folder, codec=request.param)[0]


@pytest.fixture
def pair(original, tmp_path):
    """(set, copy, manifest)"""
    for name in ("set", "copy"):
        shutil.copytree(original[0], tmp_path / name)
    return tmp_path / "set", tmp_path / "copy", original[1]


def flip(path, *offsets):
    with path.open("rb+") as stream:
        for offset in offsets:
            stream.seek(offset)
            byte = stream.read(1)[0]
            stream.seek(offset)
            stream.write(bytes([byte ^ 0x10]))


def block(folder, manifest, shard, array, number):
    """(offset, size) of a block."""
    stored = manifest.shards[shard].arrays[array]
    with (folder / manifest.shards[shard].file).open("rb") as stream:
        stream.seek(stored.blocks + number * BLOCK_ENTRY)
        raw = stream.read(16)
    return int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little")


def assert_whole(folder, manifest):
    assert find_damage(folder) == ()
    assert read_manifest(folder) == manifest
    for shard in manifest.shards:
        assert file_checksum(folder / shard.file) == shard.xxh3
    ShardSet.open(folder, verify="open").close()
    left = {path.name for path in folder.iterdir()} - {s.file for s in manifest.shards}
    assert left <= {"manifest.json"}, "nothing else is left behind"


def test_a_whole_set_has_no_damage_and_every_byte_was_read(pair):
    folder, _, manifest = pair
    counts = []
    assert find_damage(folder, counts.append) == ()
    assert sum(counts) == manifest.bytes
    only = folder / manifest.shards[1].file
    assert find_damage(folder, counts.append, only=[only]) == ()
    assert sum(counts) == manifest.bytes + manifest.shards[1].bytes


@pytest.mark.parametrize("array", ["x", "y", "formula", "split", "z", "edge", "_axes.node"])
def test_a_damaged_block_is_named_and_mended(pair, array):
    folder, copy, manifest = pair
    offset, size = block(folder, manifest, 2, array, 0)
    path = folder / manifest.shards[2].file
    flip(path, offset + size - 1)
    (found,) = find_damage(folder)
    assert (found.file, found.array, found.block) == (path, array, 0)
    assert f"field {array!r}, block 0 is damaged" in str(found)
    (mended,) = repair(folder, copy, [found])
    assert (mended.file, mended.blocks, mended.bytes, mended.whole) == (path, 1, size, False)
    assert_whole(folder, manifest)


def test_rows_of_a_damaged_block_are_named(tmp_path):
    manifest, _ = toy_set(tmp_path / "set", rows=900, rows_per_shard=900)
    per_block = 4096 // 20
    offset, _ = block(tmp_path / "set", manifest, 0, "x", 2)
    flip(tmp_path / "set" / manifest.shards[0].file, offset)
    (found,) = find_damage(tmp_path / "set")
    assert f"rows {2 * per_block} to {3 * per_block - 1} of the shard" in str(found)
    offset, _ = block(tmp_path / "set", manifest, 0, "edge", 1)
    flip(tmp_path / "set" / manifest.shards[0].file, offset)
    _, found = find_damage(tmp_path / "set")
    assert "entries of axis 'edge' 512 to 1023" in str(found)


def test_all_damage_is_listed_in_order(pair):
    folder, copy, manifest = pair
    expected = []
    for shard in (0, 3, 4):
        for array in ("x", "edge"):
            offset, _ = block(folder, manifest, shard, array, 0)
            flip(folder / manifest.shards[shard].file, offset)
            expected.append((manifest.shards[shard].file, array, 0))
    (folder / manifest.shards[1].file).unlink()
    expected.insert(2, (manifest.shards[1].file, None, None))
    found = find_damage(folder)
    assert [(d.file.name, d.array, d.block) for d in found] == expected
    assert "missing" in str(found[2])
    counts = []
    mended = repair(folder, copy, found, counts.append)
    assert [m.file.name for m in mended] == [manifest.shards[k].file for k in (0, 1, 3, 4)]
    assert [m.whole for m in mended] == [False, True, False, False]
    # written, and read as a proof
    assert sum(counts) == 2 * sum(manifest.shards[k].bytes for k in (0, 1, 3, 4))
    assert_whole(folder, manifest)


def test_a_damaged_block_table_is_named_and_mended(pair):
    folder, copy, manifest = pair
    shard = manifest.shards[1]
    flip(folder / shard.file, shard.arrays["x"].blocks + 17)
    (found,) = find_damage(folder)
    assert found.array == "x"
    assert "block table is damaged" in str(found)
    # the data below it, too
    offset, _ = block(copy, manifest, 1, "x", 0)
    flip(folder / shard.file, offset)
    (mended,) = repair(folder, copy, find_damage(folder))
    assert mended.blocks == 2
    assert_whole(folder, manifest)


def test_a_damaged_header_is_told_from_data_and_mended(pair):
    folder, copy, manifest = pair
    shard = manifest.shards[0]
    flip(folder / shard.file, 9)
    (found,) = find_damage(folder)
    assert found.array is None
    assert "no data" in str(found)
    (mended,) = repair(folder, copy, [found])
    assert mended.blocks == 0
    assert_whole(folder, manifest)
    # a header and a block at once: the second is seen first
    offset, _ = block(folder, manifest, 0, "y", 0)
    flip(folder / shard.file, 9, offset)
    (found,) = find_damage(folder)
    assert found.array == "y"
    repair(folder, copy, [found])
    assert_whole(folder, manifest)


@pytest.mark.parametrize("length", [0, 1, 5000, -1, "longer"])
def test_a_file_of_another_length_is_mended(pair, length):
    folder, copy, manifest = pair
    path = folder / manifest.shards[3].file
    if length == "longer":
        with path.open("ab") as stream:
            stream.write(b"more")
    else:
        os.truncate(path, length if length >= 0 else path.stat().st_size + length)
    found = find_damage(folder)
    assert f"expected {manifest.shards[3].bytes}" in str(found[0])
    assert {d.file for d in found} == {path}
    repair(folder, copy, found)
    assert_whole(folder, manifest)


@given(st.data())
@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_flipped_bits_are_found_and_mended(pair, data):
    folder, copy, manifest = pair
    shard = data.draw(st.sampled_from(manifest.shards))
    offsets = data.draw(st.sets(st.integers(0, shard.bytes - 1), min_size=1, max_size=4))
    flip(folder / shard.file, *offsets)
    found = find_damage(folder)
    assert {d.file.name for d in found} == {shard.file}
    repair(folder, copy, found)
    assert_whole(folder, manifest)


def test_a_copy_damaged_in_the_same_place_mends_the_other_shards_only(pair):
    folder, copy, manifest = pair
    offset, _ = block(folder, manifest, 0, "x", 0)
    for where in (folder, copy):
        flip(where / manifest.shards[0].file, offset)
    (folder / manifest.shards[4].file).unlink()
    damaged = (folder / manifest.shards[0].file).read_bytes()
    said = r"(?s)1 of 2 shards.*damaged in the same place: field 'x', block 0.*another copy"
    with pytest.raises(CorruptShardError, match=said):
        repair(folder, copy, find_damage(folder))
    assert (folder / manifest.shards[0].file).read_bytes() == damaged
    (left,) = find_damage(folder)
    assert left.array == "x"
    assert not list(folder.glob(".tmp-*"))


def test_a_copy_damaged_elsewhere_is_good_enough(pair):
    folder, copy, manifest = pair
    name = manifest.shards[0].file
    flip(folder / name, block(folder, manifest, 0, "x", 0)[0])
    flip(copy / name, block(folder, manifest, 0, "y", 0)[0], 9)
    repair(folder, copy, find_damage(folder))
    assert_whole(folder, manifest)


def test_headers_damaged_in_both_are_refused(pair):
    folder, copy, manifest = pair
    for where in (folder, copy):
        flip(where / manifest.shards[0].file, 9)
    with pytest.raises(CorruptShardError, match="HDF5's own parts are damaged, too"):
        repair(folder, copy, find_damage(folder))
    assert len(find_damage(folder)) == 1


def test_a_copy_without_the_file_is_named(pair):
    folder, copy, manifest = pair
    for where in (folder, copy):
        (where / manifest.shards[0].file).unlink()
    with pytest.raises(CorruptShardError, match="missing in the copy"):
        repair(folder, copy, find_damage(folder))


def test_another_set_is_no_copy(tmp_path, pair):
    folder, _, manifest = pair
    toy_set(tmp_path / "other", seed=7)
    (folder / manifest.shards[0].file).unlink()
    with pytest.raises(DataError, match=f"no copy of this set: .* expected {manifest.identity}"):
        repair(folder, tmp_path / "other", find_damage(folder))
    with pytest.raises(DataError, match="no such file"):
        repair(folder, tmp_path / "nothing", find_damage(folder))


def test_a_master_of_another_set_is_found_and_removed(tmp_path):
    for name, seed in (("set", 0), ("copy", 0), ("old", 7)):
        toy_set(tmp_path / name, rows=20, seed=seed)
    with ShardSet.open(tmp_path / "old") as old:
        offsets = {axis: old.offsets(axis) for axis in old.manifest.plan.axes}
        master = write_master(tmp_path / "old", old.manifest, offsets)
    assert find_damage(tmp_path / "old") == ()
    shutil.copy(master, tmp_path / "set")
    toy_set(tmp_path / "old", rows=20, seed=7)
    assert master.exists(), "the same set again"
    toy_set(tmp_path / "old", rows=20, seed=8)
    assert not master.exists()
    (found,) = find_damage(tmp_path / "set")
    assert "master.h5: made from another set than is here" in str(found)
    assert repair(tmp_path / "set", tmp_path / "copy", [found]) == []
    assert_whole(tmp_path / "set", read_manifest(tmp_path / "copy"))


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_a_manifest_is_mended_with_shards_that_are_missing(pair, how):
    folder, copy, manifest = pair
    if how == "lost":
        (folder / "manifest.json").unlink()
    else:
        flip(folder / "manifest.json", 40)
    (folder / manifest.shards[1].file).unlink()
    with pytest.raises(DataError):
        find_damage(folder)
    found = find_damage(folder, copy=copy)
    assert [d.file.name for d in found] == ["manifest.json", manifest.shards[1].file]
    mended = repair(folder, copy, found)
    assert {m.file.name for m in mended} == {"manifest.json", manifest.shards[1].file}
    assert_whole(folder, manifest)


@pytest.mark.parametrize("how", ["damaged", "more", "none"])
def test_a_manifest_that_may_be_of_another_set_is_not_taken(pair, how):
    folder, copy, manifest = pair
    (folder / "manifest.json").unlink()
    first = folder / manifest.shards[0].file
    if how == "damaged":
        flip(first, 9)
    elif how == "more":
        shutil.copy(first, folder / "shard-00005.h5")
    else:
        for shard in manifest.shards:
            (folder / shard.file).unlink()
    said = "no shard of it is here" if how == "none" else "has no such shard-0000[05].h5"
    with pytest.raises(DataError, match=said):
        repair(folder, copy, find_damage(folder, copy=copy))
    assert not (folder / "manifest.json").exists()


def test_a_mended_shard_keeps_its_mode_and_links(pair, tmp_path):
    folder, copy, manifest = pair
    first, second, third = (folder / shard.file for shard in manifest.shards[:3])
    first.chmod(0o440)
    second.rename(tmp_path / "elsewhere.h5")
    second.symlink_to(tmp_path / "elsewhere.h5")
    for path in (first, second):
        flip(path, 9)
    repair(folder, copy, find_damage(folder))
    assert first.stat().st_mode & 0o777 == 0o440
    assert second.is_symlink()
    assert_whole(folder, manifest)
    third.unlink()
    third.symlink_to(tmp_path / "unmounted" / third.name)
    with pytest.raises(CorruptShardError, match="whose folder is missing"):
        repair(folder, copy, find_damage(folder))


def test_a_full_disk_leaves_the_damaged_file(pair, monkeypatch):
    folder, copy, manifest = pair
    flip(folder / manifest.shards[0].file, 9)
    before = (folder / manifest.shards[0].file).read_bytes()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(repair_module, "_assemble", full)
    with pytest.raises(RunError, match="no space left"):
        repair(folder, copy, find_damage(folder))
    assert (folder / manifest.shards[0].file).read_bytes() == before
    assert not list(folder.glob(f"{files.TEMP_PREFIX}*"))


def test_two_repairs_at_once_are_refused(pair):
    folder, copy, manifest = pair
    (folder / manifest.shards[0].file).unlink()
    with exclusive(folder, "build"), pytest.raises(RunError, match="is running here"):
        repair(folder, copy, find_damage(folder))


def test_a_disk_that_cannot_be_read_is_damage(pair, monkeypatch):
    folder, copy, manifest = pair
    offset, _ = block(folder, manifest, 1, "x", 0)
    path, pread = folder / manifest.shards[1].file, os.pread

    def failing(handle, count, start):
        if start == offset and Path(f"/proc/self/fd/{handle}").readlink() == path:
            raise OSError(errno.EIO, "Input/output error")
        return pread(handle, count, start)

    flip(path, offset)
    monkeypatch.setattr(os, "pread", failing)
    (found,) = find_damage(folder)
    assert found.array == "x"
    assert "cannot be read: Input/output error" in str(found)
    repair(folder, copy, [found])
    monkeypatch.undo()
    assert_whole(folder, manifest)
