import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.data.sampler import Batches, Order, rank_slice

SEEDS = st.integers(0, 2**32)


@given(seed=SEEDS, epoch=st.integers(0, 1000), rows=st.integers(1, 3000))
@settings(deadline=None, max_examples=80)
def test_an_order_is_a_permutation(seed, epoch, rows):
    index = Order(seed, rows).index(epoch, np.arange(rows))
    assert index.dtype == np.int64
    assert np.array_equal(np.sort(index), np.arange(rows))


@given(seed=SEEDS, rows=st.integers(1, 10**15), data=st.data())
@settings(deadline=None, max_examples=100)
def test_each_position_stands_alone(seed, rows, data):
    """A part of the positions finds the same rows: no rank needs the others' order."""
    positions = np.array(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20)))
    whole = Order(seed, rows).index(3, positions)
    assert ((whole >= 0) & (whole < rows)).all()
    alone = [
        int(Order(seed, rows).index(3, positions[k : k + 1])[0]) for k in range(len(positions))
    ]
    assert whole.tolist() == alone


def test_epochs_and_seeds_differ():
    positions = np.arange(1000)
    first = Order(0, 1000).index(0, positions)
    for other in (Order(0, 1000).index(1, positions), Order(1, 1000).index(0, positions)):
        assert (first == other).mean() < 0.02
    assert np.array_equal(first, Order(0, 1000).index(0, positions))


@pytest.mark.parametrize("rows", [5, 10, 60])
def test_every_row_comes_everywhere_equally_often(rows):
    epochs = 2000
    order = Order(11, rows)
    places = np.stack([order.index(e, np.arange(rows)) for e in range(epochs)])
    counts = np.stack([np.bincount(places[:, p], minlength=rows) for p in range(rows)])
    expected = epochs / rows
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (rows - 1) ** 2
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5


def test_neighbours_are_not_correlated():
    index = Order(5, 10_000).index(0, np.arange(10_000)).astype(float)
    assert abs(np.corrcoef(index[:-1], index[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(index, np.arange(10_000))[0, 1]) < 0.04


@pytest.mark.parametrize("position", [-1, 7])
def test_a_position_outside_is_an_error(position):
    with pytest.raises(IndexError):
        Order(0, 7).index(0, np.array([0, position]))


@given(rows=st.integers(0, 500), batch=st.integers(1, 60))
@settings(deadline=None, max_examples=100)
def test_batches_cover_an_epoch_in_order(rows, batch):
    batches = Batches(rows, batch)
    parts = [batches.positions(step) for step in range(batches.steps_per_epoch)]
    joined = np.concatenate(parts) if parts else np.arange(0)
    assert np.array_equal(joined, np.arange(rows))
    assert all(len(part) == batch for part in parts[:-1])
    assert all(len(part) > 0 for part in parts)
    with pytest.raises(IndexError):
        batches.positions(batches.steps_per_epoch)


@given(first=st.integers(0, 10**12), n=st.integers(1, 200), size=st.integers(1, 17))
@settings(deadline=None, max_examples=100)
def test_slices_of_all_ranks_are_the_batch(first, n, size):
    batch = np.arange(first, first + n)
    slices = [rank_slice(batch, rank, size) for rank in range(size)]
    assert {(len(p), len(w)) for p, w in slices} == {(-(-n // size),) * 2}
    assert all(w.dtype == np.float32 and set(w) <= {0, 1} for _, w in slices)
    assert np.array_equal(np.concatenate([p[w == 1] for p, w in slices]), batch)
    assert all(np.isin(p, batch).all() for p, _ in slices)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_is_an_error(rank):
    with pytest.raises(IndexError):
        rank_slice(np.arange(4), rank, 2)
