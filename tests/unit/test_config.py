from pathlib import Path

import pandas
import pytest

from dmi_hpc.cli.options import run_of
from dmi_hpc.config import SearchConfig, load_recipe
from dmi_hpc.data.elements import ELEMENTS
from dmi_hpc.errors import RecipeError
from dmi_hpc.tasks import check_recipe, make_task

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
MINIMAL = '[task]\nname = "homogenization"\n'
LAYERS = MINIMAL + '[model]\nsource = "{}"\nlayers = [{{ kind = "dense", {} }}]\n'


def write(folder, text):
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_of_the_project_is_valid(path, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    elements = pandas.DataFrame({"element": ELEMENTS, "Z": range(len(ELEMENTS))})
    elements.to_csv(tmp_path / "data" / "element_properties_oliynyk.csv.xz")
    monkeypatch.chdir(tmp_path)  # paths of a recipe are those of its user
    recipe = load_recipe(path)
    check_recipe(recipe, where=path.name)
    if recipe.model.source == "search":
        make_task(recipe.task).space()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (MINIMAL + "[train]\nepoch = 3\n", ["'train.epoch'", "'epochs'", "learning_rate"]),
        (MINIMAL + "[trian]\nepochs = 3\n", ["'trian'", "'train'", "search"]),
        (MINIMAL + '[train]\nepochs = "many"\n', ["'train.epochs'", "integer", "'many'"]),
        (MINIMAL + "[train]\nlearning_rate = -1\n", ["'train.learning_rate'", "greater than 0"]),
        (MINIMAL + '[train]\noptimizer = "lion"\n', ["'train.optimizer'", "adamw", "'lion'"]),
        (MINIMAL + "[data]\nvalidation = 0.5\ntest = 0.5\n", ["'data'", "less than 1"]),
        (MINIMAL + '[model]\nsource = "layers"\n', ["'model'", "none are given"]),
        (LAYERS.format("published", "units = 4"), ["'model'", 'source is "published"']),
        (LAYERS.format("layers", "unit = 4"), ["dense.unit'", "'units'", "here: kind, units"]),
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


def test_a_missing_or_unreadable_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(RecipeError, match=f"{tmp_path}: not a readable recipe: Is a directory"):
        load_recipe(tmp_path)
    (tmp_path / "image.toml").write_bytes(b"\xff\xd8")
    with pytest.raises(RecipeError, match=r"image\.toml: not valid TOML"):
        load_recipe(tmp_path / "image.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[task]\nname = "homogenisation"\n', "expected one of .*, elemnet, .*homogenization"),
        (MINIMAL + "voxel = 5\n", "task: unknown key 'voxel'"),
        (LAYERS.format("layers", "units = 4"), r"model: layer 1 \(dense\): a dense layer needs"),
        ('[task]\nname = "elemnet"\ntrain_range = [5, -5]\n', r"expected \[low, high\]"),
    ],
)
def test_a_wrong_task_leaves_no_run_folder(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError, match=said) as caught:
        run_of(path, tmp_path / "run")
    assert str(caught.value).startswith(f"{path}: ")
    assert not (tmp_path / "run").exists()


def test_unknown_task_lists_the_known_ones():
    with pytest.raises(RecipeError, match=r"elemnet, .*homogenization"):
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


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"ranks": 2, "limits": {"latency_s": 1.0}}, "limits.latency_s"),
        ({"ranks": 2, "inherit": True}, "ranks = 2 with inherit"),
        ({"epochs": 8, "least_epochs": 8}, "fewer than epochs = 8"),
        ({"least_epochs": 2, "rungs": [3]}, "leave out one"),
        ({"rungs": [3, 3]}, "expected to rise"),
        ({"epochs": 8, "rungs": [2, 8]}, "fewer than epochs = 8"),
        ({"extrapolate": True}, "no trial pauses"),
        ({"objectives": ["flops"]}, "error first"),
    ],
)
def test_searches_that_cannot_be_are_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        SearchConfig.model_validate(keys)
