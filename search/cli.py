"""``dmi search``: from a recipe to winner.json; ``dmi search COMMAND``: see ``search.commands``."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from dmi_hpc import knobs
from dmi_hpc.cli.options import Out, Resume, run_of
from dmi_hpc.data.manifest import read_manifest
from dmi_hpc.errors import EXIT_INTERRUPTED, DataError, DMIError, Interrupted, RunError
from dmi_hpc.files import exclusive
from dmi_hpc.models.space import SearchSpace
from dmi_hpc.problem import Problem
from dmi_hpc.run import Run, open_run, record_command
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import Task
from dmi_hpc.watch import StopFlag, console, progress_bar, say, stop_on_signals
from dmi_hpc.world import detect
from search.cluster.environment import ray_environment, with_absolute_import_paths
from search.commands import TOOLS, Group
from search.driver import Driver, Start
from search.records.history import JOURNAL, MAIN, home
from search.records.islands import require_name
from search.records.warm import founders_from
from search.setting import founder_defaults
from search.spaces.recipe import recipe_space

app = typer.Typer(
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

SHOW_EVERY_S = 0.5
WATCH_EVERY_S = 1.0
LEAVE_AFTER_S = 5.0  # of a stop signal: well inside the 30 s that schedulers give

RecipeOrRun = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="recipe (TOML), or the run folder of an old search")
]
Island = Annotated[
    str | None, typer.Option(help="name of this search beside others of the same run, elsewhere")
]
From = Annotated[
    list[Path] | None,
    typer.Option("--from", help="run whose best networks are tried first; may be repeated"),
]
LargerSpace = Annotated[
    bool, typer.Option("--larger-space", help="with --resume: the task's space has grown since")
]


@app.callback()
def _group() -> None:
    """Search the task's space for the network with the lowest validation error.

    `dmi search RECIPE` is short for `dmi search run RECIPE`; the other commands look at a search or
    steer it, from any machine that sees its run folder.
    """


@app.command(name="run")
def search(
    recipe: RecipeOrRun,
    out: Out = None,
    resume: Resume = False,
    island: Island = None,
    sources: From = None,
    larger_space: LargerSpace = False,
) -> None:
    """Search the task's space for the network with the lowest validation error.

    Every evaluation is in RUN/search/journal.jsonl; after an interruption of any kind, --resume
    continues and repeats none that had finished. With --island, in RUN/search/islands/NAME.
    """
    if not detect().is_first:
        sys.stderr.write(
            "this rank is not needed: rank 0 drives the search, its workers are Ray's\n"
        )
        return
    if island is not None:
        require_name(island)
    run = _run_of(recipe, out)
    folder = home(run.search, island or MAIN)
    exists = (folder / JOURNAL).exists()
    if exists and not resume:
        raise RunError(
            f"{folder}: a search is here already; --resume continues it, or choose another --out"
        )
    if exists and sources:
        raise RunError(f"{folder}: --from is for the beginning of a search, and this one has begun")
    if not (run.data / "manifest.json").exists():
        raise DataError(f"{run.data}: no data set. First: dmi data build RECIPE --out {run.folder}")
    task = make_task(run.recipe.task)
    Problem.open(task, run.data)  # once for all workers
    space = recipe_space(run.recipe, task)
    founders = (
        founders_from(sources, space, founder_defaults(space, run.recipe.train)) if sources else ()
    )
    record_command(run)
    with exclusive(folder, "search"), stop_on_signals() as stop:
        _search(run, task, space, Start(island or MAIN, founders, larger_space), stop)


def _run_of(place: Path, out: Path | None) -> Run:
    """Of a recipe, or of a run folder, which has its own."""
    if not place.is_dir():
        return run_of(place, out)
    if out is not None:
        raise RunError(
            f"{place}: a run folder has its recipe: leave --out away, or give a recipe file"
        )
    return open_run(place.resolve())


def _search(run: Run, task: Task, space: SearchSpace, start: Start, stop: StopFlag) -> None:
    identity = read_manifest(run.data).identity
    driver = Driver(run.recipe, space, run.search, data=identity, start=start)
    for warning in driver.warnings:
        console().print(f"warning: {warning}", markup=False)
    if not driver.done:
        _run_session(run, driver, task.measure[1], stop)
    path = driver.write_winner()
    best = driver.halving.best()
    assert best is not None  # write_winner has refused otherwise
    progress, measure = driver.progress, task.measure[0]
    unit = f" {task.measure[1]}" if task.measure[1] else ""
    failed = sum(progress.failures.values())
    elsewhere = f", {progress.elsewhere} on other islands" if progress.elsewhere else ""
    asked = "stopped as asked: " if driver.stopped else ""
    say(
        f"{asked}{progress.finished} evaluations ({failed} failed){elsewhere}: best validation "
        f"{measure} {best[1]:.4g}{unit} by network {driver.name_of(best[0])}, in {path}"
    )


def _run_session(run: Run, driver: Driver, unit: str, stop: StopFlag) -> None:
    """Evaluate until nothing is left; how it ended is in the journal. Raises Interrupted."""
    try:
        _run(run, driver, unit, stop)
        if not driver.done:
            raise Interrupted(f"{driver.progress.finished} of {driver.progress.budget} evaluations")
    except Interrupted:
        if not driver.stopped or stop:
            driver.end("interrupted")
            raise
    except DMIError:
        driver.end("failed")
        raise
    driver.end("stopped" if driver.stopped else "finished")


def _run(run: Run, driver: Driver, unit: str, stop: StopFlag) -> None:
    data = run.data.resolve()
    # Ray puts the working folder on its workers' import path: a user's own search.py would win
    with_absolute_import_paths()
    os.chdir(run.search)
    with ray_environment() as folder:
        from search.cluster.capacity import Shape
        from search.cluster.tune import TrialContext, cluster, run_trials

        search = run.recipe.search
        shape = Shape(search.trial_threads, search.ranks, search.gpu_share)
        with cluster(search, folder, shape) as found, _watched(driver, found.alive) as leave:
            # Ray has put a handler over ours that dumps and dies
            stop.arm(leave)
            driver.start(found.workers, found.trial_memory_GB, {"unit": unit})
            if found.missing:
                console().print(f"warning: {found.missing}", markup=False)
            device = "GPU" if found.gpus else "main"
            console().print(
                f"{found.workers} workers; a trial may use {found.trial_memory_GB:.3g} GB of "
                f"{device} memory"
            )
            context = TrialContext(
                run.recipe,
                data,
                folder,
                found.trial_memory_GB,
                ranks=search.ranks,
                gpu_share=search.gpu_share,
                kept=driver.folder,
            )
            with _Display(driver, unit) as display:

                def halted() -> bool:
                    return bool(stop) or driver.stopped_now

                run_trials(driver, context, found, display.show, halted)


@contextmanager
def _watched(driver: Driver, alive: Callable[[], bool]) -> Iterator[Callable[[], None]]:
    """End within a bounded time once Ray is gone, even if a call into it hangs.

    Yields what arranges the same after a stop signal: a scheduler signals Ray's own processes too.
    The journal is on disk before every step, so there is nothing left to save.
    """
    ended, leaving = threading.Event(), threading.Event()

    def watch() -> None:
        while not leaving.is_set() and alive():
            leaving.wait(WATCH_EVERY_S)
            if ended.is_set():
                return
        if not ended.wait(LEAVE_AFTER_S):
            done = f"{driver.progress.finished} of {driver.progress.budget} evaluations"
            sys.stderr.write(f"interrupted: {done}{knobs.resume_hint()}\n")
            sys.stderr.flush()
            os._exit(EXIT_INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield leaving.set
    except Interrupted:
        if not driver.stopped_now:
            leaving.set()  # shutting Ray down may hang too
        raise
    finally:
        if not leaving.is_set():
            ended.set()


class _Display:
    """One line of progress: a bar on a terminal, else ten lines in all."""

    def __init__(self, driver: Driver, unit: str) -> None:
        self._driver, self._unit, self._out = driver, unit, console()
        self._bar = progress_bar(self._out, remaining=False)  # the note has a better one
        self._line = self._bar.add_task("search", total=driver.progress.budget, note="")
        self._shown_at, self._printed = 0.0, 0
        self._warned = set(driver.warnings)  # said already

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._shown_at = 0.0
        self.show()
        self._bar.stop()

    def note(self) -> str:
        """running, failed, best so far, worker utilisation, time left."""
        p, best = self._driver.progress, self._driver.halving.best()
        parts = [f"{p.running} running", f"{sum(p.failures.values())} failed"]
        if p.elsewhere:
            parts.append(f"{p.elsewhere} on other islands")
        if self._driver.stopped:
            parts.append("stopping as asked")
        if best is not None:
            parts.append(f"best {best[1]:.4g} {self._unit}")
        parts.append(f"workers {100 * p.utilisation:.0f} % busy")
        if p.remaining_s is not None:
            parts.append(f"{timedelta(seconds=round(p.remaining_s))} left")
        return ", ".join(parts)

    def show(self) -> None:
        now, p = time.monotonic(), self._driver.progress
        if now - self._shown_at < SHOW_EVERY_S:
            return
        self._shown_at = now
        self._driver.attend()
        for warning in self._driver.warnings:
            if warning not in self._warned:
                self._warned.add(warning)
                self._out.print(f"warning: {warning}", markup=False)
        done = p.finished + p.elsewhere
        self._bar.update(self._line, completed=done, total=p.budget, note=self.note())
        tenth = max(1, p.budget // 10)
        if not self._out.is_terminal and done // tenth > self._printed:
            self._printed = done // tenth
            self._out.print(f"search {done}/{p.budget}  {self.note()}")


for _tool in TOOLS:
    app.command()(_tool)
