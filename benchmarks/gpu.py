"""The trainer on a GPU: how much of the device's arithmetic it uses, and what the loader can feed.

    python benchmarks/gpu.py                     every network, a few minutes on one GPU
    python benchmarks/gpu.py --only elemnet      one network
    python benchmarks/gpu.py --json figures.json --markdown figures.md

Networks: the 17 layers of ElemNet and the 3-D convolutional network of Yang et al. on 51^3 voxels,
in bf16 autocast, compiled; of each, this project's training and a loop written by hand with its data
on the GPU, in turns within one process, medians over the repetitions. FLOP/s are multiply-adds x 2
of the forward and backward pass; the peak is the fastest bf16 matrix product measured in the same
process. Loader headroom: samples a second that the loader brings to the GPU where nothing trains,
over those that the training takes. Without a GPU there is nothing to measure: it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from loading.report import Figure, as_json, count, machine, table
from loading.timing import Rates, interleaved, ratio
from rich.console import Console
from training import contenders
from training.problems import CNN, ELEMNET, Setting, write_set
from training.turns import turns_of

from dmi_hpc.data.device import to_device
from dmi_hpc.data.loader import Batch, Loader
from dmi_hpc.data.sampler import Order
from dmi_hpc.meters import matmul_peak
from dmi_hpc.models.cost import training_flops
from dmi_hpc.world import World

PEAK_S = 3.0
console = Console(stderr=True)


@dataclass(frozen=True)
class Case:
    """One network. steps: of a turn; discarded: more than the loader holds ready."""

    title: str
    task: Mapping[str, Any]
    batch: int
    rows: int
    steps: int
    repetitions: int = 7
    discarded: int = 20


CASES = {
    "elemnet": Case("ElemNet, batch 4096", ELEMNET, 4096, 1 << 20, 200),
    "cnn": Case("3-D CNN, 51^3 voxels, batch 64", CNN, 64, 1 << 13, 40),
}


def figures(case: Case, folder: Path, device: str, peak: float) -> tuple[list[Figure], Rates]:
    """peak: FLOP/s of the device."""
    data = write_set(folder / "set", case.task, case.rows)
    setting, alone = Setting(data, case.task, case.batch, device=device, precision="bf16"), World()
    trainings = {
        "ours": contenders.ours(setting, alone),
        "ours, compiled": contenders.ours(setting, alone, compile=True),
        "by hand, compiled": contenders.by_hand(setting, alone, torch.compile),
    }
    with turns_of(trainings, case.discarded) as turns:

        def window(name: str) -> float:
            return case.batch * turns[name].rate(case.steps, lambda: _finish(device))

        windows = {name: (lambda name=name: window(name)) for name in turns}
        rates = interleaved(windows, case.repetitions)
    rates["loader"] = [_loaded(case, setting) for _ in range(case.repetitions)]
    return _judged(case, rates, training_flops(setting.network), peak), rates


def _judged(case: Case, rates: Rates, flops: int, peak: float) -> list[Figure]:
    ours = median(rates["ours, compiled"])
    achieved = ours * flops
    return [
        Figure(
            f"{case.title}: share of the bf16 matmul peak",
            100 * achieved / peak,
            "%",
            detail=f"{achieved / 1e12:.1f} of {peak / 1e12:.0f} TFLOP/s, {count(ours)} samples/s",
        ),
        Figure(
            f"{case.title}: ours vs a loop by hand, both compiled",
            ratio(rates, "ours, compiled", "by hand, compiled"),
            "x",
            detail=f"by hand {count(median(rates['by hand, compiled']))} samples/s",
        ),
        Figure(
            f"{case.title}: gain of torch.compile",
            ratio(rates, "ours, compiled", "ours"),
            "x",
            detail=f"without {count(median(rates['ours']))} samples/s",
        ),
        Figure(
            f"{case.title}: loader headroom",
            ratio(rates, "loader", "ours, compiled"),
            "x",
            detail=f"{count(median(rates['loader']))} samples/s to the GPU",
        ),
    ]


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _loaded(case: Case, setting: Setting) -> float:
    """Samples a second that come to the device, inputs and targets made as for a training."""
    problem = setting.problem()

    def prepare(batch: Batch) -> tuple[int, dict[str, torch.Tensor]]:
        inputs = problem.task.inputs(batch.fields)
        targets = problem.scale.scale(problem.target(batch.fields))
        return len(targets), {
            "inputs": torch.from_numpy(inputs),
            "targets": torch.from_numpy(targets),
        }

    loader = Loader(
        problem.shards,
        problem.train_rows,
        problem.fields,
        Order(seed=1, rows=len(problem.train_rows), shuffle="global"),
        batch_size=case.batch,
        prepare=prepare,
        rank=0,
        size=1,
        threads=setting.config().loader_threads,
        pin=setting.device == "cuda",
    )
    arriving = to_device(loader.epoch(0, 0), torch.device(setting.device))
    next(arriving)
    samples, started = 0, time.perf_counter()
    for rows, _ in arriving:
        samples += rows
    _finish(setting.device)
    return samples / (time.perf_counter() - started)


def main() -> None:
    options = parsed()
    if not torch.cuda.is_available():
        print("No GPU that torch can use here: nothing to measure.")
        return
    peak = matmul_peak(torch.device("cuda"), "bf16", PEAK_S)
    found: list[Figure] = []
    rates: dict[str, Rates] = {}
    for name in options.only or CASES:
        with (
            console.status(name),
            tempfile.TemporaryDirectory(prefix="dmi-bench-", dir=options.folder) as folder,
        ):
            made, rates[name] = figures(CASES[name], Path(folder), "cuda", peak)
            found += made
    text = "\n\n".join(
        (
            f"{torch.cuda.get_device_name()}, bf16 matmul peak {peak / 1e12:.0f} TFLOP/s measured.",
            table(found),
            "Crystal graphs: no such network in this project yet, so not measured.",
        )
    )
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.json:
        host = {**machine(), "gpu": torch.cuda.get_device_name(), "peak_flops": peak}
        result = {"machine": host, "figures": as_json(found), "samples_per_s": rates}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, help="these networks instead of all")
    parser.add_argument("--folder", type=Path, help="for the data, 2 GB; default: temporary")
    parser.add_argument("--json", type=Path, help="all figures and rates")
    parser.add_argument("--markdown", type=Path, help="the table, besides on the terminal")
    return parser.parse_args()


if __name__ == "__main__":
    main()
