"""The check of a set's files when it is opened: it ends at the first that is wrong, and names it."""

import errno
import os
import time

import pytest
import toy_build as toy

from dmi_hpc.data import committed
from dmi_hpc.data.manifest import read_manifest
from dmi_hpc.errors import CorruptShardError, DataError

SHARDS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    toy.write_set(folder, rows=2 * SHARDS, rows_per_shard=2)
    return folder


def test_a_bad_first_file_is_reported_before_the_rest_is_read(folder, monkeypatch):
    read = []

    def checksum(path):
        read.append(path)
        if path.name != "shard-00000.h5":
            time.sleep(0.2)
        return "0" * 16

    monkeypatch.setattr(committed, "file_checksum", checksum)
    with pytest.raises(CorruptShardError, match=r"shard-00000\.h5: expected checksum"):
        committed.check_files(folder, read_manifest(folder))
    assert len(read) < SHARDS // 2


def test_bad_offsets_are_reported_before_the_rest_is_read(folder, monkeypatch):
    read, real = [], committed.file_checksum

    def checksum(path):
        read.append(path)
        time.sleep(0.1)
        return real(path)

    manifest = read_manifest(folder)
    first = manifest.shards[0]
    moved = first.arrays["x"].model_copy(update={"offset": first.arrays["x"].offset + 4096})
    first = first.model_copy(update={"arrays": {**first.arrays, "x": moved}})
    monkeypatch.setattr(committed, "file_checksum", checksum)
    with pytest.raises(CorruptShardError, match=r"shard-00000\.h5: x: data and block table at"):
        committed.check_files(
            folder, manifest.model_copy(update={"shards": (first, *manifest.shards[1:])})
        )
    assert len(read) < SHARDS // 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_is_named_and_not_called_corrupt(folder, monkeypatch, number):
    def checksum(path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(committed, "file_checksum", checksum)
    with pytest.raises(DataError, match=r"shard-00000\.h5: cannot be read: ") as caught:
        committed.check_files(folder, read_manifest(folder))
    assert not isinstance(caught.value, CorruptShardError)
