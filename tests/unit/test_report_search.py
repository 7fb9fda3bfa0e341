"""What the report says of a search: pure analysis of the journal, and the page made of it."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.files import append_json_line
from dmi_hpc.models.cost import cost
from dmi_hpc.models.spec import (
    Activation,
    Conv,
    Dense,
    NetworkSpec,
    Parallel,
    Readout,
    Recurrent,
    Residual,
)
from dmi_hpc.report import write_report
from dmi_hpc.report.diagrams import blocks, network_drawing
from dmi_hpc.report.evaluations import Search, Trial
from dmi_hpc.report.genes import distances, genes, importance
from dmi_hpc.report.journals import read_search, read_searches
from dmi_hpc.report.search_figures import MOST_LANES, timeline
from dmi_hpc.report.search_section import costs_shown
from dmi_hpc.report.searching import (
    diversity,
    lanes,
    operators,
    staircase,
    surrogate_quality,
)

SPEC = importlib.util.spec_from_file_location(
    "report_fixture", Path(__file__).with_name("report_fixture.py")
)
assert SPEC is not None and SPEC.loader is not None
make = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(make)


def trial(number, fitness=None, origin="random", parents=(), told=None, **more):
    told = float(number + 1) if told is None else told
    failure = "nan" if fitness is None else None
    return Trial(
        number, origin, parents, more.pop("genome", {}), 0.0, told, 1.0, fitness, failure, **more
    )


def search_of(*trials, **more):
    more = {"elapsed": max(t.told for t in trials), "workers": 1} | more
    return Search({t.id: t for t in trials}, **more)


def test_operators_by_hand():
    found = operators(
        search_of(
            trial(0, 0.5, "founder"),
            trial(1, 0.7),
            trial(2, 0.4, "mutation", (0,)),
            trial(3, 0.6, "crossover", (0, 1)),
            trial(4, None, "mutation", (0,)),
            trial(5, 0.3, "mutation", (2,)),
            trial(6, 0.65, "crossover", (1, 4)),
        )
    )
    table = {o.origin: (o.asked, o.failed, o.bred, o.better, o.records) for o in found}
    assert table == {
        "founder": (1, 0, 0, 0, 1),
        "random": (1, 0, 0, 0, 0),
        "mutation": (3, 1, 2, 2, 2),
        "crossover": (
            2,
            0,
            2,
            1,
            0,
        ),  # 3 is worse than its better parent, 6 better than its only one
    }
    places = {o.origin: o.rank for o in found}
    assert places["random"] == 1.0
    assert places["mutation"] == pytest.approx(0.1)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.01, 20)), min_size=1, max_size=40))
def test_lanes_never_overlap_and_are_as_few_as_run_at_once(spans):
    trials = [
        replace(trial(i, 0.1, told=begin + length), seconds=length)
        for i, (begin, length) in enumerate(spans)
    ]
    bars = lanes(search_of(*trials))
    assert sorted(bar.trial.id for bar in bars) == list(range(len(spans)))
    for lane in {bar.lane for bar in bars}:
        of = sorted((bar.begin, bar.end) for bar in bars if bar.lane == lane)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(of))
    most = max(sum(b.begin <= at.begin < b.end for b in bars) for at in bars)
    assert 1 + max(bar.lane for bar in bars) == max(1, most)


def test_too_many_workers_are_not_drawn_one_by_one():
    at_once = [replace(trial(i, 0.1, told=5.0), seconds=4.0) for i in range(MOST_LANES + 1)]
    assert timeline(search_of(*at_once)) is None
    assert timeline(search_of(*at_once[:-1])) is not None


def test_staircase_is_the_front():
    rng = np.random.default_rng(0)
    trials = [
        trial(i, float(y), metrics={"flops": float(x)})
        for i, (x, y) in enumerate(rng.random((60, 2)))
    ]
    found = staircase(trials, "flops")
    points = [(t.metrics["flops"], t.fitness) for t in trials]
    front = [p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)]
    assert found == sorted(front)


def genome(rate, units, norm):
    return {"dense": [{"units": units, "norm": norm}], "hyper": {"rate": rate}}


def test_genes_are_paths_and_constant_ones_are_left_out():
    columns = genes([genome(0.1, 8, None), genome(0.2, 8, "batch"), {"dense": [], "hyper": {}}])
    assert [gene.name for gene in columns] == [
        "number of dense",
        "dense 1 units",
        "dense 1 norm",
        "rate",
    ]
    assert [gene.numeric for gene in columns] == [True, False, False, True]
    assert genes([genome(0.1, 8, None)] * 3) == []


def test_distances_are_shares_of_the_genes():
    columns = genes([genome(1.0, 8, None), genome(2.0, 8, "batch"), genome(3.0, 16, "batch")])
    found = distances(columns, slice(None))  # rate, units, norm: all three vary
    assert found.tolist() == pytest.approx(
        np.array([[0, (0.5 + 1) / 3, 1], [(0.5 + 1) / 3, 0, 1.5 / 3], [1, 1.5 / 3, 0]])
    )
    wide = genes([{"rate": r} for r in (1e-4, 1e-3, 1e-2)])
    assert distances(wide, slice(None))[0].tolist() == pytest.approx([0, 0.5, 1])


def test_the_gene_that_matters_is_found_and_noise_is_not():
    rng = np.random.default_rng(1)
    genomes = [
        {"rate": float(10 ** rng.uniform(-4, -1)), "units": int(rng.choice([8, 16, 32])), "x": b}
        for b in rng.choice(["a", "b"], 300).tolist()
    ]
    fitness = [(np.log10(g["rate"]) + 2) ** 2 + 0.1 * rng.normal() for g in genomes]
    found = {entry.name: entry for entry in importance(genes(genomes), fitness)}
    assert found["rate"].share > 0.7
    low, high = map(float, found["rate"].best.split(" to "))
    assert low < 1.5e-2 and high > 7e-3
    assert max(found["units"].share, found["x"].share) < 0.04
    assert importance(genes(genomes[:10]), fitness[:10]) == []  # too few for a statement


def test_genes_of_absent_blocks_do_not_count_as_depth():
    rng = np.random.default_rng(2)
    genomes, fitness = [], []
    for _ in range(200):
        depth = int(rng.integers(1, 3))
        genomes.append({"conv": [{"filters": int(rng.choice([8, 16]))} for _ in range(depth)]})
        fitness.append(-depth + 0.1 * rng.normal())
    found = {entry.name: entry.share for entry in importance(genes(genomes), fitness)}
    assert found["number of conv"] > 0.5
    assert found["conv 2 filters"] < 0.1


def test_diversity_falls_to_zero_when_all_are_alike():
    rng = np.random.default_rng(3)
    various = [
        genome(float(rng.uniform(1, 2)), int(rng.choice([8, 16, 32])), "batch") for _ in range(20)
    ]
    trials = [trial(i, 0.5, genome=g) for i, g in enumerate([*various, *[various[0]] * 20])]
    found = diversity(search_of(*trials, population=10))
    assert found.distance[0][0] == 10 and found.distance[-1] == (40, 0.0)
    assert found.distance[0][1] > 0.2
    assert found.structures[-1] == (40, 0.1)
    assert diversity(search_of(*trials[:9], population=10)).distance == []


def test_quality_of_the_surrogate_is_a_rank_correlation():
    rng = np.random.default_rng(4)
    fitness = rng.random(60)
    good = [trial(i, float(f), predicted=float(np.exp(f))) for i, f in enumerate(fitness)]
    assert [q for _, q in surrogate_quality(search_of(*good))] == pytest.approx([1.0] * 49)
    wrong = [replace(t, predicted=-(t.predicted or 0)) for t in good]
    assert surrogate_quality(search_of(*wrong))[-1] == (60, pytest.approx(-1.0))
    assert surrogate_quality(search_of(*[replace(t, predicted=None) for t in good])) == []


def test_migrants_are_parents_but_no_evaluations_of_this_search(tmp_path):
    path = tmp_path / "journal.jsonl"
    ask = {"event": "ask", "genome": {}, "origin": "mutation", "parents": [-1]}
    tell = {"event": "tell", "status": "ok", "seconds": 1.0, "metrics": {"flops": None, "n": 2}}
    for event in (
        {
            "event": "header",
            "time": 0.0,
            "config": {"workers": 1, "objectives": ["error", "flops"]},
        },
        {"event": "migrant", "id": -1, "time": 1.0, "genome": {}, "status": "ok", "fitness": 0.3},
        {**ask, "id": 0, "time": 1.0},
        {**tell, "id": 0, "time": 2.0, "fitness": 0.2, "line": "ff"},
        {"event": "end", "time": 2.0, "why": "done"},
    ):
        append_json_line(path, event)
    search = read_search(path)
    assert [t.id for t in search.finished] == [0]
    assert (search.unfinished, search.failed) == (0, ())
    assert (search.objectives, dict(search.finished[0].metrics)) == (("flops",), {"n": 2.0})
    assert [(o.origin, o.bred, o.better) for o in operators(search)] == [("mutation", 1, 1)]


def test_a_journal_with_all_keys_shows_every_figure(tmp_path):
    make.write_run(tmp_path)
    make.write_search(tmp_path, trials=80, new_keys=True)
    scores = make.write_ensemble(tmp_path)
    text = write_report(tmp_path).read_text()
    for label in (
        "Fitness against flops",
        "Fitness against parameters",
        "What each worker did when",
        "quality of the surrogate over",
        "How much each gene explains",
    ):
        assert label in text
    assert "rank correlation of the surrogate" in text
    assert 'id="operators"' in text and 'id="uncertainty"' in text
    assert f'value="{scores["test"]["mae"]}"' in text
    assert "An ensemble of 4 trainings of the best networks found predicts C1111" in text


def test_an_old_journal_shows_what_it_can(tmp_path):
    make.write_run(tmp_path)
    make.write_search(tmp_path, trials=10)
    text = write_report(tmp_path).read_text()
    assert "Fitness against parameters" in text
    assert "What each worker did when" in text
    assert "surrogate" not in text and "How much each gene" not in text
    assert 'id="refined"' not in text


def test_an_objective_that_was_never_measured_is_left_out():
    trials = [trial(0, 0.5, metrics={"flops": 5.0}), trial(1, None)]
    assert costs_shown(search_of(*trials, objectives=("latency_s", "flops"))) == ["flops"]
    assert costs_shown(search_of(trial(1, None))) == []


NESTED = NetworkSpec(
    input_shape=(1, 16, 16),
    layers=(
        Residual(layers=(Conv(filters=4), Activation(), Conv(filters=4))),
        Parallel(branches=((), (Conv(filters=2), Activation()))),
        Readout(),
        Dense(units=8),
    ),
)
SEQUENCE = NetworkSpec(input_shape=(3, 20), layers=(Recurrent(units=5, last=True), Dense(units=4)))


@pytest.mark.parametrize("spec", [NESTED, SEQUENCE])
def test_nested_and_recurrent_layers_are_drawn_with_every_weight(spec):
    drawn = blocks(spec)
    assert sum(block.parameters for block in drawn) == cost(spec).parameters
    assert network_drawing(spec).startswith("<svg")


def test_branches_are_told_apart():
    _, residual, parallel, *_ = blocks(NESTED)
    assert residual.details == ("Conv 3²", "relu", "Conv 3²")
    assert parallel.details == ("| as it is", "| Conv 3²", "relu")


def test_numbers_of_the_ensemble_must_be_there(tmp_path):
    make.write_run(tmp_path)
    make.write_ensemble(tmp_path)
    path = tmp_path / "search" / "ensemble" / "ensemble.json"
    raw = json.loads(path.read_text())
    del raw["scores"]["test"]
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"ensemble\.json: scores\.test"):
        write_report(tmp_path)


def test_islands_are_one_search(tmp_path: Path):
    ask = {"event": "ask", "genome": {}, "origin": "random", "parents": []}
    tell = {"event": "tell", "status": "ok", "seconds": 1.0, "metrics": {}}
    migrant = {"event": "migrant", "genome": {}, "status": "ok", "fitness": 0.3}
    islands = {
        "a": [
            {"event": "header", "time": 100.0, "config": {"workers": 2}},
            {**ask, "id": 0, "time": 100.0},
            {**tell, "id": 0, "time": 103.0, "fitness": 0.3},
        ],
        "b": [
            {"event": "header", "time": 102.0, "config": {"workers": 3}},
            {**ask, "id": 0, "time": 102.0},
            {**migrant, "id": -1, "time": 104.0, "from": {"island": "a", "id": 0}},
            {**ask, "id": 1, "time": 104.0, "parents": [-1], "origin": "mutation"},
            {**tell, "id": 1, "time": 106.0, "fitness": 0.2},
            {**ask, "id": 2, "time": 106.0, "parents": [1], "origin": "mutation"},
            {**tell, "id": 2, "time": 106.0, "fitness": 0.3, "metrics": {"evaluated_as": "a:0"}},
            {**ask, "id": 3, "time": 106.0, "parents": [2], "origin": "mutation"},
        ],
    }
    for name, events in islands.items():
        folder = tmp_path / "islands" / name
        folder.mkdir(parents=True)
        for event in events:
            append_json_line(folder / "journal.jsonl", event)
    found = read_searches(tmp_path)
    assert found is not None
    assert [found.name(number) for number in found.trials] == ["a:0", "b:0", "b:1", "b:3"]
    assert (found.islands, found.workers, found.elapsed) == (2, 5, 6.0)
    assert [trial.parents for trial in found.trials.values()] == [(), (), (0,), (0,)]
    assert [trial.fitness for trial in found.finished] == [0.3, 0.2]
    best = found.best
    assert best is not None
    assert (found.number("b:1"), best.asked, best.told) == (best.id, 4.0, 6.0)
    assert read_searches(tmp_path / "elsewhere") is None
