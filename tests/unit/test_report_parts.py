"""The report's pure parts: search clock, ancestry, changed genes, blocks, numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.errors import RunError
from dmi_hpc.files import append_json_line
from dmi_hpc.models.cost import cost
from dmi_hpc.models.spec import Activation, Conv, Dense, NetworkSpec, Norm, Pool, Readout
from dmi_hpc.report.diagrams import blocks
from dmi_hpc.report.evaluations import Search, Trial, ancestors, changes, lineage
from dmi_hpc.report.formatting import compact, duration, number
from dmi_hpc.report.journals import read_search

VOXELS = NetworkSpec(
    input_shape=(1, 15, 15, 15),
    layers=(Norm(), Conv(filters=8), Norm(), Activation(), Pool(), Readout(), Dense(units=16)),
    outputs=3,
)
VECTOR = NetworkSpec(input_shape=(86,), layers=(Dense(units=32), Norm(), Dense(units=8)))


def test_search_clock_leaves_out_pauses_and_ignores_orphans(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    ask = {"event": "ask", "genome": {}, "origin": "random", "parents": []}
    tell = {"event": "tell", "status": "ok", "metrics": {}}
    events = (
        {"event": "header", "time": 100.0, "config": {"workers": 2}},
        {**ask, "id": 0, "time": 100.0},
        {**ask, "id": 1, "time": 100.0},
        {**tell, "id": 0, "time": 104.0, "seconds": 4.0, "fitness": 0.5},
        {"event": "resume", "time": 5000.0},
        {**tell, "id": 9, "time": 5001.0, "seconds": 1.0, "fitness": 0.0},
        {**tell, "id": 1, "time": 5002.0, "seconds": 2.0, "fitness": 0.4},
    )
    for event in events:
        append_json_line(path, event)
    search = read_search(path)
    assert search.elapsed == pytest.approx(6.0)
    assert search.resumed == (4.0,)
    assert search.utilisation == pytest.approx(6.0 / (2 * 6.0))
    assert [trial.id for trial in search.finished] == [0, 1]
    assert search.best is not None and search.best.id == 1


@st.composite
def families(draw: st.DrawFn) -> Search:
    size = draw(st.integers(1, 25))
    trials = {}
    for i in range(size):
        # Parents that are unknown, or younger than the child, must do no harm.
        parents = tuple(draw(st.lists(st.integers(0, size + 2), max_size=2)))
        fitness = draw(st.one_of(st.none(), st.floats(0, 1)))
        trials[i] = Trial(i, "mutation", parents, {}, asked=float(i), fitness=fitness)
    return Search(trials, elapsed=1.0, workers=1)


@settings(deadline=None, max_examples=60)
@given(families(), st.integers(1, 8))
def test_ancestors_run_forward_once_and_completely(search: Search, depth: int):
    start = max(search.trials)
    generations = ancestors(search, start, depth)
    level = {trial.id: n for n, trials in generations.items() for trial in trials}
    assert sum(len(trials) for trials in generations.values()) == len(level)
    assert level[start] == 0 and max(level.values()) <= depth
    for key, n in level.items():
        known = [p for p in search.trials[key].parents if p < key]
        assert n == depth or all(level[p] > n for p in known if p in level)
        assert n == depth or all(p in level for p in known)
    ids = [trial.id for trial in lineage(search, start)]
    assert ids == sorted(set(ids)) and ids[-1] == start


def test_changes_between_genomes():
    before = {"conv": [{"filters": 16, "norm": None}], "hyper": {"lr": 1e-3}, "gone": 1}
    after = {"conv": [{"filters": 32, "norm": "batch"}], "hyper": {"lr": 1e-3}}
    assert changes(before, after) == [
        "conv 1 filters: 16 → 32",
        "conv 1 norm: none → batch",
        "gone: 1 → none",
    ]
    longer = {**before, "conv": [{}, {}]}
    assert changes(before, longer) == ["conv: 1 → 2 blocks"]
    assert changes(before, before) == []


@pytest.mark.parametrize("spec", [VOXELS, VECTOR])
def test_drawn_blocks_hold_every_weight_and_the_last_shape(spec: NetworkSpec):
    drawn = blocks(spec)
    assert sum(block.parameters for block in drawn) == cost(spec).parameters
    assert drawn[0].shape == spec.input_shape
    assert drawn[-1].shape == (spec.outputs,)


@settings(deadline=None, max_examples=200)
@given(st.floats(1e-9, 1e12), st.integers(2, 5))
def test_number_keeps_its_digits(value: float, digits: int):
    text = number(value, digits).replace(",", "")
    superscripts = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    back = float(text.translate(superscripts).replace("×10", "e"))
    assert back == pytest.approx(value, rel=0.51 * 10 ** (1 - digits))


def test_formatting_of_special_values():
    assert [number(None), number(float("nan")), number(0.0), number(12)] == ["–", "–", "0", "12"]
    assert number(-0.5) == "−0.500"
    assert [compact(950), compact(12_345), compact(3_812_000)] == ["950", "12.3 k", "3.81 M"]
    assert [duration(3.25), duration(245), duration(7800)] == ["3.2 s", "4 min 05 s", "2 h 10 min"]


def test_damaged_journal_line_is_named(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    append_json_line(path, {"event": "ask", "time": 1.0, "id": "seven"})
    with pytest.raises(RunError, match=r"journal\.jsonl: id"):
        read_search(path)
