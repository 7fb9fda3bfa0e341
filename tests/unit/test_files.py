import errno
import os
import resource

import pytest

from dmi_hpc.errors import RunError
from dmi_hpc.files import (
    append_json_line,
    atomic_file,
    atomic_folder,
    exclusive,
    read_json_lines,
    remove_stale,
    write_json,
    writing,
)


def test_a_failed_write_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk"), atomic_file(path) as temp:
        temp.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_folder_is_not_there(tmp_path):
    with pytest.raises(OSError, match="disk"), atomic_folder(tmp_path / "step") as temp:
        (temp / "half").write_text("x")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_replaces_the_old_one(tmp_path):
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "step") as temp:
            (temp / "file").write_text(text)
    assert (tmp_path / "step" / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_line_costs_only_itself(tmp_path, cut):
    path = tmp_path / "log.jsonl"
    for number in range(3):
        append_json_line(path, {"number": number}, durable=True)
    path.write_bytes(path.read_bytes()[:-cut])
    append_json_line(path, {"number": 9})
    numbers = [record["number"] for record in read_json_lines(path)]
    assert numbers == ([0, 1, 2, 9] if cut == 1 else [0, 1, 9])


def test_json_that_is_not_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_left_is_removed(tmp_path):
    with atomic_file(tmp_path / "kept") as temp:
        temp.write_text("x")
    (tmp_path / ".tmp-file-7-0123abcd").write_text("half")
    (tmp_path / ".tmp-folder-7-0123abcd" / "inner").mkdir(parents=True)
    (tmp_path / ".tmp-link-7-0123abcd").symlink_to(tmp_path / "mine")
    mine = {"kept", "mine", ".tmp-mine", ".tmp-file-7-0123", ".tmp-a-b-0123abcd"}
    for name in mine - {"kept"}:
        (tmp_path / name).mkdir()
    remove_stale(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == mine


def test_a_second_job_in_a_folder_is_refused_and_nothing_is_left(tmp_path):
    refused = pytest.raises(RunError, match="another training is running here")
    with exclusive(tmp_path / "new", "training"), refused, exclusive(tmp_path / "new", "training"):
        pass
    with exclusive(tmp_path / "new", "training"):
        pass
    assert list((tmp_path / "new").iterdir()) == []


def test_a_lock_left_by_a_killed_holder_does_not_hold(tmp_path):
    (tmp_path / ".dmi-lock").touch()
    with exclusive(tmp_path, "training"):
        pass


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_a_lock_that_is_no_file_of_ours_is_refused(tmp_path, kind):
    path, mine = tmp_path / ".dmi-lock", tmp_path / "mine"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(mine)
    if kind == "link":
        mine.write_text("content")
    with pytest.raises(RunError, match="dmi-lock: expected a plain file"):
        exclusive(tmp_path, "training").__enter__()
    assert path.is_symlink() or path.exists()
    assert mine.exists() == (kind == "link")


def test_other_files_are_no_lock(tmp_path):
    """The lock is neither cut nor anybody else's file."""
    for name in ("lock", ".dmi-lock"):
        (tmp_path / name).write_text("content")
    with exclusive(tmp_path, "training"):
        assert {path.read_text() for path in tmp_path.iterdir()} == {"content"}
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "no space left .* MB"), (errno.EROFS, "cannot write")]
)
def test_failed_writes_are_for_the_user(tmp_path, number, message):
    with pytest.raises(RunError, match=message), writing(tmp_path):
        raise OSError(number, os.strerror(number))


def test_a_line_cut_by_a_full_disk_is_an_error_and_costs_only_itself(tmp_path):
    """The limit on file sizes cuts a write short as a disk that fills does."""
    path = tmp_path / "log.jsonl"
    append_json_line(path, {"number": 0})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            append_json_line(path, {"number": 1}, durable=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    append_json_line(path, {"number": 2})
    assert [record["number"] for record in read_json_lines(path)] == [0, 2]
