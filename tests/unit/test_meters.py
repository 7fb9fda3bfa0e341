"""Meters: exact on made-up clocks, unbiased on made-up gradients, and silent towards the device."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dmi_hpc.meters import Gauge, NoiseScale, Smoothed, Step, Throughput, matmul_peak
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import training_flops
from dmi_hpc.models.spec import Activation, Conv, Dense, NetworkSpec, Pool, Readout


def a_step(step: int, epoch: int = 0, loss: float = 1.0, **changes: object) -> Step:
    given = {"steps_per_epoch": 10, "rows": 8, "waited_s": 0.5, "learning_rate": 0.1, **changes}
    return Step(epoch=epoch, step=step, loss=torch.tensor(loss), **given)


# smoothing


def test_the_mean_of_equal_numbers_is_that_number_from_the_first_on():
    meter = Smoothed[float](0.99)
    assert meter.mean is None
    for _ in range(5):
        meter.add(3.0)
        assert meter.mean == pytest.approx(3.0)


def test_smoothing_weighs_as_the_formula_says():
    meter = Smoothed[float](0.5)
    for value in (1.0, 2.0, 4.0):
        meter.add(value)
    assert meter.mean == pytest.approx((0.25 * 1 + 0.5 * 2 + 1 * 4) / 1.75)


def test_a_mean_of_several_steps_weighs_as_much_as_those_steps():
    once, often = Smoothed[float](0.9), Smoothed[float](0.9)
    for value, times in ((1.0, 3), (2.0, 1), (5.0, 4)):
        once.add(value, times)
        for _ in range(times):
            often.add(value)
    assert once.mean == pytest.approx(often.mean)


def test_a_decay_of_one_is_refused():
    with pytest.raises(ValueError, match="expected 0 <= decay < 1"):
        Smoothed(1.0)


# noise scale


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4], [5, 5, 5, 1], [1, 15]])
def test_the_noise_scale_of_made_up_gradients_is_found(sizes):
    """Gradient G of 20 components, samples scattered about it with a known covariance."""
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.full((20,), 0.3), 2.0
    truth = 20 * spread**2 / float(mean.square().sum())
    meter = NoiseScale(sizes, decay=0.9995)
    for _ in range(4000):
        samples = mean + spread * torch.randn(16, 20, generator=generator)
        parts = torch.stack([part.sum(0) / 16 for part in samples.split(sizes)])
        meter.add(parts.square().sum(), parts.sum(0).square().sum())
    assert meter.value() == pytest.approx(truth, rel=0.1)


def test_a_noise_scale_that_noise_hides_is_not_told():
    meter = NoiseScale([1, 1, 1, 1])
    assert meter.value() is None
    meter.add(torch.tensor(0.25), torch.tensor(0.2))  # |G|^2 = (0.2 - 0.25) / (1 - 1/4) < 0
    assert meter.value() is None
    for sizes in ([], [8], [4, 0]):
        with pytest.raises(ValueError, match="expected at least 2 of 1 or more"):
            NoiseScale(sizes)


# throughput


def test_rates_are_of_steps_alone_and_leave_out_what_lies_between_epochs():
    meter = Throughput()
    meter.add(100.0, 8, 9.0, first=True)
    assert meter.read() is None
    for i in range(1, 5):
        meter.add(100.0 + i, 8, 0.25, first=False)
    assert meter.read() == (8.0, 0.25)
    meter.add(900.0, 8, 9.0, first=True)  # after a long validation
    meter.add(901.0, 8, 0.25, first=False)
    assert meter.read() == (8.0, 0.25)


def test_rates_follow_the_window():
    meter, now = Throughput(window_s=10.0), 0.0
    meter.add(now, 8, 0.0, first=True)
    for seconds, rows in ((1.0, 8), (1.0, 80)):
        for _ in range(30):
            now += seconds
            meter.add(now, rows, 0.0, first=False)
            rates = meter.read()
    assert rates is not None
    assert rates[0] == pytest.approx(80.0)


# gauge


def test_a_gauge_tells_pace_time_left_and_share_of_the_peak():
    gauge = Gauge(epochs=2, flops=100, peak=8000.0)
    for i in range(1, 6):
        gauge.add(a_step(i), now=10.0 * i)
        reading = gauge.read()
    assert reading.progress == 0.5
    assert reading.left_s == pytest.approx(150.0)
    assert reading.samples_per_s == pytest.approx(0.8)
    assert reading.data_wait == pytest.approx(0.05)
    assert reading.flops == pytest.approx(80.0)
    assert reading.mfu == pytest.approx(0.01)
    assert (reading.total_step, reading.gradient_norm, reading.noise_scale) == (5, None, None)


def test_a_resumed_training_is_paced_by_what_it_has_done_since():
    gauge = Gauge(epochs=10, flops=1, peak=None)
    gauge.add(a_step(10, epoch=8), now=0.0)
    assert gauge.read().left_s is None
    gauge.add(a_step(5, epoch=9), now=50.0)
    reading = gauge.read()
    assert reading.left_s == pytest.approx(50.0)
    assert reading.mfu is None


def test_a_share_above_one_is_a_peak_measured_wrong():
    gauge = Gauge(1, flops=100, peak=10.0)
    for i in range(1, 3):
        gauge.add(a_step(i), now=float(i))
        reading = gauge.read()
    assert (reading.flops, reading.mfu) == (800.0, None)


def test_the_loss_is_the_mean_of_all_steps_since_it_was_taken():
    gauge = Gauge(1, 1, None)
    for step, loss in enumerate((1.0, 3.0, 8.0), start=1):
        gauge.add(a_step(step, loss=loss), now=float(step))
        if step == 2:
            gauge.read()
    gauge.read()
    assert gauge.take_loss() == pytest.approx(4.0)
    assert math.isnan(gauge.take_loss())


def test_neither_a_skipped_step_nor_a_broken_loss_spoils_the_smoothed_one():
    gauge = Gauge(1, 1, None)
    gauge.add(a_step(1, loss=2.0), now=0.0)
    gauge.add(a_step(2, loss=math.nan, skipped=True), now=1.0)
    assert gauge.read().loss == 2.0
    gauge.add(a_step(3, loss=math.inf), now=2.0)
    reading = gauge.read()
    assert (reading.loss, reading.skipped) == (2.0, 1)


def test_adding_a_step_reads_nothing_from_the_device():
    nowhere = torch.zeros((), device="meta")  # reading it raises
    gauge, noise = Gauge(1, 1, None), NoiseScale([1, 1])
    for i in range(1, 4):
        noise.add(nowhere, nowhere)
        gauge.add(Step(0, i, 10, nowhere, 8, 0.0, 0.1, nowhere, noise=noise), now=float(i))
    with pytest.raises(RuntimeError):
        gauge.read()


# floating-point operations


@pytest.mark.parametrize(
    "spec",
    [
        NetworkSpec(input_shape=(7,), layers=(Dense(units=5), Activation(), Dense(units=3))),
        NetworkSpec(input_shape=(7,), layers=()),
        NetworkSpec(
            input_shape=(2, 8, 8),
            layers=(
                Pool(op="mean"),
                Conv(filters=4),
                Activation(),
                Conv(filters=3, stride=2),
                Readout(),
                Dense(units=6),
            ),
            outputs=2,
        ),
    ],
    ids=["dense", "head alone", "convolutions"],
)
def test_training_flops_are_those_that_torch_counts(spec: NetworkSpec):
    module, rows = build(spec), 3
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(rows, *spec.input_shape)).sum().backward()
    assert counter.get_total_flops() == rows * training_flops(spec)


def test_the_peak_is_measured_without_touching_random_states():
    before = torch.get_rng_state()
    assert matmul_peak(torch.device("cpu"), "fp32", limit_s=0.01) > 1e6
    assert torch.equal(torch.get_rng_state(), before)
