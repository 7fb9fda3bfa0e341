"""Statistics of fields: merged from shards they are those of the whole."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dmi_hpc.data.statistics import BINS, Histogram, Moments

TYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", ">f8", ">i4"]
FEW = settings(deadline=None, max_examples=150)


@st.composite
def parts(draw):
    """Arrays of one type: anywhere in its range, near one another, or all of them equal."""
    dtype = np.dtype(draw(st.sampled_from(TYPES)))
    if dtype.kind == "f":
        width = 8 * dtype.itemsize
        wide = st.floats(allow_nan=False, allow_infinity=False, width=width)
        near = st.floats(100, 128, width=width)
    else:
        limits = np.iinfo(dtype)
        wide = st.integers(int(limits.min), int(limits.max))
        near = st.integers(limits.max - 3, limits.max)
    values = draw(st.sampled_from([wide, near, st.just(draw(wide))]))
    lists = draw(st.lists(st.lists(values, min_size=1, max_size=30), min_size=1, max_size=6))
    return [np.array(numbers, dtype=dtype) for numbers in lists]


def merged(arrays):
    found = Moments.of(arrays[0])
    for array in arrays[1:]:
        found = found.merge(Moments.of(array))
    return found


def counted(values, histogram):
    """The histogram's counts, in whole numbers: no rounding."""
    counts = [0] * len(histogram.counts)
    for value in values.tolist():
        numerator, denominator = float(value).as_integer_ratio()
        up, down = max(-histogram.exponent, 0), max(histogram.exponent, 0)
        counts[(numerator << up) // (denominator << down) - histogram.first] += 1
    return tuple(counts)


def exact_moments(values):
    """(mean, deviation) in units of the largest magnitude, in extended precision."""
    scale = max(abs(float(values.min())), abs(float(values.max()))) or 1.0
    exact = values.astype(np.longdouble) / np.longdouble(scale)
    return float(exact.mean()), float(exact.std()), scale


@given(arrays=parts())
@FEW
def test_merged_is_the_whole(arrays):
    values = np.concatenate(arrays)
    found, whole = merged(arrays), Moments.of(values)
    assert found.histogram == whole.histogram
    assert (found.min, found.max, found.count) == (values.min(), values.max(), len(values))
    mean, std, scale = exact_moments(values)
    tiny = 1e-321 / scale if scale else 0  # a subnormal number has few digits
    for moments in (found, whole):
        assert moments.mean / scale == pytest.approx(mean, abs=1e-13 + tiny)
        assert moments.std / scale == pytest.approx(std, rel=1e-9, abs=1e-12 + tiny)


@given(arrays=parts())
@FEW
def test_bins_are_dyadic_few_and_hold_what_they_say(arrays):
    values = np.concatenate(arrays)
    histogram = merged(arrays).histogram
    assert len(histogram.counts) <= BINS
    assert sum(histogram.counts) == len(values)
    assert histogram.counts[0] > 0 < histogram.counts[-1]
    assert counted(values, histogram) == histogram.counts
    edges = histogram.edges
    assert edges[0] <= float(values.min())
    assert float(values.max()) < edges[-1]
    assert (np.diff(edges[:-1]) >= 0).all()


@given(arrays=parts(), order=st.randoms(use_true_random=False))
@FEW
def test_the_order_of_parts_does_not_change_the_histogram(arrays, order):
    shuffled = list(arrays)
    order.shuffle(shuffled)
    assert merged(shuffled).histogram == merged(arrays).histogram


def test_more_than_half_of_the_bins_are_used():
    rng = np.random.default_rng(0)
    for low, high in ((0, 1), (-3, 1000), (1e6, 1e6 + 1), (-1e300, 1e-300)):
        values = rng.uniform(low, high, 1000)
        assert BINS / 2 < len(Moments.of(values).histogram.counts) <= BINS


@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        (np.full(7, 0.1), 0.1, 0.0),
        (np.zeros(5, np.float32), 0.0, 0.0),
        (np.array([-0.0, 0.0]), 0.0, 0.0),
        (np.array([5e-324, 5e-324]), 5e-324, 0.0),
        (np.array([0, 1e-310]), 5e-311, 5e-311),
        (np.array([-1e300, 1e300]), 0.0, 1e300),
        (np.array([1e308] * 10 + [-1e308] * 10), 0.0, 1e308),
        (np.array([-(2**63), 2**63 - 1]), 0.0, 2.0**63),
        (np.array([2**63 + 2**20, 2**64 - 1], np.uint64), 1.5 * 2**63, 2.0**62),
        (np.array([-128, 127], np.int8), -0.5, 127.5),
        (np.array([0, 255, 255, 0], np.uint8), 127.5, 127.5),
        (np.array([-65504, 65504], np.float16), 0.0, 65504.0),
    ],
)
def test_extremes(values, mean, std):
    found = Moments.of(values).statistics()
    assert found.mean == pytest.approx(mean, rel=1e-12, abs=0)
    assert found.std == pytest.approx(std, rel=1e-12, abs=0)
    assert (found.min, found.max) == (float(values.min()), float(values.max()))
    assert counted(values, found.histogram) == found.histogram.counts


