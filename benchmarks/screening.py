"""Compositions per second: made, predicted, and screened against a convex hull.

    python benchmarks/screening.py                          # ElemNet with random weights
    python benchmarks/screening.py runs/elemnet --known data/oqmd --precision bf16

Three figures, each over a few seconds of quaternary compositions of all 86 elements with at most 10
atoms (435 million): fractions alone, fractions and network, and all of `dmi screen` but its ranking.
Screening needs hulls of the known compounds (by default random ternary ones), made by --processes.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from dmi_hpc import load
from dmi_hpc.data.elements import ELEMENTS
from dmi_hpc.models.build import build
from dmi_hpc.predict import Model
from dmi_hpc.screening.enumerate import count
from dmi_hpc.screening.hull import Known
from dmi_hpc.screening.known import known_of, read_known
from dmi_hpc.screening.options import Candidates, Compositions, Screening
from dmi_hpc.screening.run import screen
from dmi_hpc.screening.stream import Network, blocks
from dmi_hpc.targets import TargetScale
from dmi_hpc.tasks import make_task

WANTED = Compositions(components=(4,), max_atoms=10)


def untrained(device: torch.device) -> Model:
    torch.manual_seed(0)
    task = make_task({"name": "elemnet", "dropout": False})
    network = task.published_network()
    scale = TargetScale(transform="identity", mean=-0.5, std=0.8)
    return Model(task, scale, build(network).to(device).eval(), 1, network, "untrained", "", {})


def random_known(number: int) -> Known:
    rng = np.random.default_rng(0)

    def records() -> Iterator[tuple[str, float]]:
        for _ in range(number):
            chosen = rng.choice(len(ELEMENTS), 3, replace=False)
            amounts = rng.integers(1, 6, 3)
            formula = "".join(f"{ELEMENTS[e]}{n}" for e, n in zip(chosen, amounts, strict=True))
            yield formula, float(-2 * rng.random())

    return known_of(records())


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(sizes: Iterator[int], device: torch.device, seconds: float) -> tuple[float, float]:
    """(items per second after the first block, items)"""
    next(sizes)
    wait(device)
    started, done = time.perf_counter(), 0
    for size in sizes:
        done += size
        if time.perf_counter() - started > seconds:
            break
    wait(device)
    return done / (time.perf_counter() - started), done


class Enough(Exception):
    """Ends a screening after some seconds."""


def screened(model: Model, what: Screening, known: Known, seconds: float) -> float:
    """Compositions per second from the end of the first block on, until `seconds` are over."""
    told: list[tuple[float, int]] = []

    def progress(done: int) -> None:
        told.append((time.perf_counter(), done))
        if told[-1][0] - told[0][0] > seconds:
            raise Enough

    with suppress(Enough):
        screen(model, what, known, progress)
    (start, before), (end, after) = told[0], told[-1]
    return (after - before) / (end - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="trained network; default: untrained")
    parser.add_argument("--known", type=Path, help="known compounds, as of a screening file")
    parser.add_argument("--compounds", type=int, default=50_000, help="random ones without --known")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--processes", type=int, default=1, help="that compute hulls")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    device = torch.device(options.device)
    model = load(options.run, device=device) if options.run else untrained(device)
    known = (
        read_known(Candidates(known=options.known))
        if options.known
        else random_known(options.compounds)
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()} cores; {count(WANTED):,} "
        f"compositions; {len(known):,} known compounds; {options.precision}"
    )
    made = (len(block.fractions()) for block in blocks(WANTED, device))
    print(f"fractions         {rate(made, device, options.seconds)[0]:14,.0f} /s")
    network = Network(model, options.precision)
    predicted = (len(network(block.fractions())) for block in blocks(WANTED, device))
    print(f"and network       {rate(predicted, device, options.seconds)[0]:14,.0f} /s")
    what = Screening(
        compositions=WANTED,
        candidates=Candidates(within=0.0),
        precision=options.precision,
        processes=options.processes,
    )
    found = screened(model, what, known, options.seconds)
    print(f"and hull (screen) {found:14,.0f} /s with hulls by {options.processes} processes")


if __name__ == "__main__":
    main()
