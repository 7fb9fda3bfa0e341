"""What `dmi data info` and `dmi data head` print: plain text, readable at 80 columns and in a pipe."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dmi_hpc.data.manifest import SPLIT, SPLITS, Field, Manifest
from dmi_hpc.data.statistics import Statistics
from dmi_hpc.data.storage import decoded_bytes, size_text
from dmi_hpc.errors import counted

Array = np.ndarray[Any, np.dtype[Any]]

_BARS = " ▁▂▃▄▅▆▇█"
_PLAIN_BARS = " .:-=+*#@"  # for terminals without UTF-8
_BAR_WIDTH = 24
_FEW = 6  # elements that are shown one by one


def info_lines(
    path: Path,
    manifest: Manifest,
    stored: Mapping[str, int],
    *,
    width: int = 80,
    plain: bool = False,
) -> list[str]:
    """The whole page. stored: bytes of each field in the files; plain: no block characters."""
    plan = manifest.plan
    how = "uncompressed"
    if plan.compression is not None:
        ratio = sum(_decoded(manifest, field) for field in manifest.fields) / sum(stored.values())
        how = f"{plan.compression.codec} level {plan.compression.level} ({ratio:.2f} times smaller)"
    rows = [shard.rows for shard in manifest.shards]
    each = f"{rows[0]:,}" if len(set(rows)) == 1 else f"{min(rows):,} to {max(rows):,}"
    shards = f"{counted(len(rows), 'shard')} of {each} row{'' if each == '1' else 's'}"
    lines = [
        f"{path}: {_clean(plan.task)}, {counted(manifest.rows, 'row')}",
        f"{shards}, blocks of {_block_text(plan.block_bytes)}",
        f"{size_text(manifest.bytes)}, {how}",
        f"identity {manifest.identity}",
        "",
        *_split_lines(manifest, width),
        "",
        *_field_lines(manifest, stored, width),
        *_axis_lines(manifest),
    ]
    if manifest.statistics:
        lines += ["", *_statistics_lines(manifest, plain)]
    for title, facts in (("provenance", plan.provenance), ("made with", manifest.made_with)):
        if facts:
            lines += ["", title, *_fact_lines(facts, width)]
    return lines


def info_json(path: Path, manifest: Manifest, stored: Mapping[str, int]) -> str:
    """The same facts for programs."""
    whole = manifest.model_dump(mode="json")
    shards = [{key: shard[key] for key in ("file", "rows", "bytes")} for shard in whole["shards"]]
    facts = {
        "path": str(path),
        "identity": manifest.identity,
        "bytes": manifest.bytes,
        "decoded_bytes": decoded_bytes(manifest),
        "field_bytes": dict(stored),
        **{key: whole[key] for key in ("format", "version", "plan", "rows", "split_rows")},
        "statistics": whole["statistics"],
        "made_with": whole["made_with"],
        "shards": shards,
    }
    return json.dumps(facts, indent=1)


def _split_lines(manifest: Manifest, width: int) -> list[str]:
    rule = manifest.plan.split_rule
    parts = [
        f"{name} {manifest.split_rows[name]:,} ({manifest.split_rows[name] / manifest.rows:.1%})"
        for name in ("train", "validation", "test")
    ]
    rule_text = f"split by {_clean(rule.key) or 'nothing'}, seed {rule.seed}"
    return ["   ".join(parts), *textwrap.wrap(rule_text, width, subsequent_indent="  ")]


def _field_lines(manifest: Manifest, stored: Mapping[str, int], width: int) -> list[str]:
    fields = [field for field in manifest.fields if field != SPLIT]
    table = [["field", "type", "unit", "size"]]
    for field in fields:
        per = "" if field.axis is None else f" per {field.axis}"
        size = size_text(stored[field.name])
        table.append([field.name, _type(field) + per, _clean(field.unit) or "-", size])
    if manifest.plan.compression is not None:
        ratios = [_decoded(manifest, f) / max(1, stored[f.name]) for f in fields]
        for row, text in zip(table, ["ratio", *(f"{ratio:.2f}" for ratio in ratios)], strict=True):
            row.append(text)
    lines = columns(table, right={3, 4})
    room = width - max(map(len, lines)) - 2
    found = [lines[0] + ("  description" if room >= 24 else "")]
    for line, field in zip(lines[1:], fields, strict=True):
        text = _clean(field.description)
        if field.refers is not None:
            text += f" (number of the row's {field.refers})"
        if room >= 24:
            first, *rest = textwrap.wrap(text, room) or [""]
            found.append(f"{line}  {first}".rstrip())
            found += [" " * (len(line) + 2) + more for more in rest]
        else:
            found += [
                line,
                *textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  "),
            ]
    return found


def _axis_lines(manifest: Manifest) -> list[str]:
    lines = []
    for axis in manifest.plan.axes:
        name = next(field.name for field in manifest.fields if field.axis == axis)
        entries = sum(shard.arrays[name].length for shard in manifest.shards)
        lines.append(f"{entries:,} {axis} entries, {entries / manifest.rows:.4g} a row")
    return ["", *lines] if lines else []


def _statistics_lines(manifest: Manifest, plain: bool) -> list[str]:
    table: list[tuple[str, ...]] = [("training rows", "mean", "deviation", "least", "", "most")]
    for name, found in manifest.statistics.items():
        numbers = (found.mean, found.std, found.min)
        table.append((name, *map(_number, numbers), bars(found, plain=plain), _number(found.max)))
    return columns(table, right={1, 2, 3})


def _fact_lines(facts: Mapping[str, Any], width: int) -> list[str]:
    lines = []
    for name, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        shown = textwrap.shorten(_clean(f"{name}: {text}"), 6 * width, placeholder=" ...")
        lines += textwrap.wrap(shown, width, initial_indent="  ", subsequent_indent="    ")
    return lines


def bars(statistics: Statistics, *, plain: bool = False, width: int = _BAR_WIDTH) -> str:
    """The histogram as a line of bars; a bin with any value shows something."""
    counts = np.array(statistics.histogram.counts)
    group = -(-len(counts) // width)
    counts = np.add.reduceat(counts, np.arange(0, len(counts), group))
    levels = -(-counts * 8 // max(1, counts.max()))
    return "".join((_PLAIN_BARS if plain else _BARS)[level] for level in levels)


def columns(table: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows of equally many cells as aligned lines."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = [">" if place in right else "<" for place in range(len(widths))]
    return [
        "  ".join(
            f"{cell:{a}{w}}" for cell, a, w in zip(row, aligned, widths, strict=True)
        ).rstrip()
        for row in table
    ]


def head_lines(
    manifest: Manifest, rows: Array, found: Mapping[str, Any], width: int = 80
) -> list[str]:
    """Rows one after the other, a field on one line or, where it is longer than `width`, on several."""
    lines = []
    shown = {name: values for name, values in found.items() if name != SPLIT.name}
    name_width = min(max(map(len, shown), default=0), width // 3)
    for place, row in enumerate(rows.tolist()):
        split = SPLITS[int(found[SPLIT.name][place])]
        lines += ["", f"row {row}, {split}"] if place else [f"row {row}, {split}"]
        for name, values in shown.items():
            lines += textwrap.wrap(
                f"{name:<{name_width}}  {value_text(manifest.field(name), values[place])}",
                max(width, 40),
                initial_indent="  ",
                subsequent_indent=" " * (name_width + 4),
                break_on_hyphens=False,
            )
    return lines


def value_text(field: Field, value: Any) -> str:
    """One row's value: numbers and short arrays in full, else shape, range and mean."""
    array = np.asarray(value)
    unit = "" if field.unit in ("", "1") else f" {_clean(field.unit)}"
    count = "" if field.axis is None else f"{len(array)} {field.axis} entries"
    if array.ndim == 0:
        return _element(array.item()) + unit
    if array.size == 0:
        return count
    if array.size <= _FEW:
        return f"{count}{': ' if count else ''}{_nested(array.tolist())}{unit}"
    what = f"{count} of {_type(field)}" if count else _type(field)
    if not field.numeric:
        return f"{what}, first {_element(array.reshape(-1)[0])}"
    low, high, mean = array.min(), array.max(), array.mean(dtype=np.float64)
    return f"{what}, {_number(low)} to {_number(high)}, mean {_number(mean)}{unit}"


def _nested(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_nested, value)) + "]"
    return _element(value)


def _element(value: Any) -> str:
    if isinstance(value, bytes):
        return repr(value.decode(errors="backslashreplace"))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> str:
    return f"{value:.4g}"


def _decoded(manifest: Manifest, field: Field) -> int:
    return sum(shard.arrays[field.name].length for shard in manifest.shards) * field.entry_bytes


def _block_text(count: int) -> str:
    return f"{count >> 20} MiB" if count % 2**20 == 0 else f"{count / 1024:g} KiB"


def _type(field: Field) -> str:
    name = f"text of {field.numpy.itemsize} bytes" if not field.numeric else field.dtype
    return name + (f"[{'x'.join(map(str, field.shape))}]" if field.shape else "")


def _clean(text: str) -> str:
    """No control characters: a manifest may come from anywhere."""
    return "".join(c if c.isprintable() else " " for c in text)
