"""A search whose trials pause at rungs and inherit weights: with real trainings, and interrupted."""

import pytest
import torch
from runner import toy_data, toy_recipe

from dmi_hpc.config import load_recipe
from dmi_hpc.tasks import make_task
from search.driver import Driver
from search.evolution.evolve import Success
from search.evolution.fidelity import Halving
from search.records.kept import Kept
from search.spaces.genome import to_json
from search.trials.trial import Evaluator

SEARCH = "evaluations = 12\ninitial = 4\nleast_epochs = 1\nreduction = 2\ninherit = true"


def recipe_of(folder, data):
    path = toy_recipe(folder / "toy.toml", data, search=SEARCH)
    path.write_text(path.read_text().replace("\nepochs = 2\n", "\nepochs = 4\n"))
    return load_recipe(path)


def advance(recipe, folder, data, stages=None):
    driver = Driver(recipe, make_task(recipe.task).space(), folder)
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
