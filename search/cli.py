"""``dmi search``: from a recipe to winner.json."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from dmi_hpc import knobs
from dmi_hpc.cli.options import Out, RecipeFile, Resume, new_app, run_of
from dmi_hpc.data.manifest import read_manifest
from dmi_hpc.errors import EXIT_INTERRUPTED, DataError, Interrupted, RunError
from dmi_hpc.files import exclusive
from dmi_hpc.problem import Problem
from dmi_hpc.run import Run, record_command
from dmi_hpc.tasks import make_task
from dmi_hpc.watch import StopFlag, console, progress_bar, say, stop_on_signals
from dmi_hpc.world import detect
from search.driver import Driver
from search.environment import ray_environment, with_absolute_import_paths

app = new_app()

SHOW_EVERY_S = 0.5
WATCH_EVERY_S = 1.0
LEAVE_AFTER_S = 5.0  # of a stop signal: well inside the 30 s that schedulers give


@app.command()
def search(recipe: RecipeFile, out: Out = None, resume: Resume = False) -> None:
    """Search the task's space for the network with the lowest validation error.

    Every evaluation is in RUN/search/journal.jsonl; after an interruption of any kind, --resume
    continues and repeats none that had finished.
    """
    if not detect().is_first:
        sys.stderr.write(
            "this rank is not needed: rank 0 drives the search, its workers are Ray's\n"
        )
        return
    run = run_of(recipe, out)
    if (run.search / "journal.jsonl").exists() and not resume:
        raise RunError(
            f"{run.search}: a search is here already; --resume continues it, or choose another --out"
        )
    if not (run.data / "manifest.json").exists():
        raise DataError(f"{run.data}: no data set. First: dmi data build RECIPE --out {run.folder}")
    Problem.open(make_task(run.recipe.task), run.data)  # once for all workers
    record_command(run)
    with exclusive(run.search, "search"), stop_on_signals() as stop:
        _search(run, stop)


def _search(run: Run, stop: StopFlag) -> None:
    task = make_task(run.recipe.task)
    driver = Driver(
        run.recipe,
        task.space(),
        run.search,
        data=read_manifest(run.data).identity,
    )
    if not driver.done:
        _run(run, driver, task.quantity.unit, stop)
    if not driver.done:
        raise Interrupted(f"{driver.progress.finished} of {driver.progress.budget} evaluations")
    path = driver.write_winner()
    best = driver.evolution.best()
    assert best is not None  # write_winner has refused otherwise
    failed = sum(driver.progress.failures.values())
    say(
        f"{driver.progress.finished} evaluations ({failed} failed): best validation MAE "
        f"{best[1]:.4g} {task.quantity.unit} by network {best[0]}, in {path}"
    )


def _run(run: Run, driver: Driver, unit: str, stop: StopFlag) -> None:
    data = run.data.resolve()
    # Ray puts the working folder on its workers' import path: a user's own search.py would win
    with_absolute_import_paths()
    os.chdir(run.search)
    with ray_environment() as folder:
        from search.tune import TrialContext, cluster, run_trials

        search = run.recipe.search
        with cluster(search, folder) as found, _watched(driver, found.alive) as leave:
            # Ray has put a handler over ours that dumps and dies
            stop.arm(leave)
            driver.start(found.workers, found.trial_memory_GB)
            device = "GPU" if found.gpus else "main"
            console().print(
                f"{found.workers} workers; a trial may use {found.trial_memory_GB:.3g} GB of "
                f"{device} memory"
            )
            context = TrialContext(run.recipe, data, folder, found.trial_memory_GB)
            with _Display(driver, unit) as display:
                run_trials(driver, context, found, display.show, lambda: bool(stop))


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

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._shown_at = 0.0
        self.show()
        self._bar.stop()

    def note(self) -> str:
        """running, failed, best so far, worker utilisation, time left."""
        p, best = self._driver.progress, self._driver.evolution.best()
        parts = [f"{p.running} running", f"{sum(p.failures.values())} failed"]
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
        self._bar.update(self._line, completed=p.finished, note=self.note())
        tenth = max(1, p.budget // 10)
        if not self._out.is_terminal and p.finished // tenth > self._printed:
            self._printed = p.finished // tenth
            self._out.print(f"search {p.finished}/{p.budget}  {self.note()}")
