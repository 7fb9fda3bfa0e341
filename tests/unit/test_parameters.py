"""Plain parameters: nested, conditional, from TOML, and never a value that they do not have."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.errors import RecipeError
from search.conformance import SpaceConformance
from search.evolution.evolve import Evolution, EvolutionConfig, Success
from search.spaces.parameters import Choice, Integer, Parameters, Real

SPEC = {
    "optimizer": {
        "name": Choice(values=("adam", "sgd")),
        "learning_rate": Real(low=1e-5, high=1e-1, log=True),
        "momentum": Real(low=0.0, high=0.99, when={"optimizer/name": ("sgd",)}),
        "nesterov": Choice(values=(False, True), when={"optimizer/name": ("sgd",)}),
    },
    "units": Integer(low=16, high=1024, log=True),
    "layers": Integer(low=1, high=5),
    "batch": Choice(values=(16, 32, 64, 128), ordered=True),
    "dropout": Real(low=0.0, high=0.5, step=0.1),
    "epochs": 50,
}
KNOWN = {"optimizer": {"name": "adam", "learning_rate": 1e-3}, "units": 64, "layers": 2}
FOUNDER = {**KNOWN, "batch": 32, "dropout": 0.1, "epochs": 50}


class TestParameters(SpaceConformance):
    def make_space(self):
        return Parameters(SPEC, founders=[FOUNDER])


class TestCanonicalParameters(SpaceConformance):
    """a and b are interchangeable."""

    def make_space(self):
        values = tuple(range(4))
        return Parameters(
            {"a": Choice(values=values), "b": Choice(values=values), "c": Real(low=0, high=1)},
            canonical=lambda v: {**v, "a": min(v["a"], v["b"]), "b": max(v["a"], v["b"])},
            features=lambda v: [v["a"] / 3, v["b"] / 3, v["c"]],
        )


@given(st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_every_genome_holds_what_the_spec_allows_and_nothing_else(seed):
    space = Parameters(SPEC)
    rng = np.random.default_rng(seed)
    first, second = space.random(rng), space.random(rng)
    for genome in (first, space.mutated(first, rng), space.stepped(first, rng)):
        for made in (genome, space.crossed(genome, second, rng)):
            values = dict(made)
            assert space.point(space.config(made)) == made
            sgd = values["optimizer/name"] == "sgd"
            assert ("optimizer/momentum" in values) == ("optimizer/nesterov" in values) == sgd
            assert values["epochs"] == 50
            assert round(values["dropout"] * 10, 6).is_integer()


def test_a_configuration_is_nested_as_the_spec():
    space = Parameters(SPEC, founders=[FOUNDER])
    (founder,) = space.founders()
    assert space.config(founder) == FOUNDER
    assert space.point(dict(founder)) == founder  # flat ones are read as well


@pytest.mark.parametrize(
    "parameter",
    [
        Real(low=-2.0, high=3.0),
        Real(low=1e-6, high=1.0, log=True),
        Real(low=0.0, high=1.0, step=0.25),
        Integer(low=1, high=5),
        Integer(low=8, high=4096, log=True),
        Integer(low=0, high=100, step=10),
        Choice(values=("a", "b", None)),
        Choice(values=(1, 2, 4, 8), ordered=True),
    ],
)
def test_draws_and_steps_stay_inside_and_reach_everything(parameter):
    rng = np.random.default_rng(0)
    drawn = [parameter.random(rng) for _ in range(500)]
    assert all(parameter.holds(value) for value in drawn)
    stepped = [parameter.stepped(value, rng) for value in drawn]
    assert all(parameter.holds(value) for value in stepped)
    if isinstance(parameter, Choice):
        assert set(drawn) == set(parameter.values)
        assert all(a != b for a, b in zip(drawn, stepped, strict=True))
    else:
        assert np.mean([a != b for a, b in zip(drawn, stepped, strict=True)]) > 0.5
        places = [parameter.position(value) for value in drawn]
        assert min(places) < 0.1 and max(places) > 0.9
        assert np.mean(places) == pytest.approx(0.5, abs=0.06)


def test_ends_of_a_linear_range_of_integers_are_as_likely_as_the_rest():
    rng = np.random.default_rng(0)
    drawn = [Integer(low=1, high=4).random(rng) for _ in range(4000)]
    assert np.bincount(drawn)[1:] / 4000 == pytest.approx([0.25] * 4, abs=0.03)


def test_steps_are_small_and_sets_change_only_if_there_is_nothing_else():
    space = Parameters({"rate": Real(low=0.0, high=1.0), "kind": Choice(values=("a", "b"))})
    rng = np.random.default_rng(0)
    parent = space.point({"rate": 0.5, "kind": "a"})
    rates = [dict(space.stepped(parent, rng))["rate"] for _ in range(200)]
    assert {dict(space.stepped(parent, rng))["kind"] for _ in range(200)} == {"a"}
    assert np.median(np.abs(np.array(rates) - 0.5)) < 0.1
    sets = Parameters({"kind": Choice(values=("a", "b"))})
    assert sets.stepped((("kind", "a"),), rng) == (("kind", "b"),)


def test_restructured_ones_have_other_sets_and_numbers_drawn_anew_only_without_sets():
    space = Parameters({"rate": Real(low=0.0, high=1.0), "kind": Choice(values=("a", "b"))})
    rng = np.random.default_rng(0)
    parent = space.point({"rate": 0.5, "kind": "a"})
    children = [dict(space.restructured(parent, rng)) for _ in range(50)]
    assert children == [{"rate": 0.5, "kind": "b"}] * 50
    numbers = Parameters({"rate": Real(low=0.0, high=1.0)})
    rates = [dict(numbers.restructured((("rate", 0.5),), rng))["rate"] for _ in range(200)]
    assert np.median(np.abs(np.array(rates) - 0.5)) == pytest.approx(0.25, abs=0.06)


HASHED = """
import numpy as np
from search.spaces.parameters import Parameters, Real
space = Parameters({f"parameter {i}": Real(low=0.0, high=1.0) for i in range(9)})
rng = np.random.default_rng(3)
genome = space.random(rng)
for _ in range(20):
    genome = space.mutated(space.stepped(genome, rng), rng)
