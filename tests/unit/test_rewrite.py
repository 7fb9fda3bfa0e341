"""A rewritten set has the same rows: elsewhere, in other splits, smaller, never silently damaged."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_set import toy_set

from dmi_hpc.data.manifest import SPLITS, Compression, split_of
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.rewrite import ROW, Changes, group_keys, new_plan, rewrite
from dmi_hpc.errors import CorruptShardError, DataError

NAMES = ("x", "y", "formula", "z", "edge")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "set"
    toy_set(folder)
    return folder


def rewritten(source, target, **changes):
    with ShardSet.open(source) as shards:
        return rewrite(shards, target, Changes(**changes))


def rows_of(folder, split="all", names=NAMES):
    """Rows as comparable texts, in the order of the set."""
    with ShardSet.open(folder) as shards:
        rows = np.asarray(shards.rows(split))
        found = shards.fields(names, rows)
    return [
        "|".join(np.asarray(found[n][k]).tobytes().hex() for n in names) for k in range(len(rows))
    ]


def test_without_changes_rows_and_splits_stay(original, tmp_path):
    new = rewritten(original, tmp_path / "new")
    with ShardSet.open(original) as old:
        assert new.split_rows == old.manifest.split_rows
        assert new.statistics == old.manifest.statistics
        assert new.fields == old.manifest.fields
        assert new.plan.split_rule == old.manifest.plan.split_rule
        assert new.plan.provenance == {
            "origin": "test",
            "rewritten": [{"source": old.manifest.identity}],
        }
    assert rows_of(original) == rows_of(tmp_path / "new")


@given(
    shuffle=st.none() | st.integers(0, 3),
    codec=st.sampled_from([None, "zstd", "blosc2", "none"]),
    rows_per_shard=st.sampled_from([None, 1000, 61]),
    resplit=st.booleans(),
)
@settings(
    deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_row_is_lost_repeated_or_changed(
    original, tmp_path, shuffle, codec, rows_per_shard, resplit
):
    target = tmp_path / "new"
    shutil.rmtree(target, ignore_errors=True)
    new = rewritten(
        original,
        target,
        shuffle_seed=shuffle,
        compression=Compression(codec=codec) if codec in ("zstd", "blosc2") else codec,
        rows_per_shard=rows_per_shard,
        validation=0.3 if resplit else None,
        test=0.3 if resplit else None,
    )
    assert sorted(rows_of(target)) == sorted(rows_of(original))
    assert new.shards[0].rows == min(300, rows_per_shard or 70)
    if not resplit:
        for split in SPLITS:
            assert sorted(rows_of(target, split)) == sorted(rows_of(original, split))


def test_a_shuffle_mixes_rows_and_depends_on_its_seed(original, tmp_path):
    orders = []
    for seed in (0, 1):
        new = rewritten(original, tmp_path / str(seed), shuffle_seed=seed)
        assert new.plan.shuffled
        assert new.plan.provenance["rewritten"][0]["shuffle_seed"] == seed
        orders.append(rows_of(tmp_path / str(seed), "train"))
    assert orders[0] != orders[1] != rows_of(original, "train")
    assert sorted(orders[0]) == sorted(orders[1])


def test_groups_are_never_torn_apart(original, tmp_path):
    new = rewritten(
        original, tmp_path / "new", validation=0.3, test=0.3, group="formula", split_seed=4
    )
    found = {split: set(rows_of(tmp_path / "new", split, ("formula",))) for split in SPLITS}
    assert sum(map(len, found.values())) == 7
    assert len(set().union(*found.values())) == 7
    rule = new.plan.split_rule
    assert (rule.seed, rule.validation, rule.test) == (4, 0.3, 0.3)
    assert rule.key == "value of field formula"
    with ShardSet.open(tmp_path / "new") as shards:
        texts = shards.gather("formula", shards.rows("test"))
        assert {split_of(4, text.decode(), 0.3, 0.3) for text in texts} == {2}


def test_rows_split_one_by_one_follow_the_rule(original, tmp_path):
    rewritten(
        original, tmp_path / "new", validation=0.2, test=0.2, split_seed=3, rows_per_shard=300
    )
    splits = [split_of(3, str(i), 0.2, 0.2) for i in range(300)]
    everything = rows_of(original)
    for index, split in enumerate(SPLITS):
        wanted = [row for row, s in zip(everything, splits, strict=True) if s == index]
        assert rows_of(tmp_path / "new", split) == wanted


def test_groups_of_the_source_are_not_torn_apart_by_oversight(tmp_path):
    toy_set(tmp_path / "set", rows=30, key="reduced formula")
    with pytest.raises(
        DataError, match=r"'reduced formula'.*--group FIELD.*--group \"row number\""
    ):
        rewritten(tmp_path / "set", tmp_path / "new", validation=0.2, test=0.2)
    new = rewritten(tmp_path / "set", tmp_path / "new", validation=0.2, test=0.2, group=ROW)
    assert new.plan.split_rule.key == "row number"


def test_history_is_kept(original, tmp_path):
    first = rewritten(original, tmp_path / "one", shuffle_seed=1)
    second = rewritten(tmp_path / "one", tmp_path / "two", validation=0.5, test=0.0)
    history = second.plan.provenance["rewritten"]
    assert [step.get("shuffle_seed") for step in history] == [1, None]
    assert history[1] == {"source": first.identity, "validation": 0.5, "test": 0.0}


def test_processes_give_the_same_bytes(original, tmp_path):
    options = Changes(shuffle_seed=2, compression=Compression(codec="zstd"), rows_per_shard=100)
    counts = []
    with ShardSet.open(original) as shards:
        one = rewrite(shards, tmp_path / "one", options)
        two = rewrite(shards, tmp_path / "two", options, processes=2, progress=counts.append)
    assert one.identity == two.identity
    assert sum(counts) == 300


def test_a_damaged_source_is_not_copied(original, tmp_path):
    source = Path(shutil.copytree(original, tmp_path / "set"))
    with ShardSet.open(source, verify="none") as shards:
        shard = shards.manifest.shards[1]
        with (source / shard.file).open("rb+") as stream:
            stream.seek(shard.arrays["y"].offset + 8)
            stream.write(b"\x01")
        with pytest.raises(CorruptShardError, match=r"field 'y', block 0"):
            rewrite(shards, tmp_path / "new", Changes())
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_targets_that_are_refused(original, tmp_path):
    with pytest.raises(DataError, match="its own folder"):
        rewritten(original, original.parent / "other" / ".." / "set")
    toy_set(tmp_path / "other", rows=20)
    with pytest.raises(DataError, match="holds another data set"):
        rewritten(original, tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"validation": 0.1}, "both shares"),
        ({"group": "formula"}, "both shares"),
        ({"validation": 0.6, "test": 0.6}, "at most 1 together"),
        ({"validation": -0.1, "test": 0.6}, "at least 0"),
        ({"validation": 0.1, "test": 0.1, "group": "z"}, "'z' is ragged"),
        ({"validation": 0.1, "test": 0.1, "group": "q"}, "no field 'q'; found x, y"),
    ],
)
def test_options_that_are_refused(original, changes, said):
    with ShardSet.open(original) as shards, pytest.raises(DataError, match=said):
        new_plan(shards.manifest, Changes(**changes))


def test_keys_of_groups():
    assert group_keys(np.array([b"NaCl", b"\xff"])) == ["NaCl", "\\xff"]
    assert group_keys(np.array([3, -4], dtype=np.int8)) == ["3", "-4"]
    positive, negative, other = group_keys(np.array([[0.0, 1], [-0.0, 1], [0.5, 1]]))
    assert positive == negative != other
