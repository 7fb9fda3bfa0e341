"""What is known of the networks behind a table, for spaces that see isomorphism and graphs.

NAS-Bench-Graph: `link` 0..8 are the nine rooted trees of four nodes, the last operation is the skip
connection, which does nothing. NAS-Bench-Macro: operation 0 is the identity; the first layer and the
three that change the resolution stand alone, the others of a stage are interchangeable with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import permutations
from typing import Any

from search.base import Space
from search.spaces.cells import Cell, Cells
from search.spaces.parameters import Choice, Parameters, Value
from searching.tables import Problem

LINKS = (
    (0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 1), (0, 0, 1, 2), (0, 0, 1, 3),
    (0, 1, 1, 1), (0, 1, 1, 2), (0, 1, 2, 2), (0, 1, 2, 3),
)  # fmt: skip
NODES = 4
MACRO_STAGES = (("op4", "op5"), ("op7", "op8"))  # layers between which an identity moves freely
ToConfig = Callable[[Any], Mapping[str, Value]]


def plain(problem: Problem) -> tuple[Space[Any], ToConfig]:
    """The space as every rival sees it: named parameters."""
    return Parameters(problem.parameters), dict


def structured(problem: Problem) -> tuple[Space[Any], ToConfig]:
    """The space of networks, as far as it is known; else the plain one."""
    if problem.name.startswith("nbgraph_"):
        operations = _choices(problem, "op1")
        return Cells(NODES, operations, identity=operations[-1]), graph_config(operations[-1])
    if problem.name.startswith("macro_") and len(problem.parameters) == 8:
        space = Parameters(problem.parameters, canonical=macro_canonical)
        return space, dict
    return plain(problem)


def _choices(problem: Problem, name: str) -> tuple[str, ...]:
    parameter = problem.parameters[name]
    assert isinstance(parameter, Choice)
    return tuple(str(value) for value in parameter.values)


def graph_config(skip: str) -> ToConfig:
    """Cell -> link, op1 .. op4 of the table: missing nodes are skip connections before the others."""

    @lru_cache(maxsize=1 << 16)
    def config(cell: Cell) -> Mapping[str, Value]:
        missing = NODES - len(cell.links)
        fathers = [*range(missing), *(father + missing for (father,) in cell.links)]
        operations = [skip] * missing + list(cell.operations)
        for order in permutations(range(NODES)):
            new = {0: 0} | {old + 1: i + 1 for i, old in enumerate(order)}
            links = tuple(new[fathers[old]] for old in order)
            if links in LINKS:
                found = {f"op{i + 1}": int(operations[old]) for i, old in enumerate(order)}
                return {"link": LINKS.index(links), **found}
        raise AssertionError(f"{cell} is no tree of {NODES} nodes")

    return config


def cell_of(config: Mapping[str, Value]) -> Cell:
    """Inverse of `graph_config`, not yet in canonical form."""
    link = config["link"]
    assert isinstance(link, int)
    operations = tuple(str(config[f"op{i + 1}"]) for i in range(NODES))
    return Cell(tuple((father,) for father in LINKS[link]), operations)


def macro_canonical(config: Mapping[str, Value]) -> Mapping[str, Value]:
    """Identities last in their stage."""
    normal = dict(config)
    for stage in MACRO_STAGES:
        moving = [config[name] for name in stage]
        normal.update(zip(stage, sorted(moving, key=lambda operation: operation == 0), strict=True))
    return normal
