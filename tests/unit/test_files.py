import pytest

from dmi_hpc.files import (
    append_json_line,
    atomic_file,
    atomic_folder,
    read_json_lines,
    write_json,
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
