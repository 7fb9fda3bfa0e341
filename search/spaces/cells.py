"""Cells: small networks whose nodes carry an operation each, modulo everything that makes no difference.

A node reads the sum (or whatever the task takes) of earlier nodes, or the input of the cell; nodes that
nobody reads are the output. NAS-Bench-Graph and the NAS-Bench-201 family are such spaces; a chain is
the cell in which every node reads the one before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np
import xxhash

from dmi_hpc.errors import RecipeError
from search.base import Vector
from search.spaces.draw import pick

Links = tuple[tuple[int, ...], ...]  # of node i (from 1): what it reads, ascending; 0 is the input

INPUT = 0
AGAIN = 0.3  # chance that a mutation changes one more thing


class Cell(NamedTuple):
    """links[i], operations[i]: of node i + 1."""

    links: Links
    operations: tuple[str, ...]


@lru_cache(maxsize=1 << 16)
def canonical(cell: Cell, identity: str | None = None) -> Cell:
    """The one normal form of all isomorphic cells. identity: the operation that does nothing.

    An identity that something reads, or that is alone in reading its only source, vanishes: its
    readers read its source. Nodes are ordered by what they are and what surrounds them.
    """
    while identity is not None and (node := _redundant(cell, identity)):
        cell = _without(cell, node)
    return _ordered(cell)


def _redundant(cell: Cell, identity: str) -> int:
    """A node that can vanish, or 0."""
    readers = _readers(cell.links)
    for node, (links, operation) in enumerate(zip(*cell, strict=True), start=1):
        if operation == identity and len(links) == 1:
            (source,) = links
            if readers[node] or len(readers[source]) == 1 or source == INPUT:
                return node
    return 0


def _readers(links: Links) -> list[list[int]]:
    """Of the input and of every node."""
    found: list[list[int]] = [[] for _ in range(len(links) + 1)]
    for node, sources in enumerate(links, start=1):
        for source in sources:
            found[source].append(node)
    return found


def _without(cell: Cell, node: int) -> Cell:
    """`cell` without `node`, whose readers read its source."""
    (source,) = cell.links[node - 1]

    def moved(old: int) -> int:
        new = source if old == node else old
        return new - (new > node)

    links = [tuple(sorted({moved(s) for s in sources})) for sources in cell.links]
    del links[node - 1]
    return Cell(tuple(links), cell.operations[: node - 1] + cell.operations[node:])


def _ordered(cell: Cell) -> Cell:
    """The least of all orders that agree with the nodes' colours (Weisfeiler and Leman, 1968)."""
    colours = _colours(cell)
    classes: dict[int, list[int]] = {}
    for node in range(1, len(colours)):
        classes.setdefault(colours[node], []).append(node)
    groups = [classes[colour] for colour in sorted(classes)]
    if len(groups) == len(colours) - 1:
        return _relabelled(cell, [node for group in groups for node in group])
    orders: Iterator[tuple[tuple[int, ...], ...]] = product(*(permutations(g) for g in groups))
    return min(_relabelled(cell, [node for group in order for node in group]) for order in orders)


def _colours(cell: Cell) -> list[int]:
    """Of the input and of every node: equal only if their surroundings are alike.

    They ascend with depth, so that sources come before their readers.
    """
    sources, readers = [(), *cell.links], _readers(cell.links)
    depths = [0]
    for links in cell.links:
        depths.append(1 + max(depths[s] for s in links))
    colours = _numbered(list(zip(depths, ("", *cell.operations), strict=True)))
    while True:
        seen = [
            (
                colour,
                tuple(sorted([colours[s] for s in sources[i]])),
                tuple(sorted([colours[r] for r in readers[i]])),
            )
            for i, colour in enumerate(colours)
        ]
        finer = _numbered(seen)
        if finer == colours:
            return colours
        colours = finer


def _numbered(labels: list[Any]) -> list[int]:
    """Place of each label among the distinct ones."""
    places = {label: place for place, label in enumerate(sorted(set(labels)))}
    return [places[label] for label in labels]


