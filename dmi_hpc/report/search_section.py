"""What the page says of a search: figures, tables, and the winner's line of descent."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from dmi_hpc.report import diagrams, search_figures
from dmi_hpc.report.collect import Run
from dmi_hpc.report.evaluations import Search, Trial, changes, lineage
from dmi_hpc.report.formatting import MISSING
from dmi_hpc.report.genes import Importance, genes, importance
from dmi_hpc.report.searching import diversity, operators, surrogate_quality

LINEAGE_SHOWN = 12
CHANGES_SHOWN = 5
GENES_SHOWN = 12
LEAST_SHARE = 0.01
FAILURES = {
    "invalid": "cannot be built",
    "memory": "does not fit",
    "limit": "costs more than it may",
    "nan": "loss or error not finite",
    "timeout": "not finished in time",
    "exception": "code of the task raised",
    "lost": "its worker died",
    "data": "its data could not be read",
}


def search_context(run: Run) -> dict[str, Any]:
    """For the template. Where the journal does not tell something, its figure is None."""
    search = run.search
    if search is None or not search.trials:
        return {"progress": None, "genealogy": None}
    best = search.best.id if search.best else None
    winner = search.number(run.winner.name) if run.winner else best
    born = winner is not None and winner in search.trials
    quality = surrogate_quality(search)
    return {
        "progress": _svg(search_figures.search_progress(search)) if search.elapsed else None,
        "timeline": _svg(search_figures.timeline(search)) if search.elapsed else None,
        "paretos": [_svg(search_figures.pareto(search, c, winner)) for c in costs_shown(search)],
        "operators": operators(search),
        "health": _svg(search_figures.health(diversity(search), quality)),
        "surrogate_known": bool(quality),
        "genes": _genes(search),
        "failure_texts": FAILURES,
        "genealogy": Markup(diagrams.genealogy(search, winner))
        if born and winner is not None
        else None,
        "winner_id": winner,
        "steps": _steps(search, winner) if born and winner is not None else [],
    }


def _svg(drawn: str | None) -> Markup | None:
    return None if drawn is None else Markup(drawn)


def costs_shown(search: Search) -> list[str]:
    """What is drawn against the fitness: the further objectives, else the number of parameters."""
    wanted = search.objectives or ("parameters",)
    return [c for c in wanted if any(t.metrics.get(c, 0) > 0 for t in search.finished)]


def _genes(search: Search) -> Markup | None:
    columns = genes([trial.genome for trial in search.finished])
    found = importance(columns, [trial.fitness or 0.0 for trial in search.finished])
    shown: list[Importance] = [gene for gene in found if gene.share >= LEAST_SHARE][:GENES_SHOWN]
    return _svg(search_figures.gene_importance(shown)) if shown else None


def _steps(search: Search, winner: int) -> list[tuple[Trial, str]]:
    """The winner's line of descent with what each generation changed, the newest last."""
    line = lineage(search, winner)
    steps = []
    for before, after in zip([None, *line], line, strict=False):
        if before is None:
            steps.append((after, "start of the line"))
            continue
        found = changes(before.genome, after.genome)
        more = len(found) - CHANGES_SHOWN
        shown = found[:CHANGES_SHOWN] + ([f"and {more} more"] if more > 0 else [])
        steps.append((after, "; ".join(shown) or MISSING))
    return steps[-LINEAGE_SHOWN:]
