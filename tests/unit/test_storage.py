"""File systems are recognised, and the way of reading follows from them by stated rules."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_set import toy_set

from dmi_hpc.data import storage
from dmi_hpc.data.storage import (
    Storage,
    access_of,
    choose,
    decoded_bytes,
    evict,
    free_memory,
    mount_of,
    mounts,
    size_text,
    storage_of,
    stored_bytes,
    tier_of,
)
from dmi_hpc.errors import CorruptShardError

MOUNTINFO = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
25 24 0:23 / /dev/shm rw,relatime master:3 - tmpfs tmpfs rw,size=24683668k
40 27 0:50 / /home rw - autofs systemd-1 rw,fd=29
41 40 0:51 / /home rw - nfs4 server:/home rw,vers=4.2
42 27 0:52 / /lustre/my\040work rw shared:5 - lustre 10.0.0.1@o2ib:/work rw
43 27 259:1 /data /local/nvme rw - xfs /dev/nvme0n1p1 rw
"""
GB = 10**9
SHM_FOLDER = Path("/dev/shm")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/dev/shm", "tmpfs"),
        ("/dev/shm/x/y", "tmpfs"),
        ("/dev/shmoo", "ext4"),
        ("/home/me", "nfs4"),
        ("/lustre/my work/set", "lustre"),
        ("/local/nvme/set", "xfs"),
    ],
)
def test_the_deepest_and_last_mount_counts(path, kind):
    found = mount_of(Path(path), mounts(MOUNTINFO))
    assert found is not None
    assert found.kind == kind


@pytest.mark.parametrize(
    ("tier", "kinds"),
    [
        ("memory", "tmpfs ramfs"),
        ("local", "ext4 xfs btrfs overlay zfs"),
        (
            "shared",
            "lustre gpfs nfs nfs4 cifs beegfs ceph fuse.sshfs pvfs2 wekafs fuse.daos 9p new",
        ),
    ],
)
def test_tiers(tier, kinds):
    assert {tier_of(kind) for kind in kinds.split()} == {tier}


@given(st.text())
@settings(deadline=None, max_examples=50)
def test_any_text_is_parsed_without_failure(text):
    mounts(text)


