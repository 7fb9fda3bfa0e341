from pathlib import Path

import pytest

from dmi_hpc.config import load_recipe
from dmi_hpc.errors import RecipeError
from dmi_hpc.tasks import make_task

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
MINIMAL = '[task]\nname = "homogenization"\n'


def write(folder, text):
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_of_the_project_is_valid(path):
    recipe = load_recipe(path)
    make_task(recipe.task).space()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (MINIMAL + "[train]\nepoch = 3\n", ["'train.epoch'", "'epochs'", "learning_rate"]),
        (MINIMAL + "[trian]\nepochs = 3\n", ["'trian'", "'train'", "search"]),
        (MINIMAL + '[train]\nepochs = "many"\n', ["'train.epochs'", "integer", "'many'"]),
        (MINIMAL + "[train]\nlearning_rate = -1\n", ["'train.learning_rate'", "greater than 0"]),
        (MINIMAL + '[train]\noptimizer = "lion"\n', ["'train.optimizer'", "adamw", "'lion'"]),
        (MINIMAL + "[search.train]\nepoch = 1\n", ["search.train", "'epoch'", "'epochs'"]),
        ("seed = 1\n", ["'task'", "missing"]),
        ("[task]\nvoxels = 5\n", ["task.name"]),
        ("[task\n", ["not valid TOML"]),
    ],
)
def test_a_wrong_recipe_names_file_key_and_expectation(tmp_path, text, parts):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    for part in [str(path), *parts]:
        assert part in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "absent.toml")


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(RecipeError, match="elemnet, homogenization"):
        make_task({"name": "homogenisation"})


def test_unknown_task_option_is_refused():
    with pytest.raises(RecipeError, match=r"unknown key 'voxel'. Did you mean 'voxels'\?"):
        make_task({"name": "homogenization", "voxel": 5})


def test_a_users_own_task_is_found_by_module_and_class():
    assert make_task({"name": "toy_task:Toy", "samples": 5}).input_shape == (8,)
    with pytest.raises(RecipeError, match="no_such_module"):
        make_task({"name": "no_such_module:Toy"})


def test_fingerprint_follows_every_key(tmp_path):
    first = load_recipe(write(tmp_path, MINIMAL))
    same = load_recipe(write(tmp_path, MINIMAL))
    other = load_recipe(write(tmp_path, MINIMAL + "[train]\nepochs = 3\n"))
    assert first.fingerprint() == same.fingerprint() != other.fingerprint()
