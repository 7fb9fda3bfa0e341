"""``dmi search status | top | stop | extend | merge | export``: of a search that is there."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from typer.core import TyperGroup

from dmi_hpc.cli.options import RunFolder
from dmi_hpc.errors import RunError, counted
from dmi_hpc.files import write_text, writing
from dmi_hpc.run import open_run
from dmi_hpc.watch import say
from search.records.control import raise_budget, read_control, request_stop
from search.records.history import Evaluation, best_first, evaluations
from search.records.status import Observer, page
from search.results.refining import refine

WIDTH = 160  # of a table in a pipe
WATCH_S = 2.0

Place = Annotated[Path, typer.Argument(metavar="RUN", help="run folder, or a journal of a search")]


class Group(TyperGroup):
    """`dmi search RECIPE` means `dmi search run RECIPE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


def _terminal() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)


def status(
    run: Place,
    watch: Annotated[bool, typer.Option("--watch", help="until the search ends")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """What the search in RUN does: read from its journal, on any machine that sees it."""
    observer = Observer(run, watching=watch)
    now = observer.look(time.time())
    if as_json:
        say(json.dumps(now.as_json(), indent=1))
    elif not watch:
        _terminal().print(page(now))
    else:
        _watch(observer)


def _watch(observer: Observer) -> None:
    out = _terminal()
    with Live(console=out, auto_refresh=False, transient=False) as live:
        try:
            while (now := observer.look(time.time())).alive:
                live.update(page(now), refresh=True)
                time.sleep(WATCH_S)
            live.update(page(now), refresh=True)
        except KeyboardInterrupt:  # the way to end it
            return


def top(
    run: Place,
    count: Annotated[int, typer.Option("-n", min=1, help="networks shown")] = 10,
) -> None:
    """The best networks so far."""
    best = best_first(evaluations(run))[:count]
    if not best:
        raise RunError(f"{run}: no evaluation has succeeded so far. See: dmi search status {run}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("network", "fitness", "seconds", "origin", "genome"):
        table.add_column(
            name,
            justify="right" if name in ("fitness", "seconds") else "left",
            overflow="fold" if name == "genome" else "ellipsis",
            no_wrap=name != "genome",
        )
    for found in best:
        parents = f" of {', '.join(map(str, found.parents))}" if found.parents else ""
        origin, genome = f"{found.origin}{parents}", brief(found.genome)
        table.add_row(found.name, f"{found.fitness:.4g}", f"{found.seconds:.1f}", origin, genome)
    _terminal().print(table)


def brief(genome: Mapping[str, Any]) -> str:
    """A genome in a line: its blocks by their widths, then its single values."""
    parts = [_part(name, value) for name, value in genome.items() if value not in (None, [])]
    return ", ".join(part for part in parts if part)


def _part(name: str, value: Any) -> str:
    if isinstance(value, Mapping) and name == "hyper":
        return " ".join(f"{key}={_short(each)}" for key, each in value.items())
    if isinstance(value, Mapping):
        return f"{name} ({brief(value)})"
    if isinstance(value, list):
        return f"{name} {'-'.join(_short(_width(each)) for each in value)}"
    return f"{name} {_short(value)}"


def _width(gene: Any) -> Any:
    """Of a block: its first number."""
    if not isinstance(gene, Mapping):
        return gene
    return next(
        (each for each in gene.values() if isinstance(each, int)), next(iter(gene.values()))
    )


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def stop(
    run: RunFolder,
    now: Annotated[
        bool, typer.Option("--now", help="leave trials that run; --resume evaluates them again")
    ] = False,
) -> None:
    """End the search in RUN, with all its islands, from any machine: no further trial starts.

    It ends as a finished one does, with its winner; --resume would go on.
    """
    alive = [island for island in Observer(run).look(time.time()).islands if _runs(island.state)]
    if not alive:
        raise RunError(f"{run}: no search runs here. See: dmi search status {run}")
    request_stop(open_run(run).search, "now" if now else "drain")
    how = "is left" if now else "ends first"
    say(
        f"{counted(len(alive), 'search').replace('searchs', 'searches')} asked to stop; what runs {how}"
    )


def _runs(state: str) -> bool:
    return state in ("running", "silent")


def extend(
    run: RunFolder,
    count: Annotated[int, typer.Option("--evaluations", min=1, help="budget, of all islands")],
) -> None:
    """Give the search in RUN more evaluations, whether it runs or has ended."""
    found, folder = Observer(run).look(time.time()), open_run(run).search
    before = found.budget or 0
    if count <= before:
        raise RunError(
            f"{run}: its budget is {before} evaluations already ({found.finished} are done); expected "
            "more. To end it earlier: dmi search stop RUN"
        )
    raise_budget(folder, count)
    assert read_control(folder).evaluations == count
    running = any(_runs(island.state) for island in found.islands)
    then = "it is taken up at once" if running else f"continue with: dmi search {run} --resume"
    say(f"{run}: {before} -> {count} evaluations, {found.finished} are done; {then}")


def merge(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders")],
    out: Annotated[Path, typer.Option(help="run folder to make")],
) -> None:
    """Make one search of several of the same space and data, islands included.

    Every network is in it once. It can be continued, reported and exported like any other.
    """
    from search.records.merge import merge as merged

    run, kept, duplicates = merged([path.resolve() for path in runs], out.resolve())
    say(
        f"{run.folder}: {counted(kept, 'evaluation')}, {counted(duplicates, 'duplicate')} left out. "
        f"Continue with: dmi search extend {out} --evaluations N; dmi search {out} --resume"
    )


def export(
    run: RunFolder,
    network: Annotated[
        str | None, typer.Option(help="name as `top` shows it; default: the best")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="recipe to write; default: print it")] = None,
) -> None:
    """Write the recipe that trains the best network of RUN: what `dmi train` takes."""
    from dmi_hpc.tasks import make_task
    from search.results.recipes import to_toml, trained_with, training_recipe
    from search.spaces.genome import decode, from_json
    from search.spaces.recipe import recipe_space

    if out is not None and out.exists():
        raise RunError(f"{out}: exists already; remove it or choose another --out")
    found, opened = _chosen(run, network), open_run(run.resolve())
    genome = from_json(found.genome)
    recipe = opened.recipe
    layers = decode(genome, recipe_space(recipe, make_task(recipe.task)).network)
    hyper = trained_with(genome, found.metrics)
    text = to_toml(
        training_recipe(recipe, opened.data, layers, hyper, recipe.seed).model_copy(
            update={"name": f"{recipe.name}-{found.name.replace(':', '-')}"}
        )
    )
    if out is None:
        say(text.rstrip())
        return
    with writing(out.parent):
        write_text(out, text)
    say(
        f"{out}: network {found.name}, validation error {found.fitness:.4g}. Train it: dmi train {out}"
    )


def _chosen(run: Path, network: str | None) -> Evaluation:
    best = best_first(evaluations(run))
    if not best:
        raise RunError(f"{run}: no evaluation has succeeded so far. See: dmi search status {run}")
    if network is None:
        return best[0]
    for found in best:
        if found.name == network:
            return found
    raise RunError(
        f"--network {network}: no successful evaluation of that name in {run}. See: dmi search top {run}"
    )


TOOLS = (status, top, stop, extend, merge, export, refine)
