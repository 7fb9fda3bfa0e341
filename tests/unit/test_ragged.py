import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.data.ragged import Ragged, offsets_of, places_of, row_of_entry

FEW = settings(deadline=None, max_examples=100)
LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=12)


def make(lengths, shape=(2,), start=0):
    total = sum(lengths) * int(np.prod(shape))
    values = np.arange(start, start + total, dtype=np.int32).reshape(-1, *shape)
    return Ragged(values, offsets_of(np.array(lengths, dtype=np.int64)))


def rows_of(ragged):
    return [row.tolist() for row in ragged]


@given(lengths=LENGTHS, data=st.data())
@FEW
def test_take_is_indexing_of_the_list_of_rows(lengths, data):
    ragged = make(lengths)
    n = len(lengths)
    rows = data.draw(st.lists(st.integers(-n, n - 1), max_size=20))
    taken = ragged.take(np.array(rows, dtype=np.int64))
    expected = rows_of(ragged)
    assert rows_of(taken) == [expected[row] for row in rows]
    assert taken.values.dtype == ragged.values.dtype
    assert len(taken) == len(rows)


@given(parts=st.lists(LENGTHS, min_size=1, max_size=4))
@FEW
def test_concatenate_is_that_of_the_lists(parts):
    ragged = [make(lengths, start=100 * k) for k, lengths in enumerate(parts)]
    joined = Ragged.concatenate(ragged)
    assert rows_of(joined) == [row for part in ragged for row in rows_of(part)]


@given(lengths=LENGTHS)
@FEW
def test_from_rows_and_back(lengths):
    ragged = make(lengths)
    again = Ragged.from_rows(list(ragged))
    assert np.array_equal(again.values, ragged.values)
    assert np.array_equal(again.offsets, ragged.offsets)
    assert again.lengths.tolist() == lengths
    assert np.array_equal(row_of_entry(again.offsets), np.repeat(np.arange(len(lengths)), lengths))


def test_rows_are_views_and_counted_from_both_ends():
    ragged = make([2, 0, 3])
    assert np.shares_memory(ragged[0], ragged.values)
    assert np.array_equal(ragged[-1], ragged[2])
    assert ragged[1].shape == (0, 2)
    for row in (3, -4):
        with pytest.raises(IndexError, match=f"row {row} of 3"):
            ragged[row]


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([], "expected 0 to 3, found none"),
        ([1, 3], r"found \[1, 3\]"),
        ([0, 4], r"found \[0, 4\]"),
        ([0, 2, 1, 3], "never to fall"),
        ([[0, 3]], "found none"),
    ],
)
def test_impossible_offsets_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        Ragged(np.zeros(3), np.array(offsets, dtype=np.int64))


def test_offsets_of_any_integers_are_int64_and_of_floats_refused():
    with pytest.raises(ValueError, match="never to fall"):
        Ragged(np.zeros(3), np.array([0, 2, 1, 3], dtype=np.uint64))
    assert Ragged(np.zeros(3), np.array([0, 2, 3], dtype=np.uint8)).offsets.dtype == np.int64
    with pytest.raises(ValueError, match="expected integers, found float64"):
        Ragged(np.zeros(3), np.array([0.0, 3.0]))


def test_places_of_nothing():
    none = np.array([], dtype=np.int64)
    assert places_of(none, none).size == 0
    assert places_of(np.array([7, 2, 5]), np.array([2, 0, 1])).tolist() == [7, 8, 5]
