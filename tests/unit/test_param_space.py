"""Ray Tune's domains as parameters of the search."""

import numpy as np
import pytest
from ray import tune
from ray.tune.search.sample import Categorical

from dmi_hpc.errors import RecipeError
from search.param_space import converted
from search.spaces.parameters import Choice, Integer, Parameters, Real


def values_of(domain, count=300):
    """All values that a search draws for it, and those that Ray draws."""
    found = converted({"p": domain})
    space, rng = Parameters(found.spec), np.random.default_rng(0)
    ours = [found.config(space, space.random(rng))["p"] for _ in range(count)]
    rays = [domain.sample(random_state=np.random.default_rng([1, i])) for i in range(count)]
    return ours, rays


@pytest.mark.parametrize(
    "domain",
    [
        tune.choice(["relu", "gelu", None]),
        tune.choice([1, True, 1.0]),  # equal for Python, but not the same
        tune.randint(2, 7),
        tune.lograndint(1, 6),
        tune.qrandint(4, 20, 4),
        tune.qlograndint(4, 20, 4),
        tune.qrandint(3, 21, 5),  # bounds off the grid
        tune.qrandint(0, 4, 1),
        tune.quniform(-0.5, 1.0, 0.25),
        tune.qloguniform(0.25, 2.0, 0.25),
        tune.randint(5, 6),
    ],
)
def test_the_same_values_as_ray(domain):
    ours, rays = values_of(domain)
    assert {repr(v) for v in ours} == {repr(v) for v in rays} - {"-0.0"}


@pytest.mark.parametrize("domain", [tune.uniform(-2, 3), tune.loguniform(1e-5, 1e-1)])
def test_the_same_distribution_as_ray(domain):
    ours, rays = values_of(domain)
    quantiles = np.linspace(0.1, 0.9, 9)
    scale = np.log if min(rays) > 0 else np.asarray
    spread = np.ptp(scale(rays))
    ours, rays = np.quantile(scale(ours), quantiles), np.quantile(scale(rays), quantiles)
    assert np.abs(ours - rays).max() < 0.12 * spread


def test_kinds_ranges_and_constants():
    found = converted(
        {
            "train_loop_config": {"lr": tune.loguniform(1e-4, 1e-1), "epochs": 50},
            "units": tune.randint(8, 129),
            "batch": tune.qrandint(16, 64, 16),
            "data": {"path": "somewhere", "options": [1, 2]},
        }
    )
    assert found.spec == {
        "train_loop_config": {"lr": Real(low=1e-4, high=1e-1, log=True)},
        "units": Integer(low=8, high=128),
        "batch": Integer(low=16, high=64, step=16),
    }


def test_a_choice_among_things_that_are_no_plain_values():
    class Thing:
        def __repr__(self):
            return "thing"

    things = [Thing(), Thing(), [1, 2], len]
    found = converted({"a": {"b": tune.choice(things)}})
    space = Parameters(found.spec)
    assert found.spec["a"]["b"] == Choice(
        values=("0: thing", "1: thing", "2: [1, 2]", f"3: {len!r}")
    )
    rng = np.random.default_rng(0)
    drawn = [found.config(space, space.random(rng))["a"]["b"] for _ in range(50)]
    assert all(any(thing is one for one in drawn) for thing in things)
    for thing in things:
        point = space.point(found.plain({"a": {"b": thing, "other": 1}, "more": 2}))
        assert found.config(space, point)["a"]["b"] is thing
    flat = space.point(found.plain({"a/b": things[1]}))
    assert found.config(space, flat)["a"]["b"] is things[1]


@pytest.mark.parametrize(
    ("param_space", "said"),
    [
        ({"a": {"b": tune.grid_search([1, 2])}}, r"'a/b' is tune.grid_search.*use tune.choice"),
        ({"a": tune.randn(1, 2)}, r"'a' is tune.randn, without bounds.*tune.uniform\(-5, 7\)"),
        ({"a": tune.qrandn(1, 2, 0.5)}, "without bounds"),
        ({"a": tune.sample_from(lambda config: 1)}, "compute in the trainable"),
        ({"a": [tune.uniform(0, 1), 2]}, "inside a list.*a dict"),
        ({"a": tune.choice([1, {"b": tune.uniform(0, 1)}])}, "hold domains"),
        ({"a/b": tune.uniform(0, 1)}, "a string without '/'"),
        ({"a": tune.qrandint(6, 9, 10)}, "holds no value"),
        ({"a": Categorical([1, 2]).grid()}, "use tune.choice"),
    ],
)
def test_what_cannot_be_searched_says_what_to_write(param_space, said):
    with pytest.raises(RecipeError, match=said):
        converted(param_space)


def test_a_point_without_a_value_is_refused():
    found = converted({"a": tune.uniform(0, 1), "b": tune.choice([len, max])})
    with pytest.raises(RecipeError, match="no value for 'b'; it has: a"):
        found.plain({"a": 1})
    with pytest.raises(RecipeError, match=r"found .*sum.*, expected one of 0: "):
        found.plain({"a": 1, "b": sum})