print(genome)
"""


def test_children_do_not_depend_on_the_hashes_of_names():
    """Python seeds them anew in every process: a resumed search is another process."""
    made = {
        subprocess.run(
            [sys.executable, "-c", HASHED],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(made) == 1


def test_categories_are_equally_far_from_each_other_and_numbers_are_not():
    space = Parameters({"kind": Choice(values=("a", "b", "c")), "x": Real(low=0, high=10)})
    points = [{"kind": k, "x": x} for k, x in (("a", 0.0), ("b", 0.0), ("c", 0.0), ("a", 5.0))]
    a, b, c, far = space.features([space.point(p) for p in points])
    distances = [np.linalg.norm(u - v) for u, v in ((a, b), (b, c), (a, c), (a, far))]
    assert distances == pytest.approx([1.0, 1.0, 1.0, 0.5])


def test_toml_gives_the_same_space():
    text = """
    epochs = 50
    units = {kind = "integer", low = 16, high = 1024, log = true}
    [optimizer]
    name = {kind = "choice", values = ["adam", "sgd"]}
    momentum = {kind = "real", low = 0.0, high = 0.99, when = {"optimizer/name" = ["sgd"]}}
    """
    spec = {"epochs": 50, "units": SPEC["units"]}
    spec["optimizer"] = {name: SPEC["optimizer"][name] for name in ("name", "momentum")}
    found = Parameters.from_data(tomllib.loads(text))
    assert found.parameters == Parameters(spec).parameters
    assert found.fingerprint() == Parameters(spec).fingerprint()
    assert found.fingerprint() != Parameters({**spec, "epochs": 51}).fingerprint()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"a": {"b": {"kind": "real", "low": 2, "high": 1}}}, "parameter a/b.*low < high"),
        ({"a": {"kind": "integer", "low": 1}}, "parameter a: .*high"),
        ({"a": {"kind": "whole", "low": 1}}, "parameter a: .*'whole'"),
        ({"a": {"kind": "choice", "values": [1, 1]}}, "distinct"),
        ({"a": {"kind": "choice", "values": [1, 2], "when": {"b": [1]}}}, "a: when names 'b'"),
        (
            {"a": {"kind": "choice", "values": [1], "when": {"b": [3]}}, "b": 2},
            "a: when b is 3, which it never is",
        ),
        (
            {
                "a": {"kind": "choice", "values": [1], "when": {"b": [2]}},
                "b": {"kind": "choice", "values": [2], "when": {"a": [1]}},
            },
            "depend on each other",
        ),
        ({"a": [1, 2]}, r"parameter a: found \[1, 2\]"),
    ],
)
def test_a_spec_that_makes_no_sense_says_where(data, words):
    with pytest.raises(RecipeError, match=words):
        Parameters.from_data(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unit": 3}, "unknown parameters unit; the space has"),
        ({"units": 2.5}, "units = 2.5"),
        ({"layers": 9}, "layers = 9"),
        ({"layers": True}, "layers = True"),
        ({"optimizer": {"name": "sgd", "learning_rate": 0.01}}, "momentum has no value"),
    ],
)
def test_a_founder_outside_the_space_is_refused(change, words):
    with pytest.raises(RecipeError, match=words):
        Parameters(SPEC, founders=[{**FOUNDER, **change}])


def test_a_search_over_mixed_parameters_finds_the_optimum():
    space = Parameters(SPEC)
    evolution = Evolution(space, EvolutionConfig(seed=1))
    for _ in range(120):
        proposal = evolution.ask()
        values = dict(proposal.genome)
        error = abs(np.log10(values["optimizer/learning_rate"]) + 2.5)
        error += (values["optimizer/name"] == "adam") + 2 * abs(
            values.get("optimizer/momentum", 0) - 0.9
        )
        error += abs(np.log2(values["units"]) - 8) / 4 + abs(values["layers"] - 3) / 4
        evolution.tell(proposal.id, Success(float(error)))
    number, fitness = evolution.best()
    assert fitness < 0.4
    assert dict(evolution.proposals[number].genome)["optimizer/name"] == "sgd"
