"""Staging: once a node, proved while copied, found by content, gone after use; whatever is killed."""

import errno
import fcntl
import io
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from runner import environment
from toy_set import toy_set

from dmi_hpc.data import stage as stage_module
from dmi_hpc.data.manifest import read_manifest
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.sampler import Order
from dmi_hpc.data.stage import Staging, find_staged, part_shards, remove, stage, staged
from dmi_hpc.data.stage_home import home_of, lock_file
from dmi_hpc.data.storage import Storage
from dmi_hpc.errors import CorruptShardError, DataError

LIMIT_S = 30


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "set"
    toy_set(folder)
    return folder


@pytest.fixture
def source(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "set"))


@pytest.fixture
def to(tmp_path, monkeypatch):
    folder = tmp_path / "node"
    folder.mkdir()
    monkeypatch.setenv("DMI_STAGE", str(folder))
    yield folder
    remove(folder, force=True)


def left_in(to):
    return sorted(str(path.relative_to(to)) for path in to.rglob("*"))


def same_rows(a, b):
    with ShardSet.open(a) as first, ShardSet.open(b) as second:
        rows = np.arange(len(first))
        return all(
            np.array_equal(first.gather(name, rows), second.gather(name, rows))
            for name in ("x", "y")
        )


def test_a_staged_copy_is_the_set_and_is_used_again(source, to):
    counts = []
    copy = stage(source, Staging(to, progress=counts.append))
    assert sum(counts) == read_manifest(source).bytes
    assert same_rows(source, copy)
    assert read_manifest(copy).identity == read_manifest(source).identity
    assert find_staged(source) == copy
    counts.clear()
    assert stage(source, Staging(to, progress=counts.append)) == copy
    assert counts == []
    stage(source, Staging(to, checked=counts.append))
    assert sum(counts) == read_manifest(source).bytes
    assert home_of(to).stat().st_mode & 0o777 == 0o700
    assert copy.stat().st_mode & 0o777 == 0o700


def test_without_dmi_stage_or_copy_the_set_itself_is_used(source, to, monkeypatch):
    assert find_staged(source) == source
    copy = stage(source, Staging(to))
    monkeypatch.setenv("DMI_STAGE", f"/nowhere:{to}")
    assert find_staged(source) == copy
    monkeypatch.delenv("DMI_STAGE")
    assert find_staged(source) == source


def test_a_copy_of_other_content_is_not_used_and_is_replaced(source, to):
    old = stage(source, Staging(to))
    shutil.rmtree(source)
    toy_set(source, seed=9)
    assert find_staged(source) == source
    new = stage(source, Staging(to))
    assert new != old
    assert not old.exists()
    assert find_staged(source) == new
    assert same_rows(source, new)


def test_a_copy_in_use_is_not_replaced(source, to):
    with staged(source, Staging(to)) as old:
        shutil.rmtree(source)
        toy_set(source, seed=9)
        stage(source, Staging(to))
        assert old.exists()
    assert not old.exists()


def test_a_copy_with_a_file_missing_is_made_again(source, to):
    copy = stage(source, Staging(to))
    name = read_manifest(source).shards[1].file
    (copy / name).unlink()
    assert find_staged(source) == source
    assert stage(source, Staging(to)) == copy
    assert same_rows(source, copy)


def test_a_damaged_source_is_refused_and_nothing_is_left(source, to):
    shard = read_manifest(source).shards[2]
    with (source / shard.file).open("rb+") as stream:
        stream.seek(shard.arrays["x"].offset)
        stream.write(b"\xff\xff")
    with pytest.raises(CorruptShardError, match=rf"{shard.file}: expected .* --repair-from"):
        stage(source, Staging(to))
    os.truncate(source / shard.file, 100)
    with pytest.raises(CorruptShardError, match="found 100"):
        stage(source, Staging(to))
    assert left_in(to) == [home_of(to).name, f"{home_of(to).name}/{lock_of(source, to).name}"]
    assert remove(to) == (0, [])
    assert left_in(to) == []


def lock_of(source, to):
    return lock_file(home_of(to) / read_manifest(source).identity)


# parts


