"""What is measured of a training while it runs: plain arithmetic, no files and no terminal.

A `Gauge` takes every step in about a microsecond and is read now and then; only reading it waits
for the device.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    import torch

WINDOW_S = 20.0  # that rates are taken over
DECAY = 0.98  # of the loss shown, from one step to the next
PEAK_S = 0.12  # that measuring the peak may take
_SIZES = {"cpu": (256, 512, 1024, 2048), "cuda": (1024, 4096, 8192)}  # of square matrices

Number = TypeVar("Number", float, "torch.Tensor")


class Smoothed(Generic[Number]):
    """Exponential mean of numbers, or of scalar tensors, which stay on their device unread.

    Without the bias of a start from zero: the mean of the first number is that number.
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay}: expected 0 <= decay < 1")
        self._decay, self._weight = decay, 0.0
        self.mean: Number | None = None

    def add(self, value: Number, times: int = 1) -> None:
        kept = self._decay**times
        self._weight = kept * self._weight + 1 - kept
        share = (1 - kept) / self._weight
        self.mean = value if self.mean is None else self.mean + share * (value - self.mean)


class NoiseScale:
    """Gradient noise scale: the batch size, in samples, up to which a larger one pays.

    After McCandlish et al. 2018 (arXiv:1812.06162, appendix A.1): squared norms of the gradients of
    a batch and of its parts give unbiased estimates of |G|^2 and of the trace S of the covariance
    of one sample's gradient. Each is smoothed by itself, for their ratio S / |G|^2 is biased.
    """

    def __init__(self, sizes: Sequence[int], decay: float = 0.99) -> None:
        """sizes: samples of each part of the batch."""
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"parts of {list(sizes)} samples: expected at least 2 of 1 or more")
        self.samples = sum(sizes)  # of the whole batch
        self._evenness = sum((size / self.samples) ** 2 for size in sizes)
        self._squares: tuple[Smoothed[torch.Tensor], Smoothed[torch.Tensor]] = (
            Smoothed(decay),
            Smoothed(decay),
        )

    def add(self, parts: torch.Tensor, whole: torch.Tensor) -> None:
        """Squared norms of one step, before its update; scalars, not read here.

        parts: of what each part adds to the gradient of the batch's mean loss, summed; whole: of
        that gradient. Neither a ragged batch nor a step that was skipped belongs here.
        """
        # the estimates are linear in the squares: smoothing these smooths each of those
        for meter, square in zip(self._squares, (parts, whole), strict=True):
            meter.add(square)

    def value(self) -> float | None:
        """Waits for the device. None while an estimate is not positive: noise hides the rest."""
        parts, whole = (meter.mean for meter in self._squares)
        if parts is None or whole is None:
            return None
        # part i of b_i of n samples adds (b_i / n) g_i, and E |g_i|^2 = |G|^2 + S / b_i. Thus
        # E parts = evenness |G|^2 + S / n and E whole = |G|^2 + S / n
        gradient = (float(whole) - float(parts)) / (1 - self._evenness)
        covariance = self.samples * (float(whole) - gradient)
        return covariance / gradient if gradient > 0 and covariance > 0 else None


