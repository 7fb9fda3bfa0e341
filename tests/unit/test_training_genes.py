"""A search over how networks are trained: optimiser, schedule, loss, augmentation."""

from dataclasses import replace

import pytest
import torch
from runner import toy_data, toy_recipe

from dmi_hpc.config import load_recipe
from dmi_hpc.tasks import make_task
from search.driver import Driver
from search.evolution.evolve import Success
from search.results.recipes import to_toml, trained_with, training_recipe
from search.setting import founder_defaults
from search.spaces.genome import decode, founder_genome, to_json
from search.spaces.recipe import recipe_space
from search.trials.trial import Evaluator

SPACE = """
[search.space.network]
units = [8, 16]
dense_blocks = [1, 2]
[search.space.hyper]
optimizer = { kind = "choice", values = ["adamw", "sgd"] }
momentum = { kind = "float", low = 0.5, high = 0.95, when = { optimizer = ["sgd"] } }
schedule = { kind = "choice", values = ["cosine", "one_cycle", "step"] }
decay_epochs = { kind = "int", low = 1, high = 2, when = { schedule = ["step"] } }
loss = { kind = "choice", values = ["mse", "huber"] }
augment = { kind = "choice", values = [true, false] }
"""
VALUES = {
    "optimizer": {"adamw", "sgd"},
    "schedule": {"cosine", "one_cycle", "step"},
    "loss": {"mse", "huber"},
    "augment": {True, False},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def recipe(data, tmp_path):
    path = toy_recipe(tmp_path / "toy.toml", data, search="evaluations = 24\ninitial = 12")
    text = path.read_text().replace("toy_task:Toy", "mirrored_task:Mirrored")
    path.write_text(text + SPACE)
    return load_recipe(path)


def test_a_search_varies_them_and_the_winner_is_trained_with_its_own(recipe, data, tmp_path):
    space = recipe_space(recipe, make_task(recipe.task))
    driver = Driver(recipe, space, tmp_path / "search")
    driver.start(1, 1.0)
    evaluator, tried = Evaluator(recipe, data, torch.device("cpu"), 1.0), []
    while (proposal := driver.next_proposal()) is not None:
        outcome = evaluator(to_json(proposal.genome))
        assert isinstance(outcome.told, Success), outcome.told
        tried.append(dict(proposal.genome.hyper))
        assert ("momentum" in tried[-1]) == (tried[-1]["optimizer"] == "sgd")
        driver.finished(proposal.id, outcome)
    assert {name: {hyper[name] for hyper in tried} for name in VALUES} == VALUES
    best = driver.evolution.proposals[driver.halving.best()[0]].genome
    network = decode(best, space.network)
    made = training_recipe(recipe, data, network, trained_with(best, {}), seed=1)
    path = tmp_path / "winner.toml"
    path.write_text(to_toml(made))
    trained = load_recipe(path).train
    assert {name: getattr(trained, name) for name, _ in best.hyper} == dict(best.hyper)


@pytest.mark.parametrize("name", sorted(VALUES))
def test_each_of_them_changes_the_training(recipe, data, name):
    space = recipe_space(recipe, make_task(recipe.task))
    genome = founder_genome(space.founders[0], space, founder_defaults(space, recipe.train))
    evaluator = Evaluator(recipe, data, torch.device("cpu"), 1.0)
    errors = set()
    for value in VALUES[name]:
        hyper = {**dict(genome.hyper), name: value, "momentum": 0.9, "decay_epochs": 1}
        changed = replace(genome, hyper=tuple(sorted(hyper.items())))
        errors.add(evaluator(to_json(changed)).told.fitness)
    assert len(errors) == len(VALUES[name])
