import json
import math
import sys
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import toy_build as toy
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dmi_hpc.data.manifest import (
    PAGE,
    BuildPlan,
    Compression,
    Field,
    SplitRule,
    read_manifest,
    require_identity,
    sealed,
    split_of,
    write_manifest,
)
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.writer import ShardWriter
from dmi_hpc.errors import DataError, FormatVersionError


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(folder of a set, its manifest as JSON)."""
    folder = tmp_path_factory.mktemp("real")
    toy.write_set(folder, rows=50, rows_per_shard=20)
    return folder, json.loads((folder / "manifest.json").read_text())


def reading(folder, raw):
    """The manifest of this JSON, its checksum made good, beside the shards of another."""
    text = (
        raw if isinstance(raw, str) else json.dumps(sealed(raw) if isinstance(raw, dict) else raw)
    )
    (folder / "manifest.json").write_text(text)
    return read_manifest(folder)


def at(raw, path):
    for key in path:
        raw = raw[key]
    return raw


def changed(raw, path, value):
    copy = json.loads(json.dumps(raw))
    at(copy, path[:-1])[path[-1]] = value
    return copy


def test_a_digit_changed_in_the_manifest_is_found(real, tmp_path):
    """Also where nothing else depends on it: in the statistics."""
    text = json.dumps(real[1])
    place = text.index('"mean": ') + len('"mean": ') + 1
    other = "1" if text[place] != "1" else "2"
    with pytest.raises(DataError, match=r"manifest\.json: expected checksum.*found"):
        reading(tmp_path, text[:place] + other + text[place + 1 :])


def test_round_trip(real, tmp_path):
    manifest = read_manifest(real[0])
    write_manifest(tmp_path, manifest)
    again = read_manifest(tmp_path)
    assert again == manifest
    assert again.identity == manifest.identity
    assert again.fields[-1].name == "split"
    assert again.plan.axes == ("node", "edge")


def test_missing_manifest_says_what_to_do(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"manifest\.json.*dmi data build"):
            read_manifest(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="no complete data set"):
        read_manifest(tmp_path / "file")


def test_a_folder_as_manifest_is_an_error(tmp_path):
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(("version", "todo"), [(3, "Update"), (1, "Build"), (0, "Build")])
def test_another_version_is_told_from_a_damaged_manifest(real, tmp_path, version, todo):
    with pytest.raises(FormatVersionError, match=rf"version {version} of.*version 2\. {todo}.*new"):
        reading(tmp_path, real[1] | {"version": version, "a_new_key": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"format": "other"}, "dmi-shards"),
        ({"version": "2"}, "version"),
        ({"version": None}, "version"),
        ({"rows": 5}, "do not sum to 5"),
        ({"split_rows": {"train": 1}}, "the shards say"),
        ({"shards": []}, "shards"),
        ({"statistics": None}, "statistics"),
    ],
)
def test_wrong_manifest_names_the_key(real, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        reading(tmp_path, real[1] | changes)


SHARD = ("shards", 1)
X, AXIS = (*SHARD, "arrays", "x"), (*SHARD, "arrays", "_axes.node")
HOSTILE = {
    "path outside": ((*SHARD, "file"), "../other/shard-00000.h5"),
    "absolute path": ((*SHARD, "file"), "/etc/passwd"),
    "hidden file": ((*SHARD, "file"), ".tmp-a.h5"),
    "nul in a path": ((*SHARD, "file"), "shard\0.h5"),
    "newline after a name": ((*SHARD, "file"), "shard-00001.h5\n"),
    "empty path": ((*SHARD, "file"), ""),
    "long path": ((*SHARD, "file"), "a" * 5000),
    "one file twice": ((*SHARD, "file"), "shard-00000.h5"),
    "field of a path": (("plan", "fields", 0, "name"), "../x"),
    "field in a group": (("plan", "fields", 0, "name"), "_axes/node"),
    "field twice": (("plan", "fields", 0, "name"), "n"),
    "huge shape": (("plan", "fields", 0, "shape"), [2**31, 2**31]),
    "endless shape": (("plan", "fields", 0, "shape"), [1] * 10_000),
    "negative shape": (("plan", "fields", 0, "shape"), [-3]),
    "zero shape": (("plan", "fields", 0, "shape"), [0]),
    "object type": (("plan", "fields", 0, "dtype"), "object"),
    "type that numpy parses": (("plan", "fields", 0, "dtype"), "(2,,)f4"),
    "type that numpy counts": (("plan", "fields", 0, "dtype"), "9" * 5000),
    "huge string": (("plan", "fields", 2, "dtype"), "S9999999"),
    "wider type": (("plan", "fields", 0, "dtype"), f"S{2**20}"),
    "axis of nothing": (("plan", "fields", 5, "refers"), "bond"),
    "huge length": ((*X, "length"), 2**61),
    "length over int64": ((*X, "length"), 2**64),
    "negative length": ((*X, "length"), -1),
    "negative offset": ((*X, "offset"), -4096),
    "unaligned offset": ((*X, "offset"), PAGE + 1),
    "offset past the end": ((*X, "offset"), PAGE * 10**6),
    "offset over int64": ((*X, "offset"), 10**40),
    "negative block table": ((*X, "blocks"), -24),
    "block table past the end": ((*X, "blocks"), 10**9),
    "offsets past the end": ((*AXIS, "length"), 10**15),
    "entries of an axis differ": ((*SHARD, "arrays", "z", "length"), 10**9),
    "no array": ((*SHARD, "arrays"), {}),
    "huge number of rows": ((*SHARD, "rows"), 10**18),
    "negative rows": ((*SHARD, "rows"), -20),
    "negative split": ((*SHARD, "split_rows"), [40, -10, -10]),
    "file over int64": ((*SHARD, "bytes"), 10**30),
    "no checksum": ((*SHARD, "xxh3"), ""),
    "blocks of nothing": (("plan", "block_bytes"), 0),
    "huge blocks": (("plan", "block_bytes"), 2**62),
    "shares that are no numbers": (("plan", "split_rule", "test"), float("nan")),
    "seed of many digits": (("plan", "seed"), 10**4000),
    "provenance that is no number": (("plan", "provenance"), {"a": [float("inf")]}),
    "text that is no Unicode": (("plan", "provenance"), {"a": "\ud800"}),
    "name that is no Unicode": (("plan", "task"), "\udfff"),
    "mean that is no number": (("statistics", "x", "mean"), float("nan")),
    "histogram without end": (("statistics", "x", "histogram", "counts"), [1] * 10_000),
    "histogram of giants": (("statistics", "x", "histogram", "first"), 10**400),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused(real, tmp_path, name):
    raw = changed(real[1], *HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"manifest\.json: "):
            reading(tmp_path, raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "[" * 100_000,
        '{"format": "dmi-shards", "version": ' + "9" * 5000 + "}",
        '{"format": "dmi-shards"',
        '{"format": "dmi-shards", "version": 2, "plan": ' + '{"a":' * 900 + "1" + "}" * 901,
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path, text):
    with pytest.raises(DataError, match=r"manifest\.json: "):
        reading(tmp_path, text)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b'{"format": "\xff\xfe"}')
    with pytest.raises(DataError, match="not valid JSON"):
        read_manifest(tmp_path)


def test_a_manifest_cut_anywhere_is_refused(real, tmp_path):
    text = json.dumps(real[1])
    for size in range(0, len(text), 97):
        with pytest.raises(DataError, match="not valid JSON"):
            reading(tmp_path, text[:size])


def places(raw, path=()):
    """Paths of all values in a JSON tree."""
    keys = raw if isinstance(raw, dict) else range(len(raw)) if isinstance(raw, list) else ()
    for key in keys:
        yield (*path, key)
        yield from places(raw[key], (*path, key))


VALUES = st.one_of(
    st.integers(-5, 5000),
    st.integers(-(2**70), 2**70),
    st.sampled_from([10**1000, -1, 0, 2**31, 2**32, 2**63, 2**63 - 1, 2**64, PAGE, 3 * PAGE]),
    st.floats(),
    st.none(),
    st.booleans(),
    st.text(max_size=8),
    st.sampled_from(["..", "../a", "/", "a/b", "\0", "split", "manifest.json", "x", "node", "S5"]),
    st.sampled_from(["float64", "int8", "<f4", "f4,f4", "(3)f4", "V8", "O", "train", "zstd"]),
    st.lists(st.integers(-2, 2**40), max_size=20),
    st.recursive(
        st.just({}), lambda inner: st.dictionaries(st.text(max_size=2), inner), max_leaves=9
    ),
    st.integers(1, 600).map(lambda depth: json.loads('{"a":' * depth + "1" + "}" * depth)),
)


@st.composite
def mutations(draw, raw):
    """The JSON with one to three things changed, removed, added, doubled or exchanged."""
    copy = json.loads(json.dumps(raw))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(places(copy))))
        owner, key = at(copy, path[:-1]), path[-1]
        action = draw(st.sampled_from(["set", "set", "set", "drop", "add", "double", "swap"]))
        if action == "set":
            owner[key] = draw(VALUES)
        elif action == "drop":
            del owner[key]
        elif action == "add" and isinstance(owner, dict):
            owner[draw(st.text(max_size=5))] = draw(VALUES)
        elif action == "double" and isinstance(owner, list):
            owner.insert(key, owner[key])
        elif action == "swap":
            other = draw(st.sampled_from(list(places(copy))))
            value = json.loads(json.dumps(at(copy, other)))
            at(copy, path[:-1])[key] = value
    return copy


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_fuzzed_manifest_is_refused_or_read_as_it_is(real, tmp_path_factory, data):
    folder, raw = real[0], data.draw(mutations(real[1]))
    away = tmp_path_factory.mktemp("fuzz")
    for path in folder.glob("*.h5"):
        (away / path.name).symlink_to(path)
    try:
        manifest = reading(away, raw)
    except DataError as error:
        assert len(str(error)) < 20_000
        return
    write_manifest(away, manifest)
    assert read_manifest(away) == manifest
    assert len(manifest.identity) == 32
    for statistics in manifest.statistics.values():
        assert len(statistics.histogram.edges) == len(statistics.histogram.counts) + 1
    try:
        with ShardSet.open(away, backend="mmap") as shards:
            found = toy.stored_rows(shards, toy.NAMES)
    except DataError:
        return
    # edits that pass touch no plan and no array: statistics, what made the set
    assert manifest.plan == read_manifest(folder).plan
    for name, values in toy.make_rows(range(50)).items():
        assert toy.equal(found[name], values)


@pytest.mark.parametrize("dtype", ["object", "complex64", "longdouble", "U4", "S0", "nonsense"])
def test_types_that_hdf5_tools_cannot_map_are_refused(dtype):
    with pytest.raises(ValidationError, match=r"S<bytes>, found"):
        Field(name="x", dtype=dtype, unit="", description="")


@pytest.mark.parametrize(
    ("given_", "stored"),
    [("f4", "float32"), (">f8", "float64"), ("uint8", "uint8"), ("S12", "S12"), ("<i2", "int16")],
)
def test_numpy_s_names_of_types(given_, stored):
    field = Field(name="x", dtype=given_, unit="", description="")
    assert field.dtype == stored
    assert field.numpy == np.dtype(stored).newbyteorder("<")


@pytest.mark.parametrize("key", ["unit", "description"])
@pytest.mark.parametrize(
    ("text", "message"), [("a" * 4097, "at most 4096"), ("\ud800", "surrog|Unicode|unicode")]
)
def test_texts_that_hdf5_cannot_store_are_refused(key, text, message):
    with pytest.raises(ValidationError, match=message):
        Field(**{"name": "x", "dtype": "int8", "unit": "", "description": "", key: text})


def test_the_longest_texts_are_stored(tmp_path):
    longest = "\U0001f600" * 4096
    field = Field(name="x", dtype="int8", unit=longest, description=longest, axis="a" * 64)
    plan = toy.make_plan(None, fields=(field,))
    with ShardWriter(tmp_path, plan) as writer:
        writer.append({"x": Ragged(np.zeros(3, np.int8), np.array([0, 1, 3]))})
    with ShardSet.open(tmp_path) as shards:
        assert shards.manifest.plan.fields[0] == field


def test_references_are_integers():
    with pytest.raises(ValidationError, match="refers needs an integer"):
        Field(name="x", dtype="f4", unit="", description="", axis="e", refers="n")


def test_shares_over_one_are_refused():
    with pytest.raises(ValidationError, match="at most 1"):
        SplitRule(seed=0, validation=0.6, test=0.5, key="")


def test_levels_are_those_of_the_codec():
    assert Compression(codec="zstd", level=22).level == 22
    with pytest.raises(ValidationError, match="levels 1 to 9"):
        Compression(codec="blosc2", level=10)


def test_the_split_field_is_reserved():
    mine = Field(name="split", dtype="float32", unit="", description="mine")
    with pytest.raises(ValidationError, match="reserved"):
        toy.make_plan(fields=(mine,))


def test_a_field_that_is_not_there_lists_those_that_are(real):
    with pytest.raises(DataError, match=r"no field 'nothing'; found x, n, text"):
        read_manifest(real[0]).field("nothing")


def test_the_fingerprint_is_of_everything_in_the_plan():
    plan = toy.make_plan()
    again = BuildPlan.model_validate_json(plan.model_dump_json())
    assert again.fingerprint() == plan.fingerprint()
    changes = {
        "task": "other",
        "rows": 99,
        "rows_per_shard": 18,
        "fields": plan.fields[:2],
        "split_rule": plan.split_rule.model_copy(update={"key": "other"}),
        "seed": 1,
        "shuffled": True,
        "block_bytes": 8192,
        "compression": Compression(codec="zstd"),
        "provenance": {"options": {"a": 0.2}},
    }
    assert set(changes) == set(BuildPlan.model_fields)
    prints = {plan.model_copy(update={k: v}).fingerprint() for k, v in changes.items()}
    assert len(prints | {plan.fingerprint()}) == len(changes) + 1


def test_identity_is_of_plan_and_data_only(real):
    manifest = read_manifest(real[0])
    elsewhere = manifest.model_copy(update={"made_with": {"command": "another"}})
    assert elsewhere.identity == manifest.identity
    first = manifest.shards[0].model_copy(update={"xxh3": "0" * 16})
    other = manifest.model_copy(update={"shards": (first, *manifest.shards[1:])})
    assert other.identity != manifest.identity
    plan = manifest.plan.model_copy(update={"seed": 1})
    assert manifest.model_copy(update={"plan": plan}).identity != manifest.identity
    swapped = manifest.model_copy(update={"shards": manifest.shards[::-1]})
    assert swapped.identity != manifest.identity


def test_another_identity_is_refused():
    require_identity("", "b", maker="m")
    require_identity("a", "a", maker="m")
    with pytest.raises(DataError, match=r"run\.json: made from data set a, found data set b"):
        require_identity("a", "b", maker="run.json")


def test_split_is_a_stable_published_function():
    # fixed by the format: a reimplementation must find the same
    splits = [split_of(7, str(i), 0.3, 0.3) for i in range(12)]
    assert splits == [0, 2, 1, 0, 2, 1, 1, 1, 2, 2, 0, 0]


@given(seed=st.integers(0, 2**64 - 1), key=st.text())
@settings(deadline=None, max_examples=100)
def test_a_larger_test_share_only_adds_to_the_test_split(seed, key):
    assert split_of(seed, key, 0, 0) == 0
    assert split_of(seed, key, 1, 0) == 1
    assert split_of(seed, key, 0, 1) == 2
    if split_of(seed, key, 0.1, 0.1) == 2:
        assert split_of(seed, key, 0.1, 0.4) == 2


def test_shares_are_kept():
    counts = Counter(split_of(3, str(i), 0.15, 0.25) for i in range(20_000))
    assert counts[1] / 20_000 == pytest.approx(0.15, abs=0.01)
    assert counts[2] / 20_000 == pytest.approx(0.25, abs=0.01)


def test_manifest_of_every_limit_is_read(real, tmp_path):
    """What is refused is what cannot be: the largest that can is accepted."""
    assert sys.float_info.max_exp == 1024
    raw = changed(real[1], ("statistics", "x", "max"), sys.float_info.max)
    assert reading(tmp_path, raw).statistics["x"].max == sys.float_info.max
    assert math.isfinite(reading(tmp_path, raw).statistics["x"].mean)
