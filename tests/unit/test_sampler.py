import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.data.permutation import Permutation, round_keys
from dmi_hpc.data.sampler import Batches, Order, rank_slice
from dmi_hpc.errors import DataError

SEEDS = st.integers(0, 2**40)
SMALL = settings(deadline=None, max_examples=80)
ROWS = st.integers(1, 1500)
SHUFFLES = st.sampled_from(["none", "global", "block"])
GOLDEN = {
    "global": [63080, 136421, 393926, 360106],
    "wide": [9943850553, 397234406, 6751397104, 5637269576],
    "block": [63360, 914502, 760656, 646971],
}


@st.composite
def orders(draw, rows=ROWS, shuffle=SHUFFLES):
    parts = draw(st.integers(1, 7))
    return Order(
        draw(SEEDS),
        draw(rows),
        draw(shuffle),
        block_rows=draw(st.integers(1, 60)),
        window_blocks=draw(st.integers(1, 8)),
        parts=parts,
        batch_size=parts * draw(st.integers(1, 12)),
    )


def excess(counts, expected, freedom):
    """Chi-square in standard deviations above its expectation."""
    return (((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5


# Permutation


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 255, 256, 257, 3599, 4**6, 4**6 + 1, 70_001])
def test_a_permutation_is_a_bijection(rows):
    index = Permutation(round_keys(1, rows), rows).index(np.arange(rows))
    assert index.dtype == np.int64
    assert np.array_equal(np.sort(index), np.arange(rows))


@pytest.mark.parametrize("rows", [2**31 - 1, 2**31, 2**32, 2**32 + 1, 10**15, 2**62])
def test_a_large_permutation_stays_inside_and_never_collides(rows):
    values = np.concatenate([np.arange(3000), np.arange(rows - 3000, rows)])
    index = Permutation(round_keys(5), rows).index(values)
    assert index.min() >= 0 and index.max() < rows
    assert len(np.unique(index)) == len(values)
    assert abs(index.astype(float).mean() / rows - 0.5) < 0.025


@given(seed=SEEDS, sizes=st.lists(st.integers(1, 90), min_size=1, max_size=6))
@SMALL
def test_members_of_different_sizes_are_each_the_same_alone(seed, sizes):
    keys, sizes = round_keys(seed), np.array(sizes)
    names = np.arange(len(sizes)) + 5
    member = np.repeat(np.arange(len(sizes)), sizes)
    values = np.concatenate([np.arange(size) for size in sizes])
    together = Permutation(keys, 90, sizes, names).index(values, member)
    for k, size in enumerate(sizes):
        alone = Permutation(keys, 90, sizes[k : k + 1], names[k : k + 1]).index(np.arange(size))
        assert np.array_equal(np.sort(alone), np.arange(size))
        assert np.array_equal(together[member == k], alone)


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 8, 16, 31, 100, 256, 1000])
def test_any_two_rows_meet_in_any_two_places(rows):
    """Over many permutations the pair (row of place 0, row of place 1) is uniform."""
    members = 100_000
    names = np.arange(members)
    permutation = Permutation(round_keys(3, rows), rows, np.full(members, rows), names)
    first, second = (permutation.index(np.full(members, k), names) for k in (0, 1))
    assert excess(np.bincount(first, minlength=rows), members / rows, rows - 1) < 6
    coarse = min(rows, 100)
    apart = (second - first) % rows * coarse // rows
    assert (second != first).all()
    cells = np.bincount(np.arange(1, rows) * coarse // rows, minlength=coarse)
    expected = members * cells[cells > 0] / (rows - 1)
    found = np.bincount(apart, minlength=coarse)[cells > 0]
    assert excess(found, expected, max(len(expected) - 1, 1)) < 6


def test_results_do_not_change_from_version_to_version():
    """A saved training resumes with a newer version: these numbers are part of its state."""
    assert Order(7, 10**6).index(2, np.arange(4)).tolist() == GOLDEN["global"]
    assert Order(7, 10**10).index(2, np.arange(4)).tolist() == GOLDEN["wide"]
    order = Order(7, 10**6 + 1, "block", block_rows=300, parts=4, batch_size=8)
    assert order.index(2, np.arange(4) * 99_999).tolist() == GOLDEN["block"]


# Order


@given(order=orders(), epoch=st.integers(0, 1000))
@SMALL
def test_an_order_is_a_bijection(order, epoch):
    index = order.index(epoch, np.arange(order.rows))
    assert index.dtype == np.int64
    assert np.array_equal(np.sort(index), np.arange(order.rows))


@given(order=orders(), data=st.data())
@SMALL
def test_each_position_stands_alone(order, data):
    """Some of the positions, in any order, find the same rows: no rank needs the others' order."""
    whole = order.index(3, np.arange(order.rows))
    places = st.lists(st.integers(0, order.rows - 1), min_size=1, max_size=20)
    some = np.array(data.draw(places))
    assert np.array_equal(order.index(3, some), whole[some])
    assert order.index(3, some[:1]).tolist() == [whole[some[0]]]
    cut = data.draw(st.integers(0, order.rows))
    halves = order.index(3, np.arange(cut)), order.index(3, np.arange(cut, order.rows))
    assert np.array_equal(np.concatenate(halves), whole)


@given(order=orders(rows=st.integers(10**9, 10**12)), data=st.data())
@SMALL
def test_large_orders_stay_inside(order, data):
    places = st.lists(st.integers(0, order.rows - 1), min_size=1, max_size=9, unique=True)
    some = np.array(data.draw(places))
    index = order.index(1, some)
    assert index.min() >= 0 and index.max() < order.rows
    assert len(set(index.tolist())) == len(some)


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": "block", "block_rows": 9}, {"parts": 4, "batch_size": 8}]
)
def test_epochs_and_seeds_differ(options):
    positions = np.arange(1000)
    first = Order(0, 1000, **options).index(0, positions)
    assert (first == positions).mean() < 0.02
    for seed, epoch in ((0, 1), (1, 0), (2**32, 0)):
        assert (first == Order(seed, 1000, **options).index(epoch, positions)).mean() < 0.03
    assert np.array_equal(first, Order(0, 1000, **options).index(0, positions))


