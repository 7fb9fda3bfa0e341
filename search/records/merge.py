"""Several searches of the same space and data as one journal, to be continued or reported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmi_hpc.config import Recipe
from dmi_hpc.data.manifest import read_manifest, require_identity
from dmi_hpc.errors import TRANSIENT, RunError
from dmi_hpc.files import atomic_file, writing
from dmi_hpc.run import Run, open_run
from search.records.history import JOURNAL, Evaluation, Reader, readers
from search.records.journal import VERSION, outcome_fields
from search.records.lines import encode
from search.records.provenance import code_version, process

# what a fitness does not depend on
_FREE_TABLES = {"name", "seed", "data", "model", "launch"}
_FREE_KEYS = {
    "population",
    "initial",
    "surrogate",
    "adaptive",
    "replacement",
    "patience",
}  # of [search]


def merge(places: Sequence[Path], out: Path) -> tuple[Run, int, int]:
    """Make the run `out` of all searches in the runs at `places`.

    Returns it, the number of its evaluations, and that of duplicates left out. Raises RunError if
    the searches cannot be compared, or `out` holds a run already.
    """
    runs = [open_run(place) for place in places]
    for run in runs[1:]:
        _require_alike(runs[0], run)
    sources = [(run, reader) for run in runs for reader in readers(run.folder)]
    found = [(run, reader, e) for run, reader in sources for e in reader.poll()]
    header = _header(sources)
    if (out / "run.json").exists():
        raise RunError(f"{out}: holds a run already; choose another --out")
    kept = _unique(found)
    data = runs[0].recipe.data.model_copy(update={"path": runs[0].data.resolve()})
    merged = open_run(out, runs[0].recipe.model_copy(update={"data": data}))
    events = _events(kept)
    last = events[-1]["time"] if events else header["time"]
    lines = [header, *events, {"event": "end", "time": last, "why": "merged"}]
    with writing(merged.search), atomic_file(merged.search / JOURNAL) as temp:
        temp.write_bytes(b"".join(map(encode, lines)))
    return merged, len(kept), len(found) - len(kept)


Found = tuple[Run, Reader, Evaluation]


def _require_alike(first: Run, other: Run) -> None:
    mine, theirs = _comparable(first.recipe), _comparable(other.recipe)
    differing = [k for k in mine if mine[k] != theirs.get(k)]
    if differing:
        told = "; ".join(f"{k} is {mine[k]} and {theirs.get(k)}" for k in differing)
        raise RunError(
            f"{first.folder} and {other.folder}: their fitness cannot be compared: {told}. Merge runs "
            "of the same task, [train] and [search]; or begin a new one with: --from RUN"
        )
    require_identity(
        read_manifest(first.data).identity,
        read_manifest(other.data).identity,
        maker=str(other.data),
    )


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """What decides how good a network is found to be, with keys such as "search.epochs"."""
    tables = {name: t for name, t in recipe.identity().items() if name not in _FREE_TABLES}
    flat = {
        f"{name}.{key}": value for name, table in tables.items() for key, value in table.items()
    }
    return {k: v for k, v in flat.items() if k.removeprefix("search.") not in _FREE_KEYS}


def _header(sources: Sequence[tuple[Run, Reader]]) -> dict[str, Any]:
    """Of the merged journal: that of the first, with its recipe's seed, so that it can go on."""
    run, first = sources[0]
    for _, reader in sources[1:]:
        if reader.space != first.space:
            raise RunError(
                f"{first.path} and {reader.path}: their search spaces differ; they cannot be merged. "
                "Begin a new search with the best networks of both: --from RUN --from RUN"
            )
    machine = {"workers", "trial_memory_GB"}  # there were several
    return {
        **first.header,
        "config": {k: v for k, v in first.header["config"].items() if k not in machine},
        "version": VERSION,
        "seed": run.recipe.seed,
        "space": first.space,
        "code": code_version(),
        "process": process(),
        "time": min(float(reader.header["time"]) for _, reader in sources),
    }


def _unique(found: Sequence[Found]) -> list[Found]:
    """Every genome once, in the order of the asks: the first success, or else the first failure."""
    best: dict[str, Found] = {}
    for entry in sorted(found, key=lambda f: (f[2].fitness is None, f[2].told)):
        if entry[2].failure not in TRANSIENT:
            best.setdefault(entry[2].hash, entry)
    return sorted(best.values(), key=lambda f: f[2].asked)


def _events(kept: Sequence[Found]) -> list[dict[str, Any]]:
    numbers = {evaluation.hash: number for number, (*_, evaluation) in enumerate(kept)}
    timed: list[tuple[float, int, dict[str, Any]]] = []
    for number, (run, reader, evaluation) in enumerate(kept):
        named = (
            numbers.get(reader.hashes.get(parent, ""), number) for parent in evaluation.parents
        )
        ask = {
            "event": "ask",
            "time": evaluation.asked,
            "id": number,
            "genome": evaluation.genome,
            "hash": evaluation.hash,
            "origin": evaluation.origin,
            # of a duplicate the other one may be kept, and be younger
            "parents": [parent for parent in named if parent < number],
            "source": {"run": str(run.folder), "id": evaluation.name},
        }
        tell = {
            "event": "tell",
            "time": evaluation.told,
            "id": number,
            **outcome_fields(evaluation.outcome),
            "seconds": evaluation.seconds,
            "metrics": evaluation.metrics,
        }
        timed += [(evaluation.asked, 2 * number, ask), (evaluation.told, 2 * number + 1, tell)]
    return [event for *_, event in sorted(timed, key=lambda entry: entry[:2])]
