"""What a training loses to its checkpoints: 50 M parameters with Adam, 600 MB of state.

    python benchmarks/checkpointing.py                 about a minute
    python benchmarks/checkpointing.py --threads 4     steps that use four cores
    python benchmarks/checkpointing.py --quick         a small network, seconds: does it run?

Ratios of times taken in turns within one run, medians over the repetitions. Other programs on the
same cores or disk disturb them: run it alone, with --folder on the disk in question. The last line
is the worst case for threads of one interpreter, not a real one: small networks have small
checkpoints.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from loading.report import Figure, table
from rich.console import Console
from torch import nn

from dmi_hpc import checkpoint
from dmi_hpc.models.spec import Dense, NetworkSpec
from dmi_hpc.targets import TargetScale
from dmi_hpc.writer import Writer

LAYERS, WIDTH, BATCH = 12, 2048, 16
SMALL_LAYERS, SMALL_WIDTH = 20, 32  # steps of a millisecond, nearly all of it in the interpreter
console = Console(stderr=True)


class Training:
    """Steps of a stack of linear layers."""

    def __init__(self, layers: int, width: int) -> None:
        self.module = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
        self.optimizer = torch.optim.Adam(self.module.parameters(), fused=True)
        self.inputs = torch.randn(BATCH, width)
        self.step()

    def step(self, writer: Writer | None = None) -> float:
        """Seconds that it waited for the writer."""
        self.module(self.inputs).square().mean().backward()
        asked = time.perf_counter()
        if writer is not None:
            writer.copied()
        waited = time.perf_counter() - asked
        self.optimizer.step()
        self.optimizer.zero_grad()
        return waited

    def save(self, writer: Writer, at: int) -> float:
        """Seconds that this took."""
        started = time.perf_counter()
        names = {name for name, _ in self.module.named_parameters()}
        writer.save(_meta(at), self.weights(), self.state(), best_step=-1, steady=names)
        return time.perf_counter() - started

    def weights(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()

    def state(self) -> dict[str, Any]:
        named = self.module.named_parameters()
        return {"optimizer": {name: self.optimizer.state[p] for name, p in named}}

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


@dataclass
class Times:
    """Seconds, one of each per repetition."""

    synchronous: list[float]
    stall: list[float]
    window: list[float]  # a write beside the large steps
    large: list[float]  # slow-down of steps meanwhile: a ratio of times, less one
    small: list[float]

    @property
    def lost(self) -> float:
        """All that a checkpoint costs, to one that is waited for."""
        slow = [w * s / (1 + s) for w, s in zip(self.window, self.large, strict=True)]
        return (median(self.stall) + median(slow)) / median(self.synchronous)


def figures(folder: Path, *, quick: bool = False, repetitions: int = 7) -> list[Figure]:
    """Stall of a checkpoint written beside the training, and slow-down of the steps meanwhile.

    folder: on the disk in question; what is written there is removed. Uses torch's present threads.
    """
    large = Training(LAYERS, 128 if quick else WIDTH)
    small = Training(SMALL_LAYERS, SMALL_WIDTH)
    place = Path(tempfile.mkdtemp(prefix="checkpointing-", dir=folder))
    writer = Writer(place / "beside", keep=1)
    try:
        first, times = _first_stall(large, writer), Times([], [], [], [], [])
        for repetition in range(2 if quick else repetitions):
            _measure(large, small, writer, place / "synchronous", 2 * repetition + 1, times)
    finally:
        writer.close()
        shutil.rmtree(place)
    return _judged(large, times, first)


def _first_stall(large: Training, writer: Writer) -> float:
    stall = large.save(writer, 0) + large.step(writer)
    writer.wait()
    return stall


def _measure(
    large: Training, small: Training, writer: Writer, place: Path, step: int, times: Times
) -> None:
    started = time.perf_counter()
    checkpoint.save(place, _meta(step), large.weights(), large.state())
    times.synchronous.append(time.perf_counter() - started)
    shutil.rmtree(place)
    stall = large.save(writer, step)
    slow, window, waited = _slow_down(large, writer)
    times.stall.append(stall + waited)
    times.large.append(slow)
    times.window.append(window)
    large.save(writer, step + 1)
    times.small.append(_slow_down(small, writer)[0])


def _slow_down(training: Training, writer: Writer) -> tuple[float, float, float]:
    """Of the steps of `training` during the write; seconds of the write; seconds waited for it."""
    busy, window, waited = _pace(lambda: training.step(writer), lambda: writer.busy)
    writer.wait()
    end = time.perf_counter() + window
    idle, _, _ = _pace(training.step, lambda: time.perf_counter() < end)
    return busy / idle - 1, window, waited


def _pace(step: Callable[[], float], going_on: Callable[[], bool]) -> tuple[float, float, float]:
    """Seconds of a step, without those it waited; of all steps begun while `going_on`, at least one;
    and those waited."""
    started, steps, waited = time.perf_counter(), 0, 0.0
    while steps == 0 or going_on():
        waited += step()
        steps += 1
    seconds = time.perf_counter() - started
    return (seconds - waited) / steps, seconds, waited


def _meta(step: int) -> checkpoint.Meta:
    network = NetworkSpec(input_shape=(3,), layers=(Dense(units=2),))
    scale = TargetScale(transform="identity", mean=0.0, std=1.0)
    return checkpoint.Meta(step=step, epoch=0, network=network, scale=scale, task={})


def _judged(large: Training, times: Times, first: float) -> list[Figure]:
    stall, whole = median(times.stall), median(times.synchronous)
    name = f"checkpoint of {large.parameters / 1e6:.3g} M parameters with Adam"
    threads = f"torch with {torch.get_num_threads()} threads"
    return [
        Figure(
            f"{name}: stall of the steps vs write and fsync",
            100 * stall / whole,
            "%",
            most=10,
            detail=f"{1e3 * stall:.0f} of {1e3 * whole:.0f} ms; the first {1e3 * first:.0f} ms",
        ),
        Figure(
            f"{name}: slow-down of its steps meanwhile",
            100 * median(times.large),
            "%",
            detail=f"for {median(times.window):.2g} s, {threads}",
        ),
        Figure(f"{name}: all that it costs vs write and fsync", 100 * times.lost, "%"),
        Figure(
            f"{name}: slow-down meanwhile of steps that are all interpreter",
            100 * median(times.small),
            "%",
            detail=f"{SMALL_LAYERS} layers of {SMALL_WIDTH} units, {threads}",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with console.status("checkpoints"):
        found = figures(arguments.folder, quick=arguments.quick)
    print(table(found))


if __name__ == "__main__":
    main()