@pytest.mark.parametrize("rows", [3, 5, 10, 60])
@pytest.mark.parametrize("options", [{}, {"shuffle": "block", "block_rows": 1}])
def test_every_row_comes_everywhere_equally_often(rows, options):
    epochs = 600
    order = Order(11, rows, **options)
    places = np.stack([order.index(e, np.arange(rows)) for e in range(epochs)])
    counts = np.stack([np.bincount(places[:, p], minlength=rows) for p in range(rows)])
    assert excess(counts, epochs / rows, (rows - 1) ** 2) < 6


def test_ragged_blocks_come_everywhere():
    """Rows of a part's first, short block and of its last one are not tied to a window."""
    order = Order(5, 95, "block", block_rows=10, window_blocks=2, parts=2, batch_size=2)
    windows = {40: set(), 46: set(), 48: set(), 94: set()}  # part 0: rows 0-46, part 1: 47-94
    for epoch in range(100):
        inverse = np.argsort(order.index(epoch, np.arange(95)))
        for row in windows:
            windows[row].add(int(order.window_of(epoch, inverse[row : row + 1])[0]))
    assert windows == {40: {0, 1, 2}, 46: {0, 1, 2}, 48: {3, 4, 5}, 94: {3, 4, 5}}


@pytest.mark.parametrize(
    "options", [{}, {"parts": 4, "batch_size": 8}, {"shuffle": "block", "block_rows": 50}]
)
def test_neighbours_are_not_correlated(options):
    order = Order(5, 10_000, **options)
    share = order.batch_size // order.parts
    index = order.index(0, np.arange(10_000)).astype(float)
    mine = index[np.arange(10_000) % order.batch_size < share]  # of part 0
    for lag in (1, 2, 100):
        assert abs(np.corrcoef(mine[:-lag], mine[lag:])[0, 1]) < 0.1
    assert abs(np.corrcoef(mine, np.arange(len(mine)))[0, 1]) < 0.2


@pytest.mark.parametrize("position", [-1, 7])
def test_a_position_outside_is_an_error(position):
    with pytest.raises(IndexError):
        Order(0, 7).index(0, np.array([0, position]))


@pytest.mark.parametrize("shuffle", ["none", "global", "block"])
def test_an_empty_set_has_an_empty_order(shuffle):
    order = Order(0, 0, shuffle, block_rows=3)
    assert order.index(0, np.arange(0)).tolist() == []


