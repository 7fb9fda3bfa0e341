"""Figures with their bounds, as a markdown table and as JSON."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Figure:
    """One line of the table. value: None if it could not be measured; `detail` says why.

    least, most: the bounds, of which a figure has one or none.
    """

    what: str
    value: float | None
    unit: str = ""
    least: float | None = None
    most: float | None = None
    detail: str = ""

    @property
    def bound(self) -> str:
        if self.least is not None:
            return f">= {self.least:g}{self.unit}"
        return f"< {self.most:g}{self.unit}" if self.most is not None else ""

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if self.least is not None:
            return "yes" if self.value >= self.least else "**no**"
        return "" if self.most is None else "yes" if self.value < self.most else "**no**"

    @property
    def cells(self) -> tuple[str, ...]:
        shown = "" if self.value is None else f"{_three(self.value)}{self.unit}"
        return self.what, shown, self.bound, self.verdict, self.detail


def _three(value: float) -> str:
    """Three digits, no exponent."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def count(value: float) -> str:
    """Samples a second, in k or M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return _three(value)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [tuple(header)]
    lines += [("---",) * len(lines[0]), *(tuple(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(figures: Iterable[Figure]) -> str:
    header = ("what", "measured", "wanted", "reached", "")
    return markdown(header, (figure.cells for figure in figures))


def machine() -> dict[str, Any]:
    model = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": psutil.cpu_count(),
        "memory_GB": round(psutil.virtual_memory().total / 1e9, 1),
        "load_at_start": round(psutil.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in ("numpy", "torch", "h5py")},
    }


def as_json(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    return [{**asdict(figure), "reached": figure.verdict.strip("*")} for figure in figures]
