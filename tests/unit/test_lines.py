"""Append-only lines: one writer, any readers, and whatever a parallel file system makes of the end."""

import json
import os

import pytest

from dmi_hpc.errors import RunError
from search.records.lines import Appender, Tail, decode, encode, read_lines

RECORDS = [{"event": "ask", "id": n, "text": 'a "sum":"x" å'} for n in range(4)]


@pytest.fixture
def path(tmp_path):
    appender = Appender(tmp_path / "lines.jsonl")
    for record in RECORDS:
        appender.append(record)
    return tmp_path / "lines.jsonl"


def test_lines_are_plain_json_with_a_last_key(path):
    for line, record in zip(path.read_bytes().splitlines(), RECORDS, strict=True):
        found = json.loads(line)
        assert list(found)[-1] == "sum"
        assert len(found.pop("sum")) == 16
        assert found == record == decode(line)


def test_every_single_changed_byte_is_noticed():
    line = encode(RECORDS[0])[:-1]
    for place in range(len(line)):
        changed = bytearray(line)
        changed[place] ^= 1
        assert decode(bytes(changed)) is None, place


def test_a_line_without_checksum_is_taken_only_if_asked_for():
    assert decode(b'{"event":"ask"}') is None
    assert decode(b'{"event":"ask"}', unsigned=True) == {"event": "ask"}
    assert decode(b"[1]", unsigned=True) is None


@pytest.mark.parametrize("torn", [b"", b'{"event":"te', b"\0" * 30, b'{"event"' + b"\0" * 9])
def test_a_torn_end_costs_itself_alone(path, torn):
    with path.open("ab") as stream:
        stream.write(torn)
    assert list(read_lines(path).records) == RECORDS
    assert read_lines(path).damaged == ()  # somebody may be writing it
    Appender(path).append({"event": "resume"})
    found = read_lines(path)
    assert list(found.records) == [*RECORDS, {"event": "resume"}]
    assert found.damaged == ((5,) if torn else ())


def test_zeros_before_a_line_do_not_cost_it(path):
    with path.open("ab") as stream:
        stream.write(b"\0" * 100 + encode({"event": "resume"}))
    assert list(read_lines(path).records) == [*RECORDS, {"event": "resume"}]


def test_a_whole_line_without_its_newline_counts(path):
    path.write_bytes(path.read_bytes()[:-1])
    assert list(read_lines(path).records) == RECORDS
    Appender(path).append({"event": "resume"})
    assert read_lines(path).damaged == ()
    assert len(read_lines(path).records) == 5


def test_a_second_writer_is_refused_without_any_lock(path):
    mine, other = Appender(path), Appender(path)
    mine.append({"id": 4})
    other.append({"id": 5})
    with pytest.raises(RunError, match="another process has written here"):
        mine.append({"id": 6})
    assert [record["id"] for record in read_lines(path).records] == [0, 1, 2, 3, 4, 5]


def test_after_a_failed_write_the_next_line_stands_alone(path, monkeypatch):
    appender, write = Appender(path), os.write
    appender.append({"id": 4})

    def half(handle, data):
        write(handle, data[:7])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", half)
    with pytest.raises(OSError, match="No space"):
        appender.append({"id": 5})
    monkeypatch.undo()
    appender.append({"id": 5})
    assert [record["id"] for record in read_lines(path).records] == [0, 1, 2, 3, 4, 5]
    assert read_lines(path).damaged == (6,)


def test_a_tail_sees_every_line_once_however_it_is_cut(path, tmp_path):
    whole, grown = path.read_bytes(), tmp_path / "grown.jsonl"
    tail, seen = Tail(grown), []
    assert tail.read() == []  # not there yet
    for place in range(0, len(whole) + 1, 7):
        grown.write_bytes(whole[:place])
        seen += tail.read()
    grown.write_bytes(whole)
    seen += tail.read()
    assert seen == RECORDS
    assert tail.read() == []


def test_a_tail_waits_for_bytes_that_have_not_arrived(path):
    """An NFS client may see the new size first, and zeros."""
    whole = path.read_bytes()
    start, end = whole.index(b'"id":1'), whole.index(b'"id":1') + 6
    tail = Tail(path)
    path.write_bytes(whole[:start] + b"\0" * 6 + whole[end:])
    assert tail.read() == RECORDS[:1]
    path.write_bytes(whole)
    assert tail.read() == RECORDS[1:]
    assert tail.damaged == 0


def test_a_tail_gives_a_line_up_in_the_end(path):
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"id":1', b'"id":7'))
    tail = Tail(path, patience_s=0.0)
    assert tail.read() == [RECORDS[0], *RECORDS[2:]]
    assert tail.damaged == 1


def test_a_tail_starts_anew_with_a_new_file(path):
    tail = Tail(path)
    assert tail.read() == RECORDS
    path.write_bytes(encode({"event": "header"}))
    assert tail.read() == [{"event": "header"}]