def test_a_spinning_disk_is_known_by_its_queue_also_from_a_partition(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    for folder in (disk / "queue", disk / "part", tmp_path / "sys/dev/block"):
        folder.mkdir(parents=True)
    (disk / "queue/rotational").write_text("1\n")
    (tmp_path / "sys/dev/block/8:1").symlink_to(disk / "part")
    (tmp_path / "sys/dev/block/8:0").symlink_to(disk)
    monkeypatch.setattr(storage, "_DEVICES", tmp_path / "sys/dev/block")
    monkeypatch.setattr(storage, "_MOUNTS", tmp_path / "mountinfo")
    for device, spins in (("8:0", True), ("8:1", True), ("9:0", False)):
        (tmp_path / "mountinfo").write_text(f"1 1 {device} / / rw - ext4 none rw\n")
        assert storage_of(tmp_path) == Storage("local", "ext4", spins)
    (tmp_path / "mountinfo").unlink()
    assert storage_of(tmp_path).tier == "shared"


def test_memory_is_limited_by_the_cgroups_of_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(storage, "_CGROUPS", tmp_path / "fs")
    whole = free_memory()
    (tmp_path / "cgroup").write_text("0::/slurm/job_1/step_0\n")
    (tmp_path / "fs/slurm/job_1/step_0").mkdir(parents=True)
    (tmp_path / "fs/slurm/job_1/step_0/memory.max").write_text("max\n")
    (tmp_path / "fs/slurm/job_1/memory.max").write_text("1000000\n")
    assert free_memory() == 1_000_000 < whole
    (tmp_path / "fs/slurm/job_1/memory.current").write_text("900000\n")
    (tmp_path / "fs/slurm/job_1/memory.stat").write_text("anon 500000\ninactive_file 400000\n")
    assert free_memory() == 500_000, "cached files give way"
    (tmp_path / "cgroup").write_text("4:memory:/j\n3:cpu,cpuacct:/k\n")
    (tmp_path / "fs/memory/j").mkdir(parents=True)
    (tmp_path / "fs/memory/j/memory.limit_in_bytes").write_text("77\n")
    assert free_memory() == 77


SHARED = Storage("shared", "lustre")
DISK = Storage("local", "ext4", rotational=True)
NVME = Storage("local", "xfs")
SHM = Storage("memory", "tmpfs")


@pytest.mark.parametrize(
    ("where", "size", "compressed", "processes", "backend", "shuffle", "said"),
    [
        (SHM, 2 * GB, False, 4, "ram", "global", "2 GB are little"),
        (SHARED, 3 * GB, False, 4, "ram", "global", "read as a whole"),
        (NVME, 2 * GB, False, 8, "mmap", "global", "random access is cheap"),
        (NVME, 5 * GB, False, 1, "mmap", "global", "random access is cheap"),
        (SHM, 400 * GB, False, 1, "mmap", "global", "any row costs the same"),
        (NVME, 400 * GB, False, 4, "mmap", "global", "random access is cheap"),
        (DISK, 40 * GB, False, 8, "mmap", "global", "page cache holds the set"),
        (SHARED, 40 * GB, False, 8, "mmap", "global", "slow in the first epoch"),
        (SHARED, 60 * GB, False, 8, "pread", "block", "60 GB do not fit in half of the free"),
        (DISK, 60 * GB, False, 1, "pread", "block", "spinning disk"),
        (NVME, 20 * GB, True, 2, "ram", "global", "in each of 2 processes"),
        (SHM, 20 * GB, True, 4, "pread", "block", "whole blocks are decoded"),
    ],
)
def test_the_choice(where, size, compressed, processes, backend, shuffle, said):
    found = choose(
        where,
        size,
        memory_bytes=100 * GB,
        compressed=compressed,
        processes_on_node=processes,
    )
    assert (found.backend, found.shuffle) == (backend, shuffle)
    assert said in found.reason
    assert "\n" not in found.reason


@given(
    st.sampled_from([SHARED, DISK, NVME, SHM]),
    st.integers(0, 10**15),
    st.integers(0, 10**13),
    st.booleans(),
    st.integers(1, 512),
)
@settings(deadline=None)
def test_a_window_goes_with_block_shuffle_and_fits(where, size, memory, compressed, processes):
    found = choose(
        where, size, memory_bytes=memory, compressed=compressed, processes_on_node=processes
    )
    assert (found.window_bytes > 0) == (found.shuffle == "block") == (found.backend == "pread")
    assert found.window_bytes <= 128 * 2**20
    if compressed:
        assert found.backend != "mmap"


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_sizes_of_a_set(tmp_path, codec):
    manifest, rows = toy_set(tmp_path / "set", codec=codec)
    entries = {name: getattr(values, "values", values).nbytes for name, values in rows.items()}
    stored = stored_bytes(tmp_path / "set", manifest)
    if codec is None:
        assert stored == entries | {"split": manifest.rows}
    else:
        assert all(0 < stored[name] < size for name, size in entries.items() if size > 4096)
    axes = 2 * 8 * (manifest.rows + len(manifest.shards))
    assert decoded_bytes(manifest) == sum(entries.values()) + manifest.rows + axes
    assert access_of(tmp_path / "set", manifest).backend in ("mmap", "ram")


def test_a_damaged_block_table_is_no_size(tmp_path):
    manifest, _ = toy_set(tmp_path / "set", codec="zstd")
    shard = manifest.shards[0]
    with (tmp_path / "set" / shard.file).open("rb+") as stream:
        stream.seek(shard.arrays["x"].blocks + 3)
        stream.write(b"\xff")
    with pytest.raises(CorruptShardError, match="block table"):
        stored_bytes(tmp_path / "set", manifest)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_999, "1 MB"),
        (1_234_567, "1.23 MB"),
        (130e9, "130 GB"),
        (5e15, "5,000 TB"),
    ],
)
def test_sizes_for_people(count, text):
    assert size_text(count) == text


def test_files_in_memory_cannot_be_evicted():
    if not SHM_FOLDER.is_dir() or storage_of(SHM_FOLDER).tier != "memory":
        pytest.skip("no memory file system at hand: /dev/shm")
    with tempfile.NamedTemporaryFile(dir=SHM_FOLDER) as stream:
        stream.write(bytes(100_000))
        stream.flush()
        assert not evict(Path(stream.name))
        assert Path(stream.name).read_bytes() == bytes(100_000)