class Throughput:
    """Samples a second, and the share of the time waited for data, over the last seconds.

    Time between epochs (validation, checkpoints) is left out, and so is the first step of each.
    """

    def __init__(self, window_s: float = WINDOW_S) -> None:
        self._window_s, self._last = window_s, math.nan
        self._seconds = self._rows = self._waited = 0.0
        self._marks = deque([(0.0, 0.0, 0.0)])  # seconds, rows, seconds waited, all since the start

    def add(self, now: float, rows: int, waited_s: float, *, first: bool) -> None:
        """A step has ended at `now`, seconds of a clock. first: of its epoch."""
        if not first:
            self._seconds += now - self._last
            self._rows += rows
            self._waited += waited_s
        self._last = now

    def read(self) -> tuple[float, float] | None:
        """(samples a second, share waited) of the steps within the window; None: too few so far."""
        seconds, rows, waited = self._marks[0]
        passed = self._seconds - seconds
        rates = None
        if passed > 0:
            rates = (self._rows - rows) / passed, min(1.0, (self._waited - waited) / passed)
        self._marks.append((self._seconds, self._rows, self._waited))
        while len(self._marks) > 2 and self._marks[1][0] <= self._seconds - self._window_s:
            self._marks.popleft()
        return rates


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a training, told to its observer."""

    epoch: int  # from 0
    step: int  # of this epoch, from 1
    steps_per_epoch: int
    loss: torch.Tensor  # mean over this rank's rows, scaled units; detached, not read
    rows: int  # of the global batch
    waited_s: float  # for data, by this rank
    learning_rate: float
    norm: torch.Tensor | None = None  # of the global gradient before clipping, not read
    skipped: bool = False  # not applied, because its loss or gradient is not finite
    noise: NoiseScale | None = None  # up to this step


@dataclass(frozen=True)
class Reading:
    """A training at one moment; None: not known (yet)."""

    epoch: int  # in work, from 0
    step: int  # of this epoch, from 1
    steps_per_epoch: int
    total_step: int  # of all epochs
    loss: float  # smoothed, scaled units
    learning_rate: float
    gradient_norm: float | None
    samples_per_s: float | None
    data_wait: float | None  # share of the time, 0 .. 1
    flops: float | None  # floating-point operations a second, of all ranks
    mfu: float | None  # `flops` as a share of the matmul peak of all ranks, 0 .. 1; None: see Gauge
    noise_scale: float | None  # samples
    skipped: int  # steps, since the start
    left_s: float | None  # to the end of all epochs, at the pace so far

    @property
    def progress(self) -> float:
        """Epochs done."""
        return self.epoch + self.step / self.steps_per_epoch


class Gauge:
    """Takes the steps of a training one by one; tells how it stands when asked."""

    def __init__(self, epochs: int, flops: int, peak: float | None) -> None:
        """flops: of one sample, forward and backward; peak: FLOP/s of all ranks together.

        A share above 1 is not told: the peak was measured while others used the cores.
        """
        self._epochs, self._flops, self._peak = epochs, flops, peak
        self._throughput, self._smoothed = Throughput(), Smoothed[float](DECAY)
        self._rates: tuple[float, float] | None = None
        self._step: Step | None = None
        self._skipped = 0
        self._start: tuple[float, float] | None = None  # time and progress after the first step
        self._now = 0.0
        # of the steps since the last reading on the device, since the last record on the host
        self._unread: torch.Tensor | None = None
        self._unread_steps = 0
        self._sum, self._steps = 0.0, 0

    def add(self, step: Step, now: float) -> None:
        """A step has ended at `now`, seconds of a clock."""
        first = step.step == 1 or self._step is None
        self._throughput.add(now, step.rows, step.waited_s, first=first)
        self._step, self._now = step, now
        if step.skipped:
            self._skipped += 1
            return
        self._unread = step.loss if self._unread is None else self._unread + step.loss
        self._unread_steps += 1

    def read(self) -> Reading:
        """As after the last step; waits for the device. There must have been a step."""
        step = self._step
        assert step is not None, "no step yet"
        if self._unread is not None:
            unread = float(self._unread)
            self._sum, self._steps = self._sum + unread, self._steps + self._unread_steps
            if math.isfinite(unread):  # or the mean would never recover
                self._smoothed.add(unread / self._unread_steps, self._unread_steps)
            self._unread, self._unread_steps = None, 0
        self._rates = self._throughput.read() or self._rates
        samples_per_s, data_wait = self._rates or (None, None)
        flops = samples_per_s * self._flops if samples_per_s is not None else None
        mfu = flops / self._peak if flops is not None and self._peak else None
        return Reading(
            epoch=step.epoch,
            step=step.step,
            steps_per_epoch=step.steps_per_epoch,
            total_step=step.epoch * step.steps_per_epoch + step.step,
            loss=math.nan if self._smoothed.mean is None else self._smoothed.mean,
            learning_rate=step.learning_rate,
            gradient_norm=None if step.norm is None else float(step.norm),
            samples_per_s=samples_per_s,
            data_wait=data_wait,
            flops=flops,
            mfu=mfu if mfu is not None and mfu <= 1 else None,
            noise_scale=None if step.noise is None else step.noise.value(),
            skipped=self._skipped,
            left_s=self._left_s(step),
        )

    def take_loss(self) -> float:
        """Mean loss of the steps read since this was last asked; nan without any."""
        mean = self._sum / self._steps if self._steps else math.nan
        self._sum, self._steps = 0.0, 0
        return mean

    def _left_s(self, step: Step) -> float | None:
        progress = step.epoch + step.step / step.steps_per_epoch
        if self._start is None:
            self._start = self._now, progress
        started, begun = self._start
        if progress <= begun:
            return None
        return (self._now - started) / (progress - begun) * (self._epochs - progress)


def matmul_peak(
    device: torch.device, precision: Literal["fp32", "bf16", "fp16"], limit_s: float = PEAK_S
) -> float:
    """FLOP/s of the fastest square matrix product of this process; takes about `limit_s`.

    Leaves the random states alone. Larger matrices are tried as long as the time allows.
    """
    import torch

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    generator = torch.Generator(device).manual_seed(0)
    sizes, best = _SIZES[device.type], 0.0
    _seconds(torch.ones(sizes[0], sizes[0], device=device, dtype=dtype))  # libraries start
    began = time.perf_counter()
    for n, following in pairwise((*sizes, 0)):
        a = torch.randn(n, n, generator=generator, device=device, dtype=dtype)
        seconds = min(_seconds(a) for _ in range(4))  # the first of a size also finds its kernel
        best = max(best, 2 * n**3 / seconds)
        # four products of the following size, and its numbers drawn
        if time.perf_counter() - began + 5 * seconds * (following / n) ** 3 > limit_s:
            break
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the memory is the training's
    return best


def _seconds(a: torch.Tensor) -> float:
    """That one product of `a` with itself takes."""
    import torch

    def finish() -> None:
        if a.is_cuda:
            torch.cuda.synchronize(a.device)

    finish()
    began = time.perf_counter()
    torch.mm(a, a)
    finish()
    return time.perf_counter() - began
