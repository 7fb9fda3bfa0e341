"""Builds of a set from an array in memory, by one process, by four, and by plain h5py."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loading.cases import field_of, plan_of
from loading.report import Figure, count
from loading.timing import Settings, Window, interleaved, ratio

Array = np.ndarray[Any, Any]
SHARDS, PROCESSES = 16, 4
SAMPLE = (60, 60)
BYTES, SMALL_BYTES = 2**30, 2**23


@dataclass
class Rows:
    """make_rows of a mapped array: its pages are in memory, nothing is computed."""

    path: Path
    array: Array | None = None

    def __call__(self, ids: Array) -> dict[str, Array]:
        if self.array is None:
            self.array = np.load(self.path, mmap_mode="r").view(np.ndarray)
        rows = self.array[ids[0] : ids[-1] + 1]
        return {"x": rows, "split": np.zeros(len(rows), dtype=np.uint8)}


def built(source: Path, target: Path, rows: int, processes: int) -> Window:
    from dmi_hpc.data.build import Alone, build

    field = field_of("x", np.load(source, mmap_mode="r"))
    plan = plan_of((field,), max(1, rows // SHARDS), rows)

    def window() -> float:
        started = time.perf_counter()
        made = build(
            target, plan, Rows(source), Alone(), processes, lambda _: None, rows_per_call=256
        )
        spent = time.perf_counter() - started
        shutil.rmtree(target)
        return made.rows / spent

    return window


def plainly_written(source: Path, target: Path) -> Window:
    """One file by h5py, on the disk when it returns, as a built set is."""
    import h5py

    def window() -> float:
        started = time.perf_counter()
        array = np.load(source, mmap_mode="r")
        with h5py.File(target, "w") as file:
            file.create_dataset("x", data=array)
        descriptor = os.open(target, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        spent = time.perf_counter() - started
        target.unlink()
        return len(array) / spent

    return window


def figures(folder: Path, settings: Settings) -> list[Figure]:
    rows = (SMALL_BYTES if settings.small else BYTES) // (int(np.prod(SAMPLE)) * 4)
    source, target = folder / "rows.npy", folder / "built"
    np.save(source, np.random.default_rng(3).random((rows, *SAMPLE), dtype=np.float32))
    few = PROCESSES * SHARDS
    np.save(folder / "few.npy", np.zeros((few, 1), dtype=np.float32))
    windows = {
        "1 process": built(source, target, rows, 1),
        "4 processes": built(source, target, rows, PROCESSES),
        "h5py": plainly_written(source, folder / "plain.h5"),
        "start": built(folder / "few.npy", target, few, PROCESSES),
    }
    small = settings.small  # processes take a second to start
    rates = interleaved(windows, 1 if small else settings.repetitions, warm_up=not small)
    for name in ("few.npy", "rows.npy"):
        (folder / name).unlink()
    # seconds of one process, over those of four less what the same four take for a set of nothing
    gains = [
        rows / one / (rows / four - few / start) if four / rows < start / few else None
        for one, four, start in zip(
            *(rates[name] for name in ("1 process", "4 processes", "start")), strict=True
        )
    ]
    known = [gain for gain in gains if gain is not None]
    median = {name: float(np.median(found)) for name, found in rates.items()}
    gigabytes = {name: f"{median[name] * np.prod(SAMPLE) * 4 / 1e9:.2f} GB/s" for name in windows}
    size = f"{rows * np.prod(SAMPLE) * 4 / 1e9:.2g} GB, {SHARDS} shards"
    return [
        Figure(
            "build, 4 processes vs 1, their start not counted",
            float(np.median(known)) if len(known) == len(gains) else None,
            "x",
            least=3.0,
            detail=f"{size}; the start takes {few / median['start']:.2g} s",
        ),
        Figure(
            "the same with their start",
            ratio(rates, "4 processes", "1 process"),
            "x",
            detail=f"{gigabytes['4 processes']}, one process {gigabytes['1 process']}",
        ),
        Figure(
            "build, 1 process vs h5py's create_dataset (no checksums, statistics, splits)",
            ratio(rates, "1 process", "h5py"),
            "x",
            detail=f"h5py {gigabytes['h5py']}, {count(median['h5py'])} samples/s",
        ),
        Figure(
            "build, 4 processes vs h5py's create_dataset",
            ratio(rates, "4 processes", "h5py"),
            "x",
        ),
    ]