@pytest.mark.parametrize("scale", [1.7e308, 5e-324])
def test_far_apart_parts_merge(scale):
    low, high = (Moments.of(np.array([value])) for value in (-scale, scale))
    both = low.merge(high)
    assert (both.min, both.max, both.count) == (-scale, scale, 2)
    assert abs(both.mean) <= 5e-324
    assert scale < 1 or both.std == pytest.approx(scale, rel=1e-15)


def test_equal_constants_of_many_shards_have_no_deviation():
    some = [np.full(n, 0.1) for n in (3, 1, 100, 7)]
    assert (merged(some).mean, merged(some).std) == (0.1, 0.0)


def test_a_small_deviation_far_from_zero_is_kept():
    rng = np.random.default_rng(1)
    arrays = [rng.normal(1e6, 1e-3, 5000) for _ in range(4)]
    assert merged(arrays).std == pytest.approx(np.concatenate(arrays).std(), rel=1e-5)


def test_larger_than_one_piece():
    values = np.random.default_rng(2).normal(size=200_001).astype(np.float32)
    found = Moments.of(values).statistics()
    assert found.mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-12)
    assert found.std == pytest.approx(values.astype(np.float64).std(), rel=1e-12)
    assert counted(values, found.histogram) == found.histogram.counts
    bytes_ = (values * 30).clip(-128, 127).astype(np.int8)
    small, wide = Moments.of(bytes_), Moments.of(bytes_.astype(np.int16))
    assert small.histogram == wide.histogram
    assert (small.mean, small.std) == pytest.approx((wide.mean, wide.std), rel=1e-13)


@given(arrays=parts())
@FEW
def test_json_keeps_every_digit(arrays):
    kind = TypeAdapter(Moments)
    moments = merged(arrays)
    assert kind.validate_json(kind.dump_json(moments)) == moments
    found = moments.statistics()
    assert type(found).model_validate_json(found.model_dump_json()) == found


@pytest.mark.parametrize(
    "wrong",
    [
        {"counts": ()},
        {"counts": (1,) * (BINS + 1)},
        {"counts": (-1,)},
        {"exponent": 10**9},
        {"exponent": -1001},
        {"first": 10**30},
    ],
)
def test_an_impossible_histogram_is_refused(wrong):
    with pytest.raises(ValidationError):
        Histogram(**({"exponent": 0, "first": 0, "counts": (1,)} | wrong))


def test_edges_of_the_largest_numbers():
    edges = Moments.of(np.array([0.0, 1.7976931348623157e308])).histogram.edges
    assert edges[0] == 0
    assert math.isinf(edges[-1])
