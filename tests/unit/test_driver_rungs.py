"""A search whose trials pause at rungs and inherit weights: with real trainings, and interrupted."""

import pytest
import torch
from runner import toy_data, toy_recipe

from dmi_hpc.config import load_recipe
from dmi_hpc.tasks import make_task
from search.driver import Driver, Start
from search.evolution.evolve import Success
from search.evolution.fidelity import Halving
from search.records import islands
from search.records.history import MAIN
from search.records.kept import Kept
from search.spaces.genome import to_json
from search.trials.trial import Evaluator

SEARCH = "evaluations = 12\ninitial = 4\nreduction = 2\n"
INHERITS = "least_epochs = 1\ninherit = true"


def recipe_of(folder, data, keys=INHERITS):
    path = toy_recipe(folder / "toy.toml", data, search=SEARCH + keys)
    path.write_text(path.read_text().replace("\nepochs = 2\n", "\nepochs = 4\n"))
    return load_recipe(path)


def advance(recipe, folder, data, stages=None, island=MAIN):
    space = make_task(recipe.task).space()
    driver = Driver(recipe, space, folder, start=Start(island=island))
    driver.start(1, 1.0)
    evaluator = Evaluator(recipe, data, torch.device("cpu"), 1.0, Kept(driver.folder))
    while not driver.done and (stages is None or stages > 0):
        stages = None if stages is None else stages - 1
        proposal = driver.next_proposal()
        assignment = driver.assignment(proposal.id)
        driver.finished(proposal.id, evaluator(to_json(proposal.genome), assignment))
    return driver


def told(driver):
    keys = ("event", "id", "rung", "fitness", "status")
    events = [e for e in driver.journal.events() if e["event"] in ("ask", "promote", "tell")]
    rungs = [{**e, **e.get("metrics", {})} for e in events]
    return [tuple(event.get(key) for key in keys) for event in rungs]


@pytest.mark.parametrize("cut", [3, 11])
def test_an_interrupted_search_over_rungs_retraces_the_whole_one(tmp_path, cut):
    data = toy_data(tmp_path / "data")
    recipe = recipe_of(tmp_path, data)
    whole = advance(recipe, tmp_path / "whole", data)
    advance(recipe, tmp_path / "cut", data, cut)
    again = advance(recipe, tmp_path / "cut", data)
    assert told(again) == told(whole)
    events = whole.journal.events()
    tells = [e for e in events if e["event"] == "tell"]
    assert {e["metrics"]["rung"] for e in tells} == {0, 1, 2}
    assert {e["metrics"]["epochs"] for e in tells} == {1, 2, 4}
    assert sum(e["event"] == "ask" for e in events) == 12
    assert any("inherited_from" in e["metrics"] for e in tells)
    size = recipe.search.population
    weights = list((tmp_path / "whole" / "weights").iterdir())
    trials = list((tmp_path / "whole" / "trials").iterdir())
    assert 0 < len(weights) <= size
    assert len(trials) <= size
    number, error = whole.halving.best()
    assert isinstance(whole.evolution.outcomes[number], Success)
    assert isinstance(whole.halving, Halving)
    assert error == min(
        e["fitness"] for e in tells if e["id"] == number and e["metrics"]["rung"] <= 2
    )


@pytest.mark.parametrize(
    ("keys", "epochs"),
    [
        ("rungs = [200, 201]\nrung_unit = 'samples'", [{2}, {2}, {4}]),
        ("rungs = [1e-9, 1e-8]\nrung_unit = 'seconds'", [{1}, {1}, {4}]),  # both within an epoch
        ("rungs = [1, 3]\nextrapolate = true", [{1}, {3}, {4}]),
    ],
)
def test_rungs_in_any_unit_are_reached_after_whole_epochs(tmp_path, keys, epochs):
    data = toy_data(tmp_path / "data")
    driver = advance(recipe_of(tmp_path, data, keys), tmp_path / "search", data)
    told = [e["metrics"] for e in driver.journal.events() if e["event"] == "tell"]
    found = [{m["epochs"] for m in told if m["rung"] == rung} for rung in range(3)]
    assert found == epochs
    if "extrapolate" in keys:
        assert all(len(m["curve"]) == m["epochs"] for m in told)


def test_islands_compare_their_trials_at_equal_rungs(tmp_path, monkeypatch):
    monkeypatch.setattr(islands, "POLL_S", 0.0)
    monkeypatch.setattr(islands, "POLL_SHARE", 1e9)
    data = toy_data(tmp_path / "data")
    recipe = recipe_of(tmp_path, data, "least_epochs = 1\nextrapolate = true")
    first = advance(recipe, tmp_path / "search", data, 10, "a")
    came = {n: first.halving.rungs.reached(n) for n in first.evolution.outcomes}
    assert max(came.values()) > 0
    second = advance(recipe, tmp_path / "search", data, 0, "b")
    rungs, proposals = second.halving.rungs, second.evolution.proposals
    assert second.progress.elsewhere == len(came)
    for number, rung in came.items():
        theirs = first.evolution.proposals[number].hash
        (mine,) = [p.id for p in proposals.values() if p.hash == theirs]
        assert mine < 0
        assert rungs.reached(mine) == rung
        assert rungs.error(mine, rung) == first.halving.rungs.error(number, rung)
    assert set(rungs.places()) == set(second.evolution.outcomes)
    assert rungs.next_promotion() is None  # what waits there goes on there
    advance(recipe, tmp_path / "search", data, 6, "b")
    again = advance(recipe, tmp_path / "search", data, 0, "b")
    assert again.halving.rungs.reached(-1) == rungs.reached(-1)
    events = again.journal.events()
    assert sum(e["event"] == "migrant" for e in events) == len(came)
    assert sum(e["event"] == "risen" for e in events) == sum(came.values())
    assert not again.warnings
