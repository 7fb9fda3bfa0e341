import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.data.ranges import Ranges, Rows

FEW = settings(deadline=None, max_examples=200)
LENGTHS = st.one_of(
    st.lists(st.integers(0, 4), min_size=1, max_size=20),
    st.lists(st.integers(1, 300), min_size=1, max_size=20),
    st.lists(st.sampled_from([1, 2, 2**16, 2**40]), min_size=1, max_size=6),
    # as shards are: equal, the last shorter
    st.builds(
        lambda n, k, last: [n] * k + [last], st.integers(1, 50), st.integers(1, 9), st.just(1)
    ),
)


@given(lengths=LENGTHS, data=st.data())
@FEW
def test_find_is_a_binary_search(lengths, data):
    ranges = Ranges(lengths)
    ends = np.cumsum(lengths)
    assert ranges.total == sum(lengths)
    edges = [p for end in ends.tolist() for p in (end - 1, end) if 0 <= p < ranges.total]
    random = st.integers(0, max(ranges.total - 1, 0))
    drawn = data.draw(st.lists(random, max_size=50)) if ranges.total else []
    positions = np.array([*edges, *drawn], dtype=np.int64)
    before = positions.copy()
    assert np.array_equal(ranges.find(positions), np.searchsorted(ends, positions, side="right"))
    assert np.array_equal(positions, before)


@pytest.mark.parametrize("lengths", [[1000] * 70 + [3], [1] * 70_000, [3, 10**12], [5]])
def test_find_with_and_without_a_table(lengths):
    ranges = Ranges(lengths)
    positions = np.random.default_rng(0).integers(0, ranges.total, 1000)
    expected = np.searchsorted(np.cumsum(lengths), positions, side="right")
    assert np.array_equal(ranges.find(positions), expected)


@given(pairs=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 9)), max_size=12))
@FEW
def test_rows_are_the_ranges_one_after_the_other(pairs):
    rows = Rows([first for first, _ in pairs], [length for _, length in pairs])
    ranges = [np.arange(first, first + length) for first, length in pairs]
    expected = np.concatenate([np.array([], dtype=np.int64), *ranges])
    found = np.asarray(rows)
    assert found.dtype == np.int64
    assert np.array_equal(found, expected)
    assert len(rows) == len(expected)
    back = np.arange(len(rows))[::-1]
    assert np.array_equal(rows[back], expected[back])
    assert np.asarray(rows, dtype=np.float32).dtype == np.float32


@pytest.mark.parametrize("position", [-1, 5])
def test_a_position_outside_is_an_error(position):
    with pytest.raises(IndexError, match=f"{position}.* of 5 rows"):
        Rows([0, 10], [2, 3])[np.array([0, position])]


def test_memory_is_that_of_the_ranges():
    rows = Rows([0, 10**11], [10**10, 10**10])
    assert len(rows) == 2 * 10**10
    assert rows[np.array([0, 10**10 - 1, 10**10, 2 * 10**10 - 1])].tolist() == [
        0,
        10**10 - 1,
        10**11,
        10**11 + 10**10 - 1,
    ]


def test_masks_and_slices_choose_rows_as_of_an_array():
    rows = Rows([3, 20], [4, 2])
    everything = np.asarray(rows)
    mask = everything % 2 == 0
    assert rows[mask].tolist() == everything[mask].tolist() == [4, 6, 20]
    for part in (slice(None), slice(1, -1), slice(None, None, -2), slice(9, 9)):
        assert rows[part].tolist() == everything[part].tolist()
    assert rows[np.array([], dtype=float)].tolist() == []
    assert rows[np.uint8(5)] == 21


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (np.array([1.9]), "expected integers, a mask or a slice, found float64"),
        (np.ones(5, dtype=bool), r"a mask of shape \(5,\) for 6 rows"),
        (np.array(["1"]), "found <U1"),
    ],
)
def test_what_are_no_positions_is_refused(index, message):
    with pytest.raises(IndexError, match=message):
        Rows([3, 20], [4, 2])[index]