@given(order=orders(shuffle=st.just("block")), epoch=st.integers(0, 50))
@SMALL
def test_windows_contain_the_rows_of_their_blocks_only(order, epoch):
    positions = np.arange(order.rows)
    rows, window = order.index(epoch, positions), order.window_of(epoch, positions)
    assert set(window.tolist()) == set(range(order.windows))
    for number in range(order.windows):
        blocks = order.blocks(epoch, number)
        assert blocks.dtype == np.int64
        assert 0 < len(blocks) <= order.window_blocks
        assert len(set(blocks.tolist())) == len(blocks)
        assert set(blocks.tolist()) == set((rows[window == number] // order.block_rows).tolist())
    with pytest.raises(IndexError):
        order.blocks(epoch, order.windows)
    if order.parts == 1:
        assert (np.diff(window) >= 0).all()


def test_block_rows_are_read_once_per_epoch():
    order = Order(1, 10_000, "block", block_rows=30, window_blocks=7)
    blocks = np.concatenate([order.blocks(4, w) for w in range(order.windows)])
    assert np.array_equal(np.sort(blocks), np.arange(334))
    assert not np.array_equal(blocks, np.arange(334))


@given(order=orders(), epoch=st.integers(0, 9), size=st.integers(1, 9))
@SMALL
def test_a_rank_reads_the_parts_of_its_slice_only(order, epoch, size):
    share = order.batch_size // order.parts
    steps = order.rows // order.parts // share
    owner = np.concatenate([np.full(len(order.part_rows(k)), k) for k in range(order.parts)])
    assert len(owner) == order.rows
    for rank in range(size):
        for step in range(min(steps, 3)):
            batch = Batches(order.rows, order.batch_size).positions(0, step)
            positions, _ = rank_slice(batch, rank, size)
            rows = order.index(epoch, positions)
            assert set(owner[rows].tolist()) == set(order.parts_of(rank, size))


def test_what_parts_have_left_over_comes_at_the_end_in_order_of_parts():
    order = Order(0, 23, "none", parts=2, batch_size=8)  # parts of 11 and 12 rows, shares of 4
    expected = [*range(4), *range(11, 15), *range(4, 8), *range(15, 19), 8, 9, 10, 19, 20, 21, 22]
    assert order.index(0, np.arange(23)).tolist() == expected


def test_parts_refuse_another_batch_size_in_mid_epoch():
    order = Order(0, 1000, parts=4, batch_size=16)
    for position, batch_size in ((0, 32), (1000, 32), (160, 16)):
        order.check_resume(position, batch_size)
    with pytest.raises(DataError, match="batches of 16, which cannot become 32 at position 160"):
        order.check_resume(160, 32)
    Order(0, 1000, batch_size=16).check_resume(160, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": 3, "batch_size": 16}, "multiple of the number of parts"),
        ({"shuffle": "random"}, "one of none, global, block"),
        ({"shuffle": "block"}, "block_rows is 0; it must be at least 1"),
        ({"shuffle": "block", "block_rows": 4, "window_blocks": 0}, "window_blocks is 0"),
        ({"rows": -1}, "rows is -1"),
        ({"parts": 0}, "parts is 0"),
    ],
)
def test_a_senseless_order_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        Order(**{"seed": 0, "rows": 10} | options)


# Batches


@given(
    rows=st.integers(0, 500),
    batch=st.integers(1, 60),
    tail=st.sampled_from(["keep", "drop", "wrap"]),
    data=st.data(),
)
@SMALL
def test_batches_cover_the_rest_of_an_epoch_in_order(rows, batch, tail, data):
    start = data.draw(st.integers(0, rows))
    batches = Batches(rows, batch, tail)
    steps = batches.steps(start)
    cuts = [batches.positions(start, step) for step in range(steps)]
    joined = np.concatenate(cuts) if cuts else np.arange(0)
    rest = np.arange(start, rows)
    if tail == "keep":
        assert np.array_equal(joined, rest)
        assert all(len(cut) == batch for cut in cuts[:-1]) and all(map(len, cuts))
    elif tail == "drop":
        assert np.array_equal(joined, rest[: len(rest) // batch * batch])
    else:
        assert np.array_equal(joined[: len(rest)], rest)
        assert np.array_equal(
            joined[len(rest) :], np.arange(len(joined) - len(rest)) % max(rows, 1)
        )
        assert len(joined) - len(rest) < batch
    if tail != "keep":
        assert all(len(cut) == batch for cut in cuts)
    for step in (-1, steps):
        with pytest.raises(IndexError):
            batches.positions(start, step)


@pytest.mark.parametrize("start", [-1, 11])
def test_a_state_of_another_set_is_refused(start):
    with pytest.raises(DataError, match=f"position {start} of an epoch of 10 rows"):
        Batches(10, 4).steps(start)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"tail": "pad"}])
def test_senseless_batches_are_refused(options):
    with pytest.raises(DataError):
        Batches(**{"rows": 10, "batch_size": 4} | options)


@given(order=orders(), data=st.data())
@SMALL
def test_no_row_is_lost_or_repeated_when_ranks_and_batch_size_change(order, data):
    position, seen = 0, []
    while position < order.rows:
        size = data.draw(st.integers(1, 5))
        fixed = order.parts > 1
        batch_size = order.batch_size if fixed else data.draw(st.integers(20, 400))
        order.check_resume(position, batch_size)
        batches = Batches(order.rows, batch_size)
        stop = data.draw(st.integers(1, 1 + batches.steps(position)))
        begun = position
        for step in range(min(stop, batches.steps(begun))):
            batch = batches.positions(begun, step)
            for rank in range(size):
                positions, weights = rank_slice(batch, rank, size)
                seen.append(order.index(1, positions)[weights == 1])
            position += len(batch)
    assert np.array_equal(np.concatenate(seen), order.index(1, np.arange(order.rows)))
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(order.rows))


@given(first=st.integers(0, 10**12), n=st.integers(1, 200), size=st.integers(1, 17))
@SMALL
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
    with pytest.raises(IndexError):
        Order(0, 10).parts_of(rank, 2)


@pytest.mark.parametrize("rows", [10**9, 10**10])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": "block", "block_rows": 3000},
        {"parts": 64},
        {"shuffle": "block", "block_rows": 3000, "parts": 64},
    ],
)
def test_memory_of_a_rank_stays_below_one_megabyte(rows, options):
    round_keys(0)  # numpy.random is imported, which is not the sampler's memory
    tracemalloc.start()
    try:
        order = Order(3, rows, batch_size=4096, **options)
        batches = Batches(rows, 4096)
        for step in (0, batches.steps() // 2):
            positions, _ = rank_slice(batches.positions(0, step), 0, 1)
            order.index(1, positions)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 4096 * 8 < peak < 1_000_000
