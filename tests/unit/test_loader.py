"""The loader's promise: one sequence of global batches, whatever ranks, threads and resumes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_sets import NAMES, assert_same, make_set, numbers, pick

from dmi_hpc.data import BuildPlan, Field, Ragged, ShardSet, ShardWriter, SplitRule, buffers
from dmi_hpc.data import loader as loading
from dmi_hpc.data.access import order_of
from dmi_hpc.data.loader import Loader
from dmi_hpc.data.sampler import Order
from dmi_hpc.errors import DataError

ROWS = 103


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "data"
    make_set(folder, ROWS, 40)
    with ShardSet.open(folder) as opened:
        yield opened


@st.composite
def orders(draw, most=ROWS):
    """(Order, batch size): every shuffle, with parts that divide the batch."""
    parts = draw(st.sampled_from([1, 1, 2, 3]))
    batch_size = parts * draw(st.integers(1, 40 // parts))
    order = Order(
        seed=draw(st.integers(0, 3)),
        rows=draw(st.integers(0, most)),
        shuffle=draw(st.sampled_from(["none", "global", "block"])),
        block_rows=draw(st.integers(1, 20)),
        window_blocks=draw(st.integers(1, 4)),
        parts=parts,
        batch_size=batch_size,
    )
    return order, batch_size


def make_loader(shards, order, batch_size, fields=("n",), rows=None, prepare=None, **options):
    if rows is None:
        rows = np.arange(order.rows)[::-1]  # not in order of the set
    return Loader(
        shards,
        rows,
        fields,
        order,
        batch_size=batch_size,
        prepare=prepare or (lambda batch: batch),
        **options,
    )


def steps_of(shards, order, batch_size, size=1, start=0, epoch=2, **options):
    """Of each step: (rows of all ranks without padding, position after it)."""
    ranks = [
        list(
            make_loader(shards, order, batch_size, rank=rank, size=size, **options).epoch(
                epoch, start
            )
        )
        for rank in range(size)
    ]
    found = []
    for step in zip(*ranks, strict=True):
        assert len({(b.start, b.stop, len(b.rows)) for b in step}) == 1
        rows = np.concatenate([b.rows[b.weights == 1] for b in step])
        found.append((rows.tolist(), step[0].stop))
    return found


@given(orders(), st.integers(2, 5), st.integers(0, 3), st.sampled_from(["keep", "drop", "wrap"]))
@settings(deadline=None, max_examples=100)
def test_ranks_and_threads_do_not_change_the_sequence(shards, ordered, size, threads, tail):
    one = steps_of(shards, *ordered, threads=0, tail=tail)
    assert steps_of(shards, *ordered, size=size, threads=threads, tail=tail) == one


@given(orders(), st.sampled_from(["keep", "drop", "wrap"]), st.integers(0, 2))
@settings(deadline=None, max_examples=150)
def test_an_epoch_is_the_set_up_to_its_tail(shards, ordered, tail, threads):
    order, batch_size = ordered
    steps = [rows for rows, _ in steps_of(shards, *ordered, tail=tail, threads=threads)]
    found, whole = list(itertools.chain(*steps)), list(range(order.rows))
    if tail == "drop":
        assert [len(rows) for rows in steps] == [batch_size] * (order.rows // batch_size)
        assert len(set(found)) == len(found)
    else:
        assert sorted(found[: order.rows]) == whole
        if tail == "wrap":
            assert [len(rows) for rows in steps] == [batch_size] * -(-order.rows // batch_size)
            again = itertools.cycle(found[: order.rows])
            assert found[order.rows :] == [
                row for row, _ in zip(again, found[order.rows :], strict=False)
            ]
        else:
            assert len(found) == order.rows


segments = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 3), st.integers(1, 30), st.integers(1, 4)),
    min_size=1,
    max_size=5,
)


@given(orders(), segments)
@settings(deadline=None, max_examples=150)
def test_no_row_is_lost_or_repeated_when_ranks_and_batches_change_in_mid_epoch(
    shards, ordered, plan
):
    """Each segment: ranks, threads, batch size and how many steps until the next interruption."""
    order, first_size = ordered
    whole = np.concatenate([[], *(rows for rows, _ in steps_of(shards, *ordered))]).tolist()
    position, seen = 0, []
    for size, threads, batch_size, steps in [*plan, (1, 0, 7, ROWS)]:
        batch_size = batch_size if order.parts == 1 else first_size
        options = {"size": size, "threads": threads, "start": position}
        for rows, stop in steps_of(shards, order, batch_size, **options)[:steps]:
            seen += rows
            position = stop
    left = range(position, order.rows, first_size if order.parts > 1 else 7)
    assert len(left) == 0
    assert seen == whole
    assert sorted(seen) == list(range(order.rows))


def test_parts_keep_their_batch_size_in_mid_epoch(shards):
    order = Order(seed=0, rows=100, parts=2, batch_size=8)
    loader = make_loader(shards, order, 12)
    with pytest.raises(DataError, match="global batches of 8, which cannot become 12"):
        loader.continue_with(order, 16)
    loader.continue_with(order, 0)
    assert loader.order.batch_size == 12
    with pytest.raises(DataError, match="an order of 99 rows, found 100"):
        loader.continue_with(Order(seed=0, rows=99), 0)
    with pytest.raises(DataError, match="position 101 of an epoch of 100 rows"):
        loader.continue_with(Order(seed=0, rows=100), 101)


@pytest.mark.parametrize("backend", ["mmap", "pread", "ram"])
@pytest.mark.parametrize("threads", [0, 3])
def test_batches_hold_their_rows(shards, backend, threads):
    n = numbers(shards)
    made = {name: shards.gather(name, np.arange(ROWS)) for name in NAMES}
    order = Order(seed=1, rows=ROWS, shuffle="block", block_rows=6, window_blocks=3)
    with ShardSet.open(shards.path, backend=backend, arena_bytes=20_000) as mine:
        batches = list(
            make_loader(mine, order, 8, NAMES, rows=np.arange(ROWS), threads=threads).epoch(5)
        )
    for batch in batches:
        nodes = made["z"].lengths[batch.rows]
        base = np.concatenate([[0], np.cumsum(nodes)[:-1]])
        for name in NAMES:
            expected = pick(made[name], batch.rows)
            if name == "edge":
                shift = np.repeat(base, expected.lengths)[:, None]
                expected = Ragged(expected.values.astype(np.int64) + shift, expected.offsets)
            assert_same(batch.fields[name], expected)
        assert (n[batch.rows] == batch.fields["n"]).all()
    positions = np.concatenate([batch.positions for batch in batches])
    np.testing.assert_array_equal(positions, np.arange(ROWS))


def test_references_do_not_overflow(tmp_path):
    """Node numbers of a batch exceed what the 8 bits of a row's can count."""
    plan = BuildPlan(
        task="toy",
        rows_per_shard=100,
        fields=(
            Field(name="z", dtype="uint8", unit="", description="atom", axis="node"),
            Field(name="centre", dtype="int8", unit="", description="an atom", refers="node"),
            Field(name="pair", dtype="uint64", shape=(2,), unit="", description="", refers="node"),
        ),
        split_rule=SplitRule(seed=0, validation=0, test=0, key="row number"),
        seed=0,
    )
    rows = np.arange(100)
    with ShardWriter(tmp_path / "set", plan) as writer:
        z = Ragged.from_rows([np.full(20, k, np.uint8) for k in rows])
        pair = np.array([[0, 19]] * 100, dtype=np.uint64)
        writer.append({"z": z, "centre": np.full(100, 3, np.int8), "pair": pair})
    with ShardSet.open(tmp_path / "set") as shards:
        order = Order(seed=0, rows=100, shuffle="none")
        # the axis's own field is not asked for
        [batch] = make_loader(shards, order, 100, ("centre", "pair"), rows=rows).epoch(0)
    np.testing.assert_array_equal(batch.fields["centre"], 20 * rows + 3)
    np.testing.assert_array_equal(batch.fields["pair"][:, 1], 20 * rows + 19)
    assert {values.dtype for values in batch.fields.values()} == {np.dtype(np.int64)}


