"""Cells: the canonical form sees through renumbering and through operations that do nothing."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.errors import RecipeError
from search.conformance import SpaceConformance
from search.evolution.evolve import Evolution, EvolutionConfig, Success
from search.spaces.cells import Cell, Cells, canonical

OPERATIONS = ("gat", "gcn", "gin", "skip")


class TestTrees(SpaceConformance):
    def make_space(self):
        founder = Cell(((0,), (1,), (1,)), ("gcn", "gat", "skip"))
        return Cells(4, OPERATIONS, identity="skip", founders=[founder])


class TestGraphs(SpaceConformance):
    def make_space(self):
        return Cells(5, OPERATIONS, reads=2)


def renumbered(cell, order):
    """order: old number of each new node; sources must come before their readers."""
    new = {0: 0} | {old: i + 1 for i, old in enumerate(order)}
    links = tuple(tuple(sorted(new[s] for s in cell.links[old - 1])) for old in order)
    return Cell(links, tuple(cell.operations[old - 1] for old in order))


def orders(cell):
    """All that put sources first."""
    nodes = range(1, len(cell.links) + 1)
    for order in permutations(nodes):
        seen = {0}
        for node in order:
            if not set(cell.links[node - 1]) <= seen:
                break
            seen.add(node)
        else:
            yield order


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]))
@settings(deadline=None, max_examples=25)
def test_all_numberings_of_a_cell_have_one_canonical_form(seed, reads):
    rng = np.random.default_rng(seed)
    space = Cells(5, OPERATIONS, reads=reads)
    cell = space.random(rng)
    assert canonical(cell) == cell
    assert {canonical(renumbered(cell, order)) for order in orders(cell)} == {cell}


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_two_numberings_are_the_only_reason_for_equal_forms(seed):
    """No identity: cells with one form have the same operations and as many readers each."""
    rng = np.random.default_rng(seed)
    space = Cells(3, ("a", "b"), reads=2)
    cells = [space.random(rng) for _ in range(30)]
    for cell in cells:
        others = {renumbered(cell, order) for order in orders(cell)}
        for other in cells:
            assert (other == cell) == (other in others)


def chain(*operations):
    return Cell(tuple((i,) for i in range(len(operations))), operations)


@pytest.mark.parametrize(
    ("cell", "same"),
    [
        (chain("skip", "gcn"), chain("gcn")),
        (chain("gcn", "skip"), chain("gcn")),
        (chain("gcn", "skip", "gat"), chain("gcn", "gat")),
        (chain("skip"), Cell((), ())),
        # read by nothing, beside another reader: its source is part of the output
        (
            Cell(((0,), (1,), (1,)), ("gcn", "skip", "gat")),
            Cell(((0,), (1,), (1,)), ("gcn", "gat", "skip")),
        ),
    ],
)
def test_an_identity_vanishes_where_it_makes_no_difference(cell, same):
    assert canonical(cell, "skip") == canonical(same, "skip")
    assert canonical(cell) != canonical(same) or cell.links == same.links


def test_an_output_beside_others_keeps_its_identity():
    branch = Cell(((0,), (1,), (1,)), ("gcn", "gat", "skip"))
    assert canonical(branch, "skip") != canonical(chain("gcn", "gat"), "skip")


def test_forms_without_identities_are_as_many_as_there_are_labelled_rooted_trees():
    links = ("0000", "0001", "0011", "0012", "0013", "0111", "0112", "0122", "0123")
    forms = {
        canonical(Cell(tuple((int(s),) for s in link), tuple("abcx"[i] for i in places)), "x")
        for link in links
        for places in np.ndindex(4, 4, 4, 4)
    }
    grown = {()}
    for _ in range(4):  # rooted trees of labelled nodes with up to n nodes, by growing leaves
        grown |= {tree for known in grown for tree in _with_one_more(known, "abc")}
    # a skip survives as an output beside other readers of its source
    assert len(forms) > len(grown)
    assert sum("x" not in cell.operations for cell in forms) == len(grown)


def _with_one_more(forest, labels):
    """Forests (sorted tuples of (label, forest)) with one more leaf somewhere."""
    for label in labels:
        yield tuple(sorted([*forest, (label, ())]))
    for i, (label, below) in enumerate(forest):
        for more in _with_one_more(below, labels):
            yield tuple(sorted([*forest[:i], (label, more), *forest[i + 1 :]]))


def test_cells_stay_inside_their_space():
    space, rng = Cells(3, OPERATIONS, identity="skip"), np.random.default_rng(0)
    cell = space.random(rng)
    sizes = set()
    for _ in range(300):
        cell = (space.mutated if rng.random() < 0.5 else space.restructured)(cell, rng)
        assert space.from_json(space.to_json(cell)) == cell
        sizes.add(len(cell.links))
    assert sizes >= {1, 2, 3}


def test_restructured_cells_have_other_links_or_the_same_operations_elsewhere():
    space, rng = Cells(4, OPERATIONS), np.random.default_rng(1)
    parent = Cell(((0,), (1,), (2,), (2,)), ("gat", "gcn", "gin", "gin"))
    children = [space.restructured(parent, rng) for _ in range(100)]
    assert all(sorted(child.operations) == sorted(parent.operations) for child in children)
    assert len(set(children)) > 4


@pytest.mark.parametrize(
    "data",
    [
        {"links": [[0], [0]], "operations": ["gcn"]},
        {"links": [[0]] * 5, "operations": ["gcn"] * 5},
        {"links": [[0], [2]], "operations": ["gcn", "gcn"]},
        {"links": [[]], "operations": ["gcn"]},
        {"links": [[0]], "operations": ["conv"]},
    ],
)
def test_what_is_no_cell_is_refused(data):
    with pytest.raises(ValueError, match=r"cell|read"):
        Cells(4, OPERATIONS).from_json(data)


def test_a_space_without_choices_is_refused():
    with pytest.raises(RecipeError, match="1 operations"):
        Cells(3, ("gcn",))
    with pytest.raises(RecipeError, match="identity 'none'"):
        Cells(3, OPERATIONS, identity="none")


def test_graph_features_know_depth_neighbours_and_outputs():
    space = Cells(3, OPERATIONS, identity="skip")
    ends = [chain("gcn", "gat"), chain("gat", "gcn"), Cell(((0,), (0,)), ("gat", "gcn"))]
    rows = space.features([canonical(cell, "skip") for cell in ends])
    assert len(np.unique(rows, axis=0)) == 3


def test_a_search_over_cells_finds_a_known_one():
    space = Cells(4, OPERATIONS, identity="skip")
    target = canonical(Cell(((0,), (1,), (1,), (2,)), ("gcn", "gin", "gat", "gin")), "skip")
    (wanted,) = space.features([target])
    evolution = Evolution(space, EvolutionConfig(seed=2))
    for _ in range(150):
        proposal = evolution.ask()
        distance = float(np.abs(space.features([proposal.genome])[0] - wanted).sum())
        evolution.tell(proposal.id, Success(distance))
    number, _ = evolution.best()
    assert evolution.proposals[number].genome == target
