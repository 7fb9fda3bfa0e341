"""One evaluation in this process: its fitness, or the kind of its failure."""

import pytest
import torch
from runner import toy_data, toy_recipe

from dmi_hpc.config import load_recipe
from dmi_hpc.tasks import make_task
from search.driver import founder_defaults
from search.evolve import Failure, Success
from search.genome import founder_genome, to_json
from search.trial import Evaluator


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


def evaluate(data, folder, task="", search="evaluations = 1"):
    recipe = load_recipe(toy_recipe(folder / "toy.toml", data, task, search=search))
    space = make_task(recipe.task).space()
    genome = founder_genome(space.founders[0], space, founder_defaults(space, recipe.train))
    return Evaluator(recipe, data, torch.device("cpu"))(to_json(genome))


def test_the_same_genome_has_the_same_fitness(data, tmp_path):
    first, second = evaluate(data, tmp_path), evaluate(data, tmp_path)
    assert isinstance(first.told, Success)
    assert first.told == second.told
    assert first.metrics["parameters"] == 8 * 16 + 16 + 16 + 1
    assert first.metrics["epochs"] == 2


@pytest.mark.parametrize(
    ("task", "search", "kind", "said"),
    [
        ('fault = "exception"', "", "exception", "ZeroDivisionError: the user's own bug"),
        ('fault = "nan"', "", "nan", "loss is nan"),
        ('fault = "slow"', "trial_time_limit_s = 0.02", "timeout", "not finished after 0.02 s"),
        ("", "trial_memory_GB = 1e-9", "memory", "161 parameters and batch 20"),
    ],
)
def test_whatever_goes_wrong_is_a_typed_outcome(data, tmp_path, task, search, kind, said):
    outcome = evaluate(data, tmp_path, task, search)
    assert isinstance(outcome.told, Failure)
    assert outcome.told.kind == kind
    assert said in outcome.told.message
    assert ("toy_task.py" in outcome.told.traceback) == (kind == "exception")