def test_random_bits_belong_to_the_place_in_the_epoch(shards):
    order = Order(seed=4, rows=ROWS)
    one = make_loader(shards, order, 16).epoch(3)
    whole = np.concatenate([batch.bits(7) for batch in one])
    two = [make_loader(shards, order, 5, rank=rank, size=2).epoch(3) for rank in (0, 1)]
    found = np.zeros(ROWS, dtype=np.uint64)
    for batch in itertools.chain(*two):
        found[batch.positions] = batch.bits(7)
    np.testing.assert_array_equal(found, whole)
    others = [
        loading.random_bits(4, 3, np.arange(ROWS), 8),
        loading.random_bits(4, 4, np.arange(ROWS), 7),
        loading.random_bits(5, 3, np.arange(ROWS), 7),
    ]
    assert all((other != whole).all() for other in others)


# memory


def owners(loader):
    return {name: len(found) for name, found in loader._buffers._owners.items()}


HOLDS = {
    "batch": lambda fields: fields,
    "view": lambda fields: fields["image"][2:4, 1],
    "tensor": lambda fields: torch.from_numpy(fields["image"]),
    "slice of a tensor": lambda fields: torch.from_numpy(fields["image"])[1, :, ::2],
    "array of a tensor": lambda fields: torch.from_numpy(fields["image"]).reshape(-1).numpy()[5:9],
    "other dtype": lambda fields: fields["x"].view(np.uint8)[:1],
    "ragged": lambda fields: fields["pos"],
    "ragged row": lambda fields: fields["pos"][1],
    "memoryview": lambda fields: memoryview(fields["x"]),
}


