"""Founders from earlier searches: their best networks, fitted into the space of this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmi_hpc.errors import DMIError, RunError
from dmi_hpc.models.cost import cost
from dmi_hpc.models.space import Choice, HyperValue, SearchSpace
from search.records.history import Evaluation, best_first, evaluations
from search.spaces.genome import Genome, decode, from_json, structural_hash
from search.spaces.space import repair

FOUNDERS = 8  # taken over in all: the rest of the initial networks stays random


@dataclass(frozen=True)
class Founder:
    """A network to begin with. source: run, id and fitness there."""

    genome: Genome
    source: Mapping[str, Any]


def founders_from(
    places: Sequence[Path],
    space: SearchSpace,
    defaults: Mapping[str, HyperValue],
    count: int = FOUNDERS,
) -> list[Founder]:
    """The best networks of earlier searches, in turn from each, no network twice.

    places: run folders or journals, also of other tasks. defaults: hyper-parameters that a search
    there did not vary; what this one does not vary is left out. RunError if nothing is of use.
    """
    ranked = [best_first(_evaluations(place)) for place in places]
    found: dict[str, Founder] = {}
    for rank in range(max(map(len, ranked))):
        for place, best_of in zip(places, ranked, strict=True):
            if rank < len(best_of) and len(found) < count:
                best = best_of[rank]
                source = {"run": str(place), "id": best.name, "fitness": best.fitness}
                genome = fitted(best.genome, space, defaults)
                if genome is not None:
                    found.setdefault(structural_hash(genome, space), Founder(genome, source))
    if not found:
        names = ", ".join(map(str, places))
        raise RunError(
            f"--from {names}: none of the networks there can be built in this task's space; leave "
            "--from out, or take a run with the same kind of networks"
        )
    return list(found.values())


def _evaluations(place: Path) -> list[Evaluation]:
    found = evaluations(place)
    if not any(e.fitness is not None for e in found):
        raise RunError(f"--from {place}: no evaluation there has succeeded; leave it out")
    return found


def fitted(
    data: Mapping[str, Any], space: SearchSpace, defaults: Mapping[str, HyperValue]
) -> Genome | None:
    """A genome of another search as the nearest one in `space`; None if there is none."""
    try:
        genome = from_json({**data, "hyper": _hyper(data["hyper"], space, defaults)})
        genome = repair(genome, space)
        cost(decode(genome, space.network))
    except (KeyError, TypeError, AttributeError, DMIError):
        return None
    return genome


def _hyper(
    found: Mapping[str, HyperValue], space: SearchSpace, defaults: Mapping[str, HyperValue]
) -> dict[str, HyperValue]:
    values = {**defaults, **found}
    for name, parameter in space.hyper.items():
        if isinstance(parameter, Choice) and not parameter.ordered:
            values[name] = values[name] if values[name] in parameter.values else defaults[name]
    return {name: values[name] for name in space.hyper}
