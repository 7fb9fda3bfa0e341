"""What a check has found, and helpers to say it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dmi_hpc.errors import counted

Level = Literal["OK", "WARNING", "FAILURE"]


@dataclass(frozen=True)
class Finding:
    """What was found, and, unless all is well, what was expected and what to do."""

    check: str
    level: Level
    found: str
    expected: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Expected:
    """Of the allocation: host names (one for each node), and GPUs and CPUs of a node; None: not known.

    mpi: whether MPI was tried, too.
    """

    hosts: tuple[str, ...]
    gpus: int | None = None
    cpus: int | None = None
    mpi: bool = False


Values = Mapping[str, Any]  # by node
Judge = Callable[[Values, Expected], list[Finding]]


def listed(names: Sequence[str]) -> str:
    """ "node1, node2 and 61 others"."""
    shown, more = ", ".join(names[:6]), len(names) - 6
    return shown + (f" and {counted(more, 'other')}" if more > 0 else "")


def size(count: float) -> str:
    """Bytes, in the decimal unit that suits."""
    for unit, least in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= 0.9995 * least:
            return f"{count / least:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def short(seconds: float) -> str:
    """A measured time, in the unit that suits."""
    for unit, least in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= least:
            return f"{seconds / least:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def differences(values: Mapping[str, Any]) -> str:
    """Which nodes have another value than most: "2.12 on node3, 2.13 on the 3 others"; "": none."""
    if len(groups := Counter(map(str, values.values()))) < 2:
        return ""
    (usual, most), *others = groups.most_common()
    parts = [
        f"{other} on {listed([node for node, value in values.items() if str(value) == other])}"
        for other, _ in others[:3]
    ]
    return ", ".join([*parts, f"{usual} on {counted(most, 'node')}"])


def worst(values: Mapping[str, float], *, high: bool) -> tuple[str, float]:
    """(node, value) of the highest, or the lowest."""
    node = (max if high else min)(values, key=lambda name: values[name])
    return node, values[node]
