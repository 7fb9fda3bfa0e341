"""Learning rates: exact values, range, continuity, and that they are functions of plain data."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmi_hpc.config import TrainConfig
from dmi_hpc.schedule import FLOOR, drops_after, learning_rate, peak_rate

SCHEDULES = ("constant", "cosine", "one_cycle", "step", "plateau")
configs = st.builds(
    TrainConfig,
    learning_rate=st.floats(1e-6, 10),
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.floats(0, 0.9),
    decay=st.floats(0.05, 0.9),
    decay_epochs=st.integers(1, 20),
    epochs=st.integers(1, 100),
)
shares = st.floats(0, 1)


def config_of(schedule, **changes):
    return TrainConfig(schedule=schedule, learning_rate=0.1, **changes)


@given(configs, shares, st.integers(0, 5))
def test_a_rate_is_within_its_peak(config, progress, drops):
    rate = learning_rate(config, progress, drops)
    assert 0 <= rate <= config.learning_rate * config.decay**drops * (1 + 1e-12)


@given(configs)
def test_warm_up_ends_where_the_rest_begins(config):
    if config.warmup > 1e-3:
        before = learning_rate(config, config.warmup - 1e-9)
        assert before == pytest.approx(config.learning_rate, rel=1e-5)
    after = learning_rate(config, config.warmup + 1e-9)
    assert after == pytest.approx(config.learning_rate, rel=1e-5)


@given(configs, shares, shares)
def test_rising_in_the_warm_up_and_never_after(config, one, other):
    early, late = sorted((one, other))
    first, second = learning_rate(config, early), learning_rate(config, late)
    if late < config.warmup:
        assert first <= second
    elif early >= config.warmup:
        assert first >= second * (1 - 1e-12)


def test_exact_values():
    cosine = config_of("cosine", warmup=0.2)
    assert learning_rate(cosine, 0) == 0
    assert learning_rate(cosine, 0.05) == pytest.approx(0.025)
    assert learning_rate(cosine, 0.2) == pytest.approx(0.1)
    assert learning_rate(cosine, 0.6) == pytest.approx(0.1 * (FLOOR + (1 - FLOOR) / 2))
    assert learning_rate(cosine, 1) == pytest.approx(0.1 * FLOOR)
    one_cycle = config_of("one_cycle", warmup=0.5)
    assert learning_rate(one_cycle, 0) == pytest.approx(0.004)
    assert learning_rate(one_cycle, 0.25) == pytest.approx(0.052)
    assert learning_rate(config_of("constant", warmup=0), 0) == 0.1
    step = config_of("step", warmup=0.1, decay=0.5)
    assert learning_rate(step, 0.05, drops=1) == pytest.approx(0.025)
    assert [learning_rate(step, 0.7, n) for n in range(3)] == pytest.approx([0.1, 0.05, 0.025])


@pytest.mark.parametrize(("scaling", "peak"), [("linear", 0.4), ("sqrt", 0.2)])
def test_a_rate_holds_at_its_reference_batch(scaling, peak):
    config = config_of("cosine", batch_size=1024, reference_batch=256, batch_scaling=scaling)
    assert peak_rate(config) == pytest.approx(peak)
    assert learning_rate(config, config.warmup) == pytest.approx(peak)
    same = config.model_copy(update={"batch_size": 256})
    assert peak_rate(same) == peak_rate(same.model_copy(update={"reference_batch": None})) == 0.1
    smaller = config.model_copy(update={"batch_size": 64})
    assert peak_rate(smaller) == pytest.approx(0.1 * (0.25 if scaling == "linear" else 0.5))


def test_steps_drop_by_finished_epochs():
    config = config_of("step", decay_epochs=3)
    assert [drops_after(config, [1.0] * n) for n in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]


def test_a_plateau_drops_once_patience_is_spent_and_again():
    config = config_of("plateau", decay_epochs=2, warmup=0)
    errors = [5, 4, 4, 4, 3, 3.5, 3, 2.9, 9, 9, 9, 9]
    #         5  4  1  2! 3  1    2! 2.9 1  2! 1  2!
    expected = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4]
    assert [drops_after(config, errors[:n]) for n in range(1, 13)] == expected
    assert drops_after(config, []) == 0


def test_epochs_of_the_warm_up_are_no_plateau():
    config = config_of("plateau", decay_epochs=2, warmup=0.5, epochs=10)
    errors = [1, 2, 2, 2, 2, 2, 2]
    assert [drops_after(config, errors[:n]) for n in range(1, 8)] == [0, 0, 0, 0, 0, 0, 1]
    assert drops_after(config, [1, 2, 2, 2, 0.5, 2, 2]) == 1


@given(configs, st.lists(st.one_of(st.floats(0, 10), st.just(math.nan)), max_size=60))
def test_drops_never_come_back(config, errors):
    counts = [drops_after(config, errors[:n]) for n in range(len(errors) + 1)]
    assert all(0 <= later - earlier <= 1 for earlier, later in pairwise(counts))
    if config.schedule not in ("step", "plateau"):
        assert counts[-1] == 0
    assert counts[-1] <= len(errors) // config.decay_epochs
