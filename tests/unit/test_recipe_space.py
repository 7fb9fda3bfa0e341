"""`[search.space]`: what a recipe changes of its task's search space."""

import re

import pytest
from runner import toy_recipe

from dmi_hpc.config import TrainConfig, load_recipe
from dmi_hpc.errors import RecipeError
from dmi_hpc.models.space import Choice, FloatRange
from dmi_hpc.models.spec import shapes
from dmi_hpc.tasks import make_task
from search.driver import Driver
from search.setting import founder_defaults
from search.spaces.genome import decode, founder_genome
from search.spaces.networks import Networks
from search.spaces.recipe import recipe_space


def recipe_of(folder, space=""):
    path = toy_recipe(folder / "toy.toml")
    path.write_text(path.read_text() + space)
    return load_recipe(path)


def space_of(folder, text):
    recipe = recipe_of(folder, text)
    return recipe_space(recipe, make_task(recipe.task))


@pytest.mark.parametrize(
    "task",
    [
        {"name": "chemixnet", "branches": "fingerprint"},
        *({"name": name} for name in ("crystals", "elemnet", "homogenization", "mpnn")),
        *({"name": name} for name in ("oxides", "roost", "sites")),
    ],
    ids=lambda task: task["name"],
)
def test_founders_of_every_task_are_networks_of_its_space(task):
    space = make_task(task).space()
    train = {name: getattr(TrainConfig(), name) for name in space.hyper}
    for founder in space.founders:
        genome = founder_genome(founder, space, train)
        assert shapes(decode(genome, space.network)) == shapes(founder.network)


def test_without_it_the_space_is_that_of_the_task(tmp_path):
    recipe = recipe_of(tmp_path)
    assert recipe_space(recipe, make_task(recipe.task)) == make_task(recipe.task).space()


def test_a_recipe_opens_narrows_and_closes(tmp_path):
    text = """
[search.space]
founders = false
[search.space.network]
units = [8, 16]
dense_skips = ["none", "residual"]
[search.space.hyper]
learning_rate = { kind = "float", low = 1e-4, high = 1e-2, log = true }
optimizer = { kind = "choice", values = ["adam", "sgd"] }
batch_size = false
"""
    recipe = recipe_of(tmp_path, text)
    task = make_task(recipe.task)
    space = recipe_space(recipe, task)
    assert space.network.units == (8, 16)
    assert space.network.dense_skips == (None, "residual")
    assert space.network.activations == task.space().network.activations
    assert space.hyper["learning_rate"] == FloatRange(low=1e-4, high=1e-2, log=True)
    assert space.hyper["optimizer"] == Choice(values=("adam", "sgd"))
    assert "batch_size" not in space.hyper
    assert space.founders == ()
    defaults = founder_defaults(task.space(), recipe.train)
    assert Networks(space).fingerprint() != Networks(task.space(), defaults).fingerprint()
    driver = Driver(recipe, space, tmp_path)
    driver.start(1, 2.0)
    genomes = [driver.next_proposal().genome for _ in range(6)]
    assert {gene.units for genome in genomes for gene in genome.dense} <= {8, 16}
    assert all("batch_size" not in dict(genome.hyper) for genome in genomes)


def test_founders_lose_what_is_not_varied(tmp_path):
    space = space_of(tmp_path, "[search.space.hyper]\nlearning_rate = false\nbatch_size = false\n")
    recipe = recipe_of(tmp_path)
    assert space.founders
    Networks(space, founder_defaults(space, recipe.train))  # raises if one sets what is not varied


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[search.space.network]\ninput_shape = [3]", "input_shape: the task decides that"),
        ("[search.space.network]\nunit = [3]", "unknown key 'unit'. Did you mean 'units'?"),
        ('[search.space.network]\nnorms = ["layer"]', "search.space.network: key 'norms.0'"),
        (
            "[search.space.hyper]\nmomentum = false",
            "momentum = false, but the task's search does not",
        ),
        ('[search.space.hyper]\nloss = { kind = "some" }', "hyper.loss"),
        (
            '[search.space.hyper]\nmomentum = { kind = "float", low = 0, high = 0.9, '
            'when = { optimizer = ["sgd"] } }',
            "momentum: when names 'optimizer'",
        ),
    ],
)
def test_what_makes_no_sense_is_named(tmp_path, text, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        space_of(tmp_path, text + "\n")
