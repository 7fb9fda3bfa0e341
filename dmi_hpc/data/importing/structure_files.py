"""Files of many structures, cut into single records with their places; nothing is parsed twice."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmi_hpc.data.importing.crystals import is_structure
from dmi_hpc.data.importing.csvs import opened
from dmi_hpc.data.importing.records import BadRecord
from dmi_hpc.errors import DataError

_MOST_ATOMS = 10**7  # of a frame: more is a damaged file
_IDENTIFIERS = ("jid", "material_id", "task_id", "id", "name")


@dataclass(frozen=True)
class Record:
    """One structure, not yet parsed. content: text, an object of JSON, or None: read `file`."""

    where: str
    name: str
    format: str
    content: Any
    file: Path


Placed = Iterator[tuple[Record | BadRecord, int]]  # and bytes of the file read so far


def xyz_frames(file: Path, name: str) -> Placed:
    """Frames of an (extended) XYZ file, one at a time.

    A damaged frame costs itself: the next one begins at the next line that is only an integer.
    """
    with opened(file) as (content, raw):
        lines = io.TextIOWrapper(content, encoding="utf-8", errors="replace")
        numbered = itertools.chain(enumerate(lines, 1), itertools.repeat((0, "")))
        number, line = next(numbered)
        for index in itertools.count():
            while line and not line.strip():
                number, line = next(numbered)
            if not line:
                return
            where, head, body = f"{file}:{number} (frame {index})", line, list[str]()
            atoms = _atoms(head)
            number, line = next(numbered)
            if atoms is None:
                while line and _atoms(line) is None:
                    number, line = next(numbered)
                reason = f"expected the number of atoms, found {head.strip()[:40]!r}"
                yield BadRecord(where, reason), raw.tell()
                continue
            # the comment may be anything, an atom is neither nothing nor a single integer
            while line and len(body) <= atoms and not (body and _ends_early(line)):
                body.append(line)
                number, line = next(numbered)
            if len(body) <= atoms:
                end = "the frame ends" if line else "the file ends"
                reason = f"{end} after {max(0, len(body) - 1)} of {atoms} atoms"
                yield BadRecord(where, reason), raw.tell()
                continue
            yield Record(where, f"{name}:{index}", "extxyz", head + "".join(body), file), raw.tell()


def _ends_early(line: str) -> bool:
    return not line.strip() or _atoms(line) is not None


def _atoms(line: str) -> int | None:
    """The number that a frame begins with; None if the line is another one."""
    text = line.strip()
    if not (text.isascii() and text.isdigit()) or len(text) > len(str(_MOST_ATOMS)):
        return None
    return int(text) if int(text) <= _MOST_ATOMS else None


def json_records(file: Path, name: str) -> Placed:
    """Structures of a JSON file (held in memory), or of JSON Lines (one at a time)."""
    if ".jsonl" in "".join(file.suffixes).lower():
        yield from _json_lines(file, name)
        return
    with opened(file) as (content, _):
        try:
            whole = json.loads(content.read())
        except ValueError as error:
            raise DataError(f"{file}: not valid JSON: {error}") from None
    size, entries = file.stat().st_size, _entries(whole)
    for done, (key, value) in enumerate(entries, 1):
        found = _identifier(value) or (key if isinstance(key, str) else f"{name}:{key}")
        at = size * done // len(entries)
        yield Record(f"{file}[{key!r}]", found, "json", value, file), at


def _json_lines(file: Path, name: str) -> Placed:
    with opened(file) as (content, raw):
        for number, line in enumerate(content, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                value = json.loads(line)
            except ValueError as error:
                yield BadRecord(where, f"not valid JSON: {error}"), raw.tell()
                continue
            found = _identifier(value) or f"{name}:{number}"
            yield Record(where, found, "json", value, file), raw.tell()


def _entries(whole: Any) -> list[tuple[int | str, Any]]:
    """(number or key, record): of a list, an object of records, a table of pandas, or one alone."""
    if isinstance(whole, list):
        return list(enumerate(whole))
    if not isinstance(whole, dict) or is_structure(whole):
        return [(0, whole)]
    if {"columns", "index", "data"} <= set(whole):  # DataFrame.to_json(orient="split"): matbench
        columns = whole["columns"]
        rows = [dict(zip(columns, row, strict=False)) for row in whole["data"]]
        return list(zip(map(_key, whole["index"]), rows, strict=True))
    if any(is_structure(value) for value in whole.values()) and not all(
        is_structure(value) for value in whole.values()
    ):
        return [(0, whole)]
    return list(whole.items())


def _key(index: Any) -> int | str:
    return index if isinstance(index, int) else str(index)


def _identifier(record: Any) -> str | None:
    if isinstance(record, dict):
        for key in _IDENTIFIERS:
            if isinstance(record.get(key), str) and record[key]:
                return str(record[key])
    return None