def _relabelled(cell: Cell, order: Sequence[int]) -> Cell:
    """order: old number of every new node."""
    new = {INPUT: INPUT} | {old: i for i, old in enumerate(order, start=1)}
    links = tuple(tuple(sorted(new[s] for s in cell.links[old - 1])) for old in order)
    return Cell(links, tuple(cell.operations[old - 1] for old in order))


class Cells:
    """All cells of up to some nodes, each reading one or a few earlier ones, as a `Space`."""

    def __init__(
        self,
        nodes: int,
        operations: Sequence[str],
        *,
        reads: int = 1,
        identity: str | None = None,
        founders: Sequence[Cell] = (),
    ) -> None:
        """reads: most sources of one node; 1: cells are trees that grow from the input.

        identity: the one of `operations` that does nothing, if there is one: cells with fewer nodes
        exist only then. Raises RecipeError if there is nothing to search.
        """
        if nodes < 1 or len(set(operations)) < 2 or reads < 1:
            raise RecipeError(
                f"a space of cells with {nodes} nodes, {len(set(operations))} operations and {reads} "
                "reads; expected at least 1, 2 and 1"
            )
        if identity is not None and identity not in operations:
            known = ", ".join(operations)
            raise RecipeError(f"identity '{identity}' is not one of the operations {known}")
        self.nodes, self.reads = nodes, reads
        self.operations, self.identity_operation = tuple(operations), identity
        self._founders = [canonical(founder, identity) for founder in founders]

    def founders(self) -> Sequence[Cell]:
        return self._founders

    def random(self, rng: np.random.Generator) -> Cell:
        links = tuple(self._sources(node, rng) for node in range(1, self.nodes + 1))
        return self._normal(Cell(links, tuple(pick(self.operations, rng) for _ in links)))

    def mutated(self, parent: Cell, rng: np.random.Generator) -> Cell:
        """An operation changes, two swap places, a node reads something else, comes or goes."""
        child = parent
        while True:
            child = pick(self._moves(child), rng)(child, rng)
            if rng.random() >= AGAIN:
                return self._normal(child)

    def crossed(self, first: Cell, second: Cell, rng: np.random.Generator) -> Cell:
        """The structure of one; operations of both, aligned at the input."""
        shape, other = (first, second) if rng.random() < 0.5 else (second, first)
        operations = tuple(
            other.operations[i] if i < len(other.operations) and rng.random() < 0.5 else mine
            for i, mine in enumerate(shape.operations)
        )
        return self._normal(Cell(shape.links, operations))

    def stepped(self, parent: Cell, rng: np.random.Generator) -> Cell:
        """Another operation in one node."""
        return self._normal(self._changed(parent, rng) if parent.links else parent)

    def restructured(self, parent: Cell, rng: np.random.Generator) -> Cell:
        """A node comes, goes or reads something else, two operations swap places."""
        moves = [move for move in self._moves(parent) if move != self._changed]
        return self._normal(pick(moves, rng)(parent, rng)) if moves else self.stepped(parent, rng)

    def identity(self, genome: Cell) -> str:
        return xxhash.xxh3_128_hexdigest(repr(tuple(genome)).encode())

    def affordable(self, genome: Cell) -> bool:
        return True

    def features(self, genomes: Sequence[Cell]) -> Vector:
        rows = [self._numbers(genome) for genome in genomes]
        return np.array(rows, dtype=float).reshape(len(rows), -1)

    def to_json(self, genome: Cell) -> dict[str, Any]:
        return {"links": [list(s) for s in genome.links], "operations": list(genome.operations)}

    def from_json(self, data: Mapping[str, Any]) -> Cell:
        cell = Cell(tuple(tuple(s) for s in data["links"]), tuple(data["operations"]))
        fits = len(cell.links) == len(cell.operations) <= self.nodes
        if not fits or not set(cell.operations) <= set(self.operations):
            raise ValueError(f"{cell} is no cell of {self.nodes} nodes with {self.operations}")
        if any(not s or not set(s) <= set(range(i)) for i, s in enumerate(cell.links, start=1)):
            raise ValueError(f"{cell}: a node must read the input or nodes before it")
        return self._normal(cell)

    def fingerprint(self) -> str:
        content = [self.nodes, self.reads, self.operations, self.identity_operation, self._founders]
        return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())

    def _normal(self, cell: Cell) -> Cell:
        return canonical(cell, self.identity_operation)

    def _sources(self, node: int, rng: np.random.Generator) -> tuple[int, ...]:
        count = 1 + int(rng.random() * min(self.reads, node))
        return tuple(sorted(int(s) for s in rng.choice(node, count, replace=False)))

    def _moves(self, cell: Cell) -> list[_Move]:
        nodes = len(cell.links)
        moves: list[_Move] = [self._changed, self._changed] if nodes else []
        if nodes > 1:
            moves += [self._relinked, _swapped]
        if self.identity_operation is not None:
            moves += [self._inserted] * (nodes < self.nodes) + [_deleted] * (nodes > 1)
        return moves

    def _changed(self, cell: Cell, rng: np.random.Generator) -> Cell:
        at = int(rng.random() * len(cell.operations))
        others = [o for o in self.operations if o != cell.operations[at]]
        operations = (*cell.operations[:at], pick(others, rng), *cell.operations[at + 1 :])
        return Cell(cell.links, operations)

    def _relinked(self, cell: Cell, rng: np.random.Generator) -> Cell:
        at = 1 + int(
            rng.random() * (len(cell.links) - 1)
        )  # the first node can read the input alone
        links = (*cell.links[:at], self._sources(at + 1, rng), *cell.links[at + 1 :])
        return Cell(links, cell.operations)

    def _inserted(self, cell: Cell, rng: np.random.Generator) -> Cell:
        """A new node after something; about half of the readers read the new one instead."""
        source = int(rng.random() * (len(cell.links) + 1))
        new = source + 1
        links = []
        for sources in cell.links:
            moved = tuple(s + (s > source) for s in sources)
            if source in moved and rng.random() < 0.5:
                moved = tuple(sorted({new if s == source else s for s in moved}))
            links.append(moved)
        links.insert(source, (source,))
        operations = list(cell.operations)
        operations.insert(source, pick(self.operations, rng))
        return Cell(tuple(links), tuple(operations))

    def _numbers(self, cell: Cell) -> list[float]:
        """How often: each operation, each at each depth, each as output, each pair in a row."""
        place = {operation: i for i, operation in enumerate(self.operations)}
        count = len(place)
        depths = np.zeros((self.nodes, count))
        output = np.zeros(count)
        pairs = np.zeros((count + 1, count))  # the last row: reads the input
        readers, depth = _readers(cell.links), [0]
        for node, (links, operation) in enumerate(zip(*cell, strict=True), start=1):
            kind = place[operation]
            depth.append(1 + max(depth[s] for s in links))
            depths[depth[node] - 1, kind] += 1
            output[kind] += not readers[node]
            for source in links:
                pairs[place[cell.operations[source - 1]] if source else -1, kind] += 1
        shape = [len(cell.links) / self.nodes, max(depth) / self.nodes]
        return [*shape, *depths.sum(axis=0), *depths.ravel(), *output, *pairs.ravel()]


_Move = Callable[[Cell, np.random.Generator], Cell]


def _swapped(cell: Cell, rng: np.random.Generator) -> Cell:
    first, second = rng.choice(len(cell.operations), 2, replace=False)
    operations = list(cell.operations)
    operations[first], operations[second] = operations[second], operations[first]
    return Cell(cell.links, tuple(operations))


def _deleted(cell: Cell, rng: np.random.Generator) -> Cell:
    """What read the node reads its first source."""
    node = 1 + int(rng.random() * len(cell.links))
    (source, *_) = cell.links[node - 1]
    return _without(
        Cell((*cell.links[: node - 1], (source,), *cell.links[node:]), cell.operations), node
    )
