"""What a writer takes and removes in its folder: only what is its own."""

import os

import h5py
import pytest
import toy_build as toy

from dmi_hpc.errors import DataError


@pytest.mark.parametrize("make", [toy.write_set, toy.build_alone])
@pytest.mark.parametrize("kind", ["text", "HDF5", "folder", "pipe"])
def test_files_of_others_named_as_shards_are_in_the_way(tmp_path, make, kind):
    path = tmp_path / "shard-00003.h5"
    if kind == "text":
        path.write_text("content")
    elif kind == "HDF5":
        with h5py.File(path, "w") as file:
            file.attrs["format"] = "another"
    else:
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    before = path.stat()
    with pytest.raises(
        DataError, match=r"not written by this program \(shard-00003\.h5\)\. Choose"
    ):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mtime_ns == before.st_mtime_ns
