"""The trainer against loops written by hand, Lightning and DeepSpeed itself.

    python benchmarks/trainer.py                  every figure, about 10 minutes on 4 cores
    python benchmarks/trainer.py --quick          a tiny network, a few steps, a minute: does it run?
    python benchmarks/trainer.py --only ranks     one part
    python benchmarks/trainer.py --json figures.json --markdown figures.md

All train the 17 layers of ElemNet (4.6 M weights) on random rows, one thread a rank. "Ours" is
dmi_hpc.train.fit as `dmi train` calls it, from a shard set through the loader; the loops written by
hand hold their data in memory. All figures are ratios of steps a second measured in turns, each
contender in processes of its own, medians over the repetitions; compare ratios, not rates. Other
programs on the same cores disturb most figures: run it alone. Bytes on the wire are those that the
loopback device counted, headers included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import checkpointing
from loading.report import Figure, as_json, count, machine, table
from loading.timing import Rates, ratio
from rich.console import Console
from training import startup
from training.comparison import Comparison, ComparisonError
from training.problems import ELEMNET, network_of, write_set

from dmi_hpc.models.cost import cost
from dmi_hpc.tasks import make_task

BATCHES = {256: 5, 1024: 2}  # -> steps of a turn, about half a second
SMALL_BATCH = 32
ROWS = 65_536
FLOAT_BYTES = 4
console = Console(stderr=True)


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    repetitions: int
    startup_repetitions: int
    quick: bool

    @classmethod
    def of(cls, *, quick: bool) -> Extent:
        return cls(2, 0, True) if quick else cls(15, 5, False)


class Benchmark:
    """Figures and rates as they come."""

    def __init__(self, folder: Path, extent: Extent) -> None:
        self.folder, self.extent = folder, extent
        self.figures: list[Figure] = []
        self.rates: dict[str, Rates] = {}
        self.sent: dict[str, dict[str, list[float]]] = {}
        self._data: Path | None = None

    def compare(
        self, title: str, contenders: tuple[str, ...], *, batch: int, steps: int, **more: Any
    ) -> str:
        """Measure; returns why it could not be done, or nothing."""
        if self._data is None:
            self._data = write_set(self.folder / "rows", ELEMNET, ROWS)
        if self.extent.quick:
            steps, more = 2, {**more, "small": True, "discarded": 0}
        repetitions = self.extent.repetitions
        comparison = Comparison(self._data, ELEMNET, contenders, batch, steps, repetitions, **more)
        with console.status(title):
            try:
                self.rates[title], self.sent[title] = comparison.run()
            except ComparisonError as error:
                return str(error)
        return ""

    def judge(self, title: str, mine: str, other: str, least: float | None, problem: str) -> None:
        """One figure of a comparison."""
        what = f"{title}: {mine} vs {other}"
        if problem:
            self.figures.append(Figure(what, None, "x", least, detail=problem))
            return
        rates = self.rates[title]
        speed = " and ".join(f"{count(median(rates[name]))}" for name in (mine, other))
        self.figures.append(
            Figure(what, ratio(rates, mine, other), "x", least, detail=f"{speed} steps/s")
        )

    def by_hand(self) -> None:
        for batch, steps in BATCHES.items():
            title = f"1 rank, batch {batch}"
            problem = self.compare(title, ("ours", "by hand"), batch=batch, steps=steps)
            self.judge(title, "ours", "by hand", 0.97, problem)

    def lightning(self) -> None:
        rivals = ("by hand", "Lightning", "Lightning documented")
        for title, small, steps in (
            (f"1 rank, batch {SMALL_BATCH}", False, 20),
            (f"1 rank, batch {SMALL_BATCH}, 2 layers of 64", True, 500),
        ):
            problem = self.compare(
                title, ("ours", *rivals), batch=SMALL_BATCH, steps=steps, small=small
            )
            for rival in rivals:
                least = 1.3 if rival == "Lightning" and not small else None
                self.judge(title, "ours", rival, least, problem)

    def ranks(self) -> None:
        title = "2 ranks, batch 256"
        problem = self.compare(title, ("ours", "DDP"), batch=256, steps=6, ranks=2)
        self.judge(title, "ours", "DDP", 1.0, problem)
        self._wire(title, 2)
        if self.extent.quick:
            return
        title = "4 ranks, batch 256"
        problem = self.compare(title, ("ours", "DDP"), batch=256, steps=6, ranks=4)
        self.judge(title, "ours", "DDP", None, problem)
        self._wire(title, 4)

    def stages(self) -> None:
        contenders = tuple(f"{who} stage {n}" for n in (1, 2) for who in ("ours", "DeepSpeed"))
        for batch, steps in ((SMALL_BATCH, 10), (256, 6)):
            title = f"2 ranks, batch {batch}"
            problem = self.compare(
                f"{title}, stages", contenders, batch=batch, steps=steps, ranks=2
            )
            for stage in (1, 2):
                self.judge(
                    f"{title}, stages",
                    f"ours stage {stage}",
                    f"DeepSpeed stage {stage}",
                    1.2,
                    problem,
                )
        self._wire("2 ranks, batch 256, stages", 2)

    def _wire(self, title: str, ranks: int) -> None:
        """Bytes of a step against the least a ring needs: every rank sends 2 (N - 1) / N of all."""
        weights = cost(network_of(make_task(ELEMNET), small=self.extent.quick)).parameters
        least = 2 * (ranks - 1) * FLOAT_BYTES * weights
        for name, found in self.sent.get(title, {}).items():
            sent = median(found)
            self.figures.append(
                Figure(
                    f"{title}: bytes on the wire of a step, {name} vs ring minimum",
                    sent / least,
                    "x",
                    detail=f"{sent / 1e6:.1f} and {least / 1e6:.1f} MB, all ranks",
                )
            )

    def startup(self) -> None:
        with console.status("start"), tempfile.TemporaryDirectory(dir=self.folder) as folder:
            self.figures.append(startup.figure(Path(folder), self.extent.startup_repetitions))

    def checkpoints(self) -> None:
        with console.status("checkpoints"):
            self.figures += checkpointing.figures(self.folder, quick=self.extent.quick)


PARTS: dict[str, Callable[[Benchmark], None]] = {
    "hand": Benchmark.by_hand,
    "lightning": Benchmark.lightning,
    "ranks": Benchmark.ranks,
    "stages": Benchmark.stages,
    "start": Benchmark.startup,
    "checkpoints": Benchmark.checkpoints,
}


def main() -> None:
    options = parsed()
    extent, host = Extent.of(quick=options.quick), machine()
    if host["load_at_start"] > 0.5:
        console.print(f"load {host['load_at_start']}: other programs run, figures will be off")
    with tempfile.TemporaryDirectory(prefix="dmi-bench-", dir=options.folder) as scratch:
        benchmark = Benchmark(Path(scratch), extent)
        for part in options.only or PARTS:
            PARTS[part](benchmark)
    text = table(benchmark.figures)
    if extent.quick:
        text = (
            f"A tiny network, a few steps: these figures only show that everything runs.\n\n{text}"
        )
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.json:
        found = {
            "machine": host,
            "settings": vars(extent),
            "figures": as_json(benchmark.figures),
            "steps_per_s": benchmark.rates,
            "bytes_per_step": benchmark.sent,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of each, once")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts instead of all")
    parser.add_argument("--folder", type=Path, help="for data and checkpoints, 2 GB")
    parser.add_argument("--json", type=Path, help="all figures and rates")
    parser.add_argument("--markdown", type=Path, help="the table, besides on the terminal")
    return parser.parse_args()


if __name__ == "__main__":
    main()
