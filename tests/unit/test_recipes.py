"""A found network as a recipe: written as TOML, read back as the same."""

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.config import Recipe, load_recipe
from dmi_hpc.errors import RecipeError
from dmi_hpc.models.spec import Activation, Conv, Dense, NetworkSpec, Norm, Parallel, Residual
from search.results.recipes import to_toml, training_recipe

SEARCHED = Recipe.model_validate(
    {
        "name": "alloy",
        "seed": 7,
        "task": {"name": "toy_task:Toy", "faults": {"8": "nan"}},
        "train": {"epochs": 3, "clip_norm": 0.5, "start": {"path": "/old"}, "freeze": ["0.*"]},
        "search": {"evaluations": 20},
    }
)
NESTED = (Conv(filters=4), Norm(op="group"), Activation())
NETWORK = NetworkSpec(
    input_shape=(1, 9, 9),
    layers=(Residual(layers=NESTED), Parallel(branches=((), NESTED)), Dense(units=16)),
)


def test_recipe_of_a_network_trains_it_in_full_and_from_scratch(tmp_path):
    made = training_recipe(SEARCHED, tmp_path, NETWORK, {"learning_rate": 2e-5}, seed=9)
    path = tmp_path / "made.toml"
    path.write_text(to_toml(made))
    read = load_recipe(path)
    assert read == made.model_copy(update={"search": read.search})
    assert (read.seed, read.data.path, read.train.start, read.train.freeze) == (
        9,
        tmp_path,
        None,
        (),
    )
    assert (read.train.learning_rate, read.train.epochs, read.train.clip_norm) == (2e-5, 3, 0.5)
    assert (read.model.source, read.model.layers) == ("layers", NETWORK.layers)
    assert read.task == SEARCHED.task


def test_hyper_parameter_that_training_does_not_know_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"hyper-parameters of the search.*'wings'"):
        training_recipe(SEARCHED, tmp_path, NETWORK, {"wings": 2}, seed=9)


plain = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
values = st.recursive(
    st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
    | plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(plain, values, max_size=4))
def test_any_option_of_a_task_is_read_back(options):
    task = {"name": "toy", **options}
    text = to_toml(SEARCHED.model_copy(update={"task": task}))
    assert tomllib.loads(text)["task"] == task