def test_parts_hold_the_rows_that_nodes_read(source, to):
    manifest = read_manifest(source)
    with ShardSet.open(source) as shards:
        for nodes in (1, 2, 3, 7):
            for node in range(nodes):
                wanted = {shard.file for shard in part_shards(manifest, (node, nodes))}
                for split in ("train", "validation", "test"):
                    rows = shards.rows(split)
                    mine = Order(0, len(rows), parts=nodes, batch_size=nodes).part_rows(node)
                    found = rows[np.array(mine, dtype=np.int64)] // 70
                    assert {manifest.shards[k].file for k in found} <= wanted
            assert len(part_shards(manifest, (0, nodes))) <= -(-5 // nodes) + 2
    assert part_shards(manifest, None) == list(manifest.shards)
    for part in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(DataError, match="numbered from 0"):
            part_shards(manifest, part)


def test_a_part_is_a_whole_set_whose_other_shards_are_the_originals(source, to):
    manifest = read_manifest(source)
    copy = stage(source, Staging(to, part=(1, 3)))
    own = {shard.file for shard in part_shards(manifest, (1, 3))}
    assert 0 < len(own) < len(manifest.shards)
    for shard in manifest.shards:
        assert (copy / shard.file).is_symlink() == (shard.file not in own)
    assert find_staged(source) == copy
    assert same_rows(source, copy)
    remove(to)
    assert all((source / shard.file).exists() for shard in manifest.shards)


def test_a_part_whose_original_is_gone_is_not_used(source, to, tmp_path):
    stage(source, Staging(to, part=(0, 3)))
    other = shutil.copytree(source, tmp_path / "other")
    shutil.rmtree(source)
    assert find_staged(other) == other


# users


def test_the_last_user_removes_the_copy(source, to):
    with staged(source, Staging(to)) as first:
        with staged(source, Staging(to)) as second:
            assert first == second
        assert first.exists()
        assert same_rows(source, first)
    assert not first.exists()
    assert left_in(to) == [home_of(to).name]


def test_a_copy_made_for_the_job_stays_after_its_users(source, to):
    with staged(source, Staging(to)) as copy:
        stage(source, Staging(to))
    assert copy.exists()
    with staged(source, Staging(to)):
        pass
    assert copy.exists()


def test_a_user_that_fails_removes_the_copy_too(source, to):
    with pytest.raises(KeyError), staged(source, Staging(to)) as copy:
        assert find_staged(source) == copy
        raise KeyError
    assert not copy.exists()


def test_remove_leaves_copies_in_use_unless_forced(source, to, tmp_path):
    with staged(source, Staging(to)) as copy:
        assert remove(to) == (0, [copy])
        assert copy.exists()
        assert remove(to, tmp_path / "another") == (0, [])
        assert remove(to, source, force=True) == (1, [])
        assert not copy.exists()
    kept = stage(source, Staging(to))
    shutil.rmtree(source)
    assert remove(to, tmp_path / "another") == (0, [])
    assert kept.exists()
    assert remove(to, source) == (1, [])
    assert left_in(to) == []


# processes


HOLD = """
import sys, time
from pathlib import Path
from dmi_hpc.data.stage import *
source, to = map(Path, sys.argv[1:3])
if sys.argv[3] == "slow":
    import dmi_hpc.data.stage as stage
    def halt(count):
        print("copying\\n", end="", flush=True)  # in one piece: several threads copy
        time.sleep(60)
    stage.stage(source, Staging(to, progress=halt))
else:
    with staged(source, Staging(to)) as copy:
        print(copy, flush=True)
        time.sleep(60)
"""


def start(*arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def kill(process):
    process.kill()
    process.wait(LIMIT_S)
    process.stdout.close()


def test_a_stager_killed_in_the_middle_blocks_nobody_and_leaves_nothing(source, to):
    process, said = start(source, to, "slow")
    try:
        assert said == "copying"
        assert find_staged(source) == source
        told = []
        with pytest.raises(DataError, match=r"for 0.2 s.*--lock-timeout"):
            stage(source, Staging(to, lock_timeout_s=0.2, say=told.append))
        assert len(told) == 1
        assert "waiting for another process" in told[0]
    finally:
        kill(process)
    assert list(home_of(to).glob(".tmp-*"))
    with staged(source, Staging(to, lock_timeout_s=5)) as copy:
        assert same_rows(source, copy)
        assert not list(home_of(to).glob(".tmp-*"))
    assert left_in(to) == [home_of(to).name]


def test_a_user_killed_does_not_keep_the_copy_for_ever(source, to):
    process, said = start(source, to, "use")
    try:
        assert Path(said).exists()
        with staged(source, Staging(to)):
            pass
        assert Path(said).exists(), "the other process uses it"
        assert remove(to) == (0, [Path(said)])
    finally:
        kill(process)
    with staged(source, Staging(to)) as copy:
        assert copy == Path(said)
    assert left_in(to) == [home_of(to).name]


def test_leftovers_of_other_sets_are_swept(source, to, tmp_path):
    process, _ = start(source, to, "slow")
    kill(process)
    toy_set(tmp_path / "other", rows=20, seed=5)
    copy = stage(tmp_path / "other", Staging(to))
    assert sorted(path.name for path in home_of(to).iterdir()) == [copy.name, f"{copy.name}.lock"]


def test_many_at_once_copy_once(source, to):
    counts, lock, found = [], threading.Lock(), []
    size = read_manifest(source).bytes
    barrier = threading.Barrier(8)

    def progress(count):
        with lock:
            counts.append(count)
        time.sleep(0.01)

    def one(number):
        barrier.wait(LIMIT_S)
        with staged(source, Staging(to, lock_timeout_s=LIMIT_S, progress=progress)) as copy:
            found.append(copy)
            barrier.wait(LIMIT_S)
            assert (copy / "manifest.json").exists()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    assert len(set(found)) == 1
    assert sum(counts) == size
    assert left_in(to) == [home_of(to).name]


def test_users_that_come_and_go_always_have_a_whole_copy(source, to):
    def one(number):
        rng = np.random.default_rng(number)
        for _ in range(4):
            with staged(source, Staging(to, lock_timeout_s=LIMIT_S)) as copy:
                assert same_rows(source, copy)
            time.sleep(rng.uniform(0, 0.02))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(one, range(3)))
    assert left_in(to) == [home_of(to).name]


# refusals


def test_no_room_is_said_before_anything_is_copied(source, to, monkeypatch):
    full = shutil.disk_usage(to)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(DataError, match=r"no room .*: \d+ kB needed, 1 kB free.*--part K/N"):
        stage(source, Staging(to))
    assert not list(home_of(to).glob(".tmp-*"))


def test_memory_of_the_job_limits_copies_in_memory(source, to, monkeypatch):
    monkeypatch.setattr(stage_module, "storage_of", lambda path: Storage("memory", "tmpfs"))
    monkeypatch.setattr(stage_module, "free_memory", lambda: 2000)
    with pytest.raises(DataError, match="2 kB free memory of this node or job"):
        stage(source, Staging(to))


def test_a_disk_that_fills_while_copying_keeps_nothing(source, to, monkeypatch):
    write, written = io.FileIO.write, []

    class Full(io.FileIO):
        def write(self, data):
            written.append(len(data))
            if len(written) > 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(self, data)

    real = Path.open

    def opened(path, mode="r", *rest, **more):
        return Full(path, mode) if mode == "xb" else real(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(DataError, match=r"no space left: .* Nothing of the copy was kept"):
        stage(source, Staging(to))
    monkeypatch.undo()
    assert [path.name for path in home_of(to).iterdir()] == [lock_of(source, to).name]


def test_folders_of_others_are_neither_used_nor_followed(source, to, monkeypatch):
    copy = stage(source, Staging(to))
    assert find_staged(source) == copy
    remove(to)
    copy = stage(source, Staging(to))
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    home_of(to).mkdir(mode=0o700)  # made by this user, so not by user mine + 1
    shutil.copytree(copy, home_of(to) / copy.name)
    assert find_staged(source) == source
    with pytest.raises(DataError, match="not a private folder of yours"):
        stage(source, Staging(to))
    assert remove(to) == (0, [])
    shutil.rmtree(home_of(to))


def test_open_folders_and_links_are_refused(source, to, tmp_path):
    copy = stage(source, Staging(to))
    home_of(to).chmod(0o770)
    assert find_staged(source) == source
    with pytest.raises(DataError, match="open to others"):
        stage(source, Staging(to))
    home_of(to).chmod(0o700)
    moved = tmp_path / "moved"
    home_of(to).rename(moved)
    home_of(to).symlink_to(moved)
    assert find_staged(source) == source
    with pytest.raises(DataError, match="not a private folder"):
        stage(source, Staging(to))
    home_of(to).unlink()
    assert (moved / copy.name).exists()


def test_folders_that_cannot_be_staged_in(source, to, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        stage(source, Staging(tmp_path / "missing"))
    to.chmod(0o777)
    with pytest.raises(DataError, match="sticky bit"):
        stage(source, Staging(to))
    to.chmod(0o1777)
    stage(source, Staging(to))
    with pytest.raises(DataError, match="no such file"):
        stage(tmp_path / "nothing", Staging(to))


def test_a_read_only_folder_is_a_clear_error(source, to, monkeypatch):
    def refuse(path, *arguments, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere: modes prove nothing
    with pytest.raises(DataError, match=r"cannot stage in .*Read-only file system"):
        stage(source, Staging(to))


def test_a_file_system_without_locks_is_a_clear_error(source, to, monkeypatch):
    def refuse(handle, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(DataError, match="has no locks"):
            stage(source, Staging(to))
