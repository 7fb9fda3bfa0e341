import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.data.build import Alone, build
from dmi_hpc.data.loader import Loader
from dmi_hpc.data.manifest import BuildPlan, Field, SplitRule
from dmi_hpc.data.shards import ShardSet

ROWS = 103


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    plan = BuildPlan(
        task="toy",
        rows=ROWS,
        rows_per_shard=40,
        fields=(Field(name="x", dtype="float32", shape=(2,), unit="1", description="row number"),),
        split_rule=SplitRule(seed=0, validation=0.2, test=0.1, key="row number"),
        seed=0,
    )
    folder = tmp_path_factory.mktemp("set") / "data"
    build(folder, plan, lambda i: {"x": np.stack([i, -i], 1).astype("f4")}, Alone(), 1, len_of)
    with ShardSet.open(folder) as opened:
        yield opened


def len_of(rows):
    assert rows <= ROWS


def make_loader(shards, rank=0, size=1, batch_size=16, shuffle=True):
    rows = shards.rows("train")
    options = {"batch_size": batch_size, "seed": 3, "rank": rank, "size": size, "shuffle": shuffle}
    return Loader(shards, rows, ("x",), **options)


def sequence(shards, size, epoch=0, **options):
    """Rows of each step over all ranks, padding left out."""
    ranks = [list(make_loader(shards, r, size, **options).epoch(epoch)) for r in range(size)]
    return [
        np.concatenate([b.rows[b.weights == 1] for b in step]).tolist()
        for step in zip(*ranks, strict=True)
    ]


@given(size=st.integers(2, 5), batch_size=st.integers(1, 40), shuffle=st.booleans())
@settings(deadline=None, max_examples=25)
def test_any_number_of_ranks_sees_the_same_sequence(shards, size, batch_size, shuffle):
    options = {"batch_size": batch_size, "shuffle": shuffle}
    assert sequence(shards, size, **options) == sequence(shards, 1, **options)


def test_an_epoch_is_every_row_once_in_new_order(shards):
    train = shards.rows("train").tolist()
    first, second = (np.concatenate(sequence(shards, 1, epoch=e)).tolist() for e in (0, 1))
    assert sorted(first) == sorted(second) == train
    assert first != second
    assert np.concatenate(sequence(shards, 1, shuffle=False)).tolist() == train


def test_resume_from_a_step_is_the_rest_of_the_epoch(shards):
    loader = make_loader(shards, rank=1, size=2)
    whole, rest = list(loader.epoch(4)), list(loader.epoch(4, 2))
    assert [b.step for b in rest] == [b.step for b in whole[2:]]
    for a, b in zip(whole[2:], rest, strict=True):
        assert np.array_equal(a.rows, b.rows)
        assert np.array_equal(a.fields["x"], b.fields["x"])


def test_batches_hold_what_they_say(shards):
    loader = make_loader(shards)
    batches = list(loader.epoch(0))
    assert len(batches) == loader.steps_per_epoch
    for batch in batches:  # a later batch has not overwritten an earlier one
        assert np.array_equal(batch.fields["x"][:, 0], batch.rows)
    positions = np.concatenate([b.positions for b in batches])
    assert np.array_equal(positions, np.arange(len(loader.rows)))
