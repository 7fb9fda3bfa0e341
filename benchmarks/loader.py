"""The loader against memory, against other loaders, and what its guarantees cost.

    python benchmarks/loader.py                 every figure, about 12 minutes on 4 cores
    python benchmarks/loader.py --quick         small sets, no other loaders, seconds: does it run?
    python benchmarks/loader.py --only graphs   one part
    python benchmarks/loader.py --elemnet TABLE.csv      with the data wait of a training
    python benchmarks/loader.py --json figures.json --markdown figures.md

Other loaders are no dependencies of the project; those that are installed are measured, each in the
best of 0, 2 and 4 workers:

    pip install webdataset mosaicml-streaming litdata torch_geometric

(mosaicml-streaming 0.13 asks for numpy < 2.2; `pip install --no-deps` keeps a newer one, and works.)

All figures are ratios of rates measured in turns within one run, medians over 5 repetitions, data in
the page cache; compare ratios, not rates. Other programs on the same cores disturb most figures: run
it alone. Rivals shuffle, have as many samples a batch, and one thread in torch; only their steady
rate counts, not the start of an epoch, which counts for this loader. Of the smallest samples they
get 200 000 rows, this loader 1 000 000.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from loading import features
from loading.cases import CASES, GRAPH_BATCH, GRAPHS, Case, make_graphs, write_graphs, write_set
from loading.ours import BACKEND
from loading.report import Figure, as_json, count, machine, markdown, table
from loading.rival_process import Trial, rivals
from loading.rivals import PACKAGES, installed
from loading.timing import Rates, Settings, best, interleaved, ratio, repeated
from rich.console import Console

DENSE_RIVALS = ["webdataset", "mosaicml-streaming", "litdata", "h5py DataLoader"]
GRAPH_RIVALS = ["PyG"]
MANY_SHARDS = 64
console = Console(stderr=True)


class Benchmark:
    """Figures and rates as they come."""

    def __init__(self, folder: Path, settings: Settings, *, with_rivals: bool) -> None:
        self.folder, self.settings = folder, settings
        self.with_rivals = with_rivals
        self.figures: list[Figure] = []
        self.trials: dict[str, dict[str, Trial]] = {}
        self.rates: dict[str, Rates] = {}

    @contextmanager
    def place(self, name: str) -> Iterator[Path]:
        """A folder for one part; the page cache need not hold all parts at once."""
        folder = self.folder / name
        folder.mkdir()
        with console.status(name):
            yield folder
        shutil.rmtree(folder)

    def dense(self, case: Case) -> None:
        from loading import ours

        settings, names = self.settings, DENSE_RIVALS if self.with_rivals else []
        with self.place(case.title) as folder:
            array = case.array()
            one = write_set(folder / "one", array, 1)
            many = write_set(folder / "many", array, MANY_SHARDS)
            epochs = {
                "gather": ours.gathered(array, case.batch),
                "memcpy": ours.copied(array, case.batch),
                "gather, 3 buffers": ours.gathered(array, case.batch, 3),
                "memcpy, 3 buffers": ours.copied(array, case.batch, 3),
                "read": ours.read(one, case.batch),
            }
            for threads in ours.THREADS:
                for name, source, more in (
                    ("shuffled", one, {}),
                    (f"{MANY_SHARDS} shards", many, {}),
                    ("sequential", one, {"shuffle": "none"}),
                ):
                    loader = ours.loader_of(source, ("x",), case.batch, threads, **more)
                    epochs[f"{name}, {threads} threads"] = ours.loaded(loader, "x")
            windows = {name: repeated(epoch, settings.seconds) for name, epoch in epochs.items()}
            np.save(folder / "source.npy", array[: case.rival_rows])
            with rivals(
                names,
                folder,
                batch=case.batch,
                rows=case.rival_rows,
                seconds=settings.rival_seconds,
            ) as (trials, rival_windows):
                rates = interleaved({**windows, **rival_windows}, settings.repetitions)
            self.trials[case.name], self.rates[case.name] = trials, rates
            self._dense_figures(case, rates, trials)
            self._verification(case, one)

    def _dense_figures(self, case: Case, rates: Rates, trials: dict[str, Trial]) -> None:
        def against(what: str, mine: str, other: str, least: float | None) -> Figure:
            """Ours with as many threads as are best; all are named."""
            arms = [name for name in rates if name.startswith(f"{mine},")]
            chosen = max(arms, key=lambda name: ratio(rates, name, other))
            each = ", ".join(
                f"{name.partition(', ')[2]} {ratio(rates, name, other):.2f}" for name in arms
            )
            value = ratio(rates, chosen, other)
            speed = count(median(rates[chosen]))
            return Figure(f"{case.title}: {what}", value, "x", least, detail=f"{each}; {speed}/s")

        self.figures.append(against("shuffled vs gather from RAM", "shuffled", "gather", 0.85))
        bound = 0.80 if case.sequential else None
        self.figures.append(against("sequential vs memcpy", "sequential", "memcpy", bound))
        self.figures.append(
            Figure(f"{case.title}: ShardSet.read vs memcpy", ratio(rates, "read", "memcpy"), "x")
        )
        for ceiling in ("gather", "memcpy"):
            what = f"{case.title}: {ceiling} from RAM into 3 buffers in turn vs into one"
            self.figures.append(Figure(what, ratio(rates, f"{ceiling}, 3 buffers", ceiling), "x"))
        mine = best(rates, [name for name in rates if name.startswith("shuffled,")])
        self.figures.append(
            against(f"{MANY_SHARDS} shards vs one, shuffled", f"{MANY_SHARDS} shards", mine, None)
        )
        running = [name for name, trial in trials.items() if not trial.problem]
        self.figures.append(
            versus(f"{case.title}: shuffled vs the best other loader", rates, mine, running, 10.0)
        )

    def _verification(self, case: Case, folder: Path) -> None:
        from loading import ours

        for epochs in (1, ours.RUN_EPOCHS):
            rates = interleaved(
                {
                    verify: repeated(ours.verified(folder, case.batch, verify, epochs), 0.0)
                    for verify in ("read", "none")
                },
                self.settings.repetitions,
            )
            self.figures.append(
                Figure(
                    f"{case.title}: cost of checksums while reading, "
                    + ("first epoch" if epochs == 1 else f"{epochs} epochs"),
                    100 * (ratio(rates, "none", "read") - 1),
                    "%",
                    most=10.0 if epochs > 1 else None,
                    detail=f"{count(median(rates['read']))}/s with, "
                    f"{count(median(rates['none']))}/s without",
                )
            )

    def graphs(self) -> None:
        from loading import ours

        settings, names = self.settings, GRAPH_RIVALS if self.with_rivals else []
        with self.place("graphs") as folder:
            graphs: dict[str, Any] = make_graphs(8 * GRAPH_BATCH + 3 if settings.small else GRAPHS)
            made = write_graphs(folder / "set", graphs)
            np.savez(folder / "source.npz", **graphs)
            fields = ("z", "positions", "pairs", "distance", "y")
            windows = {}
            for threads in ours.THREADS:
                loader = ours.loader_of(made, fields, GRAPH_BATCH, threads, transform=ours.collate)
                epoch = ours.loaded(loader, "y")
                windows[f"graphs, {threads} threads"] = repeated(epoch, settings.seconds)
            with rivals(
                names,
                folder,
                batch=GRAPH_BATCH,
                rows=len(graphs["y"]),
                seconds=settings.rival_seconds,
            ) as (trials, rival_windows):
                rates = interleaved({**windows, **rival_windows}, settings.repetitions)
            self.trials["graphs"], self.rates["graphs"] = trials, rates
            mine = best(rates, list(windows))
            what = f"graphs, batches of {GRAPH_BATCH}: collated vs PyG InMemoryDataset + DataLoader"
            running = [name for name, trial in trials.items() if not trial.problem]
            self.figures.append(versus(what, rates, mine, running, 5.0))

    def sampler(self) -> None:
        from loading import ours

        self.figures.append(
            Figure(
                "memory of the sampler at 1e9 samples, one of 4 ranks",
                ours.sampler_megabytes(10**9),
                " MB",
                most=1.0,
                detail="peak by tracemalloc",
            )
        )

    def build(self, *, in_memory: bool) -> None:
        """in_memory: in /dev/shm, if it has room, where no disk slows the processes down."""
        from loading import building

        shared, needed = Path("/dev/shm"), 4 * 2**30
        roomy = in_memory and shared.is_dir() and shutil.disk_usage(shared).free > needed
        with (
            console.status("build"),
            tempfile.TemporaryDirectory(
                prefix="dmi-bench-", dir=shared if roomy else self.folder
            ) as folder,
        ):
            self.figures += building.figures(Path(folder), self.settings)

    def training(self, table: Path | None) -> None:
        from loading import training

        with self.place("training") as folder:
            self.figures.append(training.data_wait(table, folder))

    def all_dense(self) -> None:
        for case in CASES:
            self.dense(case.small() if self.settings.small else case)

    def rivals_table(self) -> str:
        rows = []
        for case, trials in self.trials.items():
            for name, trial in trials.items():
                rates = self.rates[case].get(name, [])
                rows.append(
                    (
                        case,
                        f"{name} {trial.version}",
                        *(count(trial.rates[w]) if w in trial.rates else "" for w in (0, 2, 4)),
                        trial.problem or f"{count(median(rates))}, {trial.workers} workers",
                        f"{trial.bytes / 1e6:.0f}" if trial.bytes else "",
                    )
                )
        header = ("data", "loader", "0 workers", "2", "4", "best, median", "MB on disk")
        return markdown(header, rows)


def versus(what: str, rates: Rates, mine: str, running: list[str], least: float) -> Figure:
    if not running:
        return Figure(what, None, "x", least, detail="none installed, or not asked for")
    name = best(rates, running)
    each = ", ".join(f"{other} {ratio(rates, mine, other):.1f}" for other in running)
    detail = f"{mine}: {count(median(rates[mine]))}/s; vs {each}"
    return Figure(what, ratio(rates, mine, name), "x", least, detail=detail)


def main() -> None:
    options = parsed()
    settings = Settings.of(quick=options.quick)
    host = machine()
    if host["load_at_start"] > 0.5:
        console.print(f"load {host['load_at_start']}: other programs run, figures will be off")
    # a small set fits in what their workers read ahead: such rates would mean nothing
    with_rivals = not (options.quick or options.no_rivals)
    found = {name: installed(name) for name in PACKAGES} if with_rivals else {}
    with tempfile.TemporaryDirectory(prefix="dmi-bench-", dir=options.folder) as scratch:
        benchmark = Benchmark(Path(scratch), settings, with_rivals=with_rivals)
        for part in options.only or PARTS:
            PARTS[part](benchmark, options)
    parts = [table(benchmark.figures)]
    if settings.small:
        parts.insert(0, "Small sets: these figures only show that everything runs.")
    if any(benchmark.trials.values()):
        parts.append(benchmark.rivals_table())
    missing = [name for name, version in found.items() if version is None]
    if missing:
        parts.append(f"Not installed, so not measured: {', '.join(missing)}.")
    parts.append(features.absent())
    text = "\n\n".join(parts)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if options.json:
        options.json.write_text(json.dumps(result(benchmark, host, settings), indent=1) + "\n")


def result(benchmark: Benchmark, host: dict[str, Any], settings: Settings) -> dict[str, Any]:
    return {
        "machine": host,
        "settings": vars(settings),
        "figures": as_json(benchmark.figures),
        "rates": benchmark.rates,
        "rivals": {
            case: {name: vars(trial) for name, trial in trials.items()}
            for case, trials in benchmark.trials.items()
        },
    }


PARTS: dict[str, Callable[[Benchmark, argparse.Namespace], None]] = {
    "dense": lambda benchmark, options: benchmark.all_dense(),
    "graphs": lambda benchmark, options: benchmark.graphs(),
    "sampler": lambda benchmark, options: benchmark.sampler(),
    "build": lambda benchmark, options: benchmark.build(in_memory=options.folder is None),
    "training": lambda benchmark, options: benchmark.training(options.elemnet),
}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sets, 2 repetitions, no rivals")
    parser.add_argument("--no-rivals", action="store_true", help="only this project and memory")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts instead of all")
    parser.add_argument(
        "--backend",
        choices=["auto", "mmap", "ram"],
        default="auto",
        help="of our reader; auto, the default, is ram for sets of this size",
    )
    parser.add_argument("--folder", type=Path, help="for the data, 4 GB; default: temporary")
    parser.add_argument("--elemnet", type=Path, help="table of formulas and targets, or a set")
    parser.add_argument("--json", type=Path, help="all figures and rates")
    parser.add_argument("--markdown", type=Path, help="the tables, besides on the terminal")
    arguments = parser.parse_args()
    BACKEND[0] = arguments.backend
    return arguments


if __name__ == "__main__":
    main()