def bytes_of(held):
    if isinstance(held, dict):
        return [bytes_of(value) for value in held.values()]
    return (held.values if isinstance(held, Ragged) else np.asarray(held)).tobytes()


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("threads", [0, 2])
def test_what_is_held_is_not_overwritten(shards, monkeypatch, hold, pin, threads):
    """pin: torch gives the memory; page-locked it would need a GPU, but it is held in the same way."""
    usual = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: usual(*a, **k))
    monkeypatch.setattr(loading, "_CHUNK_BYTES", 20_000)  # few batches a buffer
    order = Order(seed=0, rows=ROWS)
    options = {"rows": np.arange(ROWS), "pin": pin, "threads": threads}
    loader = make_loader(shards, order, 4, ("x", "image", "pos"), **options)
    held, copies = [], []
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            held.append(HOLDS[hold](batch.fields))
            copies.append(bytes_of(held[-1]))
            del batch
    assert [bytes_of(each) for each in held] == copies


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_memory_is_used_again(shards, monkeypatch, threads):
    monkeypatch.setattr(loading, "_CHUNK_BYTES", 4000)
    made = []
    usual = buffers.Buffers._new
    monkeypatch.setattr(
        buffers.Buffers, "_new", lambda self, size: made.append(size) or usual(self, size)
    )
    loader = make_loader(shards, Order(seed=0, rows=ROWS), 4, ("x", "image"), threads=threads)
    bound = 2 * threads + 4  # waiting, being read, in the caller's hands
    for epoch in range(8):
        for _ in loader.epoch(epoch):
            pass
        assert max(owners(loader).values()) <= bound
    assert len(made) <= 2 * bound + 4  # the first chunks are smaller
    everything = list(loader.epoch(0))
    assert max(owners(loader).values()) > bound
    del everything
    list(itertools.islice(loader.epoch(0), 3))
    assert max(owners(loader).values()) <= bound + 3  # what was held together is given back


# cost


def noting(fetch, read):
    """fetch, and the numbers of the blocks that it was asked for."""

    def noted(block, out):
        read.append(block)
        fetch(block, out)

    return noted


def test_ranks_read_parts_of_a_set_that_is_read_in_blocks(tmp_path):
    """Not every rank the whole set: it lies on storage that all nodes share."""
    plan = BuildPlan(
        task="toy",
        fields=(Field(name="x", dtype="float64", unit="1", description=""),),
        split_rule=SplitRule(seed=0, validation=0, test=0, key="row number"),
        seed=0,
        rows_per_shard=16_384,
        block_bytes=4096,
    )
    with ShardWriter(tmp_path, plan) as writer:
        writer.append({"x": np.arange(32_768.0)})
    read, size = [], 4
    for rank in range(size):
        with ShardSet.open(tmp_path, backend="pread", verify="none") as shards:
            order = order_of(shards, ("x",), 32_768, batch_size=64, seed=0)
            assert (order.shuffle, order.parts) == ("block", 64)
            source = shards._source(shards.manifest.field("x"))
            source._fetch = noting(source._fetch, read)
            loader = make_loader(
                shards, order, 64, ("x",), rows=shards.rows("train"), rank=rank, size=size
            )
            for _ in loader.epoch(0):
                pass
    assert len(read) <= 64 * 1.2
    assert set(read) == set(range(64))


def test_a_slow_or_growing_transform_is_not_run_far_ahead(shards, monkeypatch):
    """Batches of few bytes may become large, and the loop waits for the first of a chunk."""
    monkeypatch.setattr(loading, "_CHUNK_S", -1.0)
    made = []
    order = Order(0, ROWS)
    loader = make_loader(shards, order, 1, threads=1, prepare=lambda batch: made.append(batch.stop))
    steps = loader.epoch(0)
    next(steps)
    assert len(made) <= 12
    steps.close()
    assert len(made) < ROWS
