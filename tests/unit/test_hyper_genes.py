"""Training hyper-parameters as genes: integers, conditions, and all that [train] lets vary."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

from dmi_hpc.config import Recipe, TrainConfig, with_train
from dmi_hpc.errors import RunError
from dmi_hpc.models.space import (
    Choice,
    FloatRange,
    Founder,
    IntRange,
    NetworkSpace,
    SearchSpace,
)
from dmi_hpc.models.spec import Dense, NetworkSpec
from search.spaces.features import Features
from search.spaces.genome import Genome, canonical, founder_genome
from search.spaces.networks import Networks
from search.spaces.operators import crossover, parametric, step

NETWORK = NetworkSpace(input_shape=(4,), dense_blocks=(0, 1))
STEPWISE = {"schedule": ("step", "plateau")}
TRAIN = {
    "batch_size": Choice(values=(8, 16, 32), ordered=True),
    "accumulation": IntRange(low=1, high=4),
    "optimizer": Choice(values=("adam", "adamw", "sgd", "lamb", "lars")),
    "learning_rate": FloatRange(low=1e-5, high=1e-1, log=True),
    "reference_batch": Choice(values=(None, 8, 64)),
    "batch_scaling": Choice(values=("linear", "sqrt"), when={"reference_batch": (8, 64)}),
    "weight_decay": FloatRange(low=1e-7, high=1e-1, log=True),
    "momentum": FloatRange(low=0.0, high=0.99, when={"optimizer": ("sgd", "lars")}),
    "schedule": Choice(values=("constant", "cosine", "one_cycle", "step", "plateau")),
    "warmup": FloatRange(low=0.0, high=0.5, when={"schedule": ("cosine", "one_cycle")}),
    "decay": FloatRange(low=0.05, high=0.9, when=STEPWISE),
    "decay_epochs": IntRange(low=1, high=50, log=True, when=STEPWISE),
    "loss": Choice(values=("mse", "mae", "huber")),
    "force_weight": FloatRange(low=0.1, high=0.99),
    "clip_norm": Choice(values=(0.0, 0.1, 1.0, 10.0), ordered=True),
    "not_finite": Choice(values=("fail", "skip")),
    "augment": Choice(values=(True, False)),
    "patience": Choice(values=(None, 5, 20)),
    "average": Choice(values=(None, 0.9, 0.99)),
    "precision": Choice(values=("fp32", "bf16")),
}
# how and where a training is computed, what it starts from, and what the search itself sets
NOT_SEARCHED = {
    *("activation_checkpointing", "checkpoint_s", "compile", "deepspeed", "device", "engine"),
    *("epochs", "freeze", "keep_checkpoints", "layer_decay", "loader_threads", "noise_scale"),
    *("offload", "reproducible", "start", "threads", "time_limit_s", "zero_stage"),
}
SPACE = SearchSpace(network=NETWORK, hyper=TRAIN)
RECIPE = Recipe(name="x", task={"name": "elemnet"})


def require_valid(genome):
    values = dict(genome.hyper)
    with_train(RECIPE, values, where="genome")
    assert list(values) == sorted(values)
    assert ("momentum" in values) == (values["optimizer"] in ("sgd", "lars"))
    stepwise = values["schedule"] in ("step", "plateau")
    assert ("decay" in values) == ("decay_epochs" in values) == stepwise
    assert ("batch_scaling" in values) == (values["reference_batch"] is not None)
    assert 1 <= values.get("decay_epochs", 1) <= 50
    assert canonical(genome, SPACE) == genome


def test_every_searchable_key_of_training_can_be_a_gene():
    assert set(TRAIN) | NOT_SEARCHED == set(TrainConfig.model_fields)
    nets, rng = Networks(SPACE), np.random.default_rng(0)
    features = Features(SPACE)
    members = [nets.random(rng) for _ in range(6)]
    for _ in range(300):
        first, second = (members[i] for i in rng.integers(6, size=2))
        child = crossover([first, second], SPACE, rng) if rng.random() < 0.5 else first
        child = parametric([child], SPACE, rng)
        require_valid(child)
        assert nets.from_json(nets.to_json(child)) == child
        vector = features(child)
        assert vector.shape == (len(features.names),) and np.isfinite(vector).all()
        members[rng.integers(6)] = child


def test_values_without_effect_vanish_from_the_canonical_form():
    space = SearchSpace(
        network=NETWORK,
        hyper={
            "a": Choice(values=(1, 2)),
            "b": Choice(values=(1, 2), when={"a": (2,)}),
            "c": IntRange(low=0, high=9, when={"b": (2,)}),
        },
    )

    def normal(**values):
        return dict(canonical(Genome((), None, (), tuple(values.items())), space).hyper)

    assert normal(a=1, b=2, c=3) == {"a": 1}  # c depends on b, which depends on a
    assert normal(a=2, b=1, c=3) == {"a": 2, "b": 1}
    assert normal(a=2, b=2, c=3) == {"a": 2, "b": 2, "c": 3}
    nets = Networks(space)
    one, two = (Genome((), None, (), (("a", 1), ("c", c))) for c in (3, 4))
    assert nets.identity(one) == nets.identity(two)


def test_what_becomes_active_gets_a_value_of_a_parent_or_a_new_one():
    space = SearchSpace(
        network=NETWORK,
        hyper={
            "optimizer": Choice(values=("adam", "sgd")),
            "momentum": FloatRange(low=0.0, high=0.99, when={"optimizer": ("sgd",)}),
        },
    )
    adam = Genome((), None, (), (("optimizer", "adam"),))
    sgd = Genome((), None, (), (("momentum", 0.7), ("optimizer", "sgd")))
    children = [crossover([adam, sgd], space, np.random.default_rng(k)) for k in range(20)]
    assert set(children) == {adam, sgd}
    drawn = [dict(parametric([adam], space, np.random.default_rng(k)).hyper) for k in range(20)]
    momenta = {values["momentum"] for values in drawn if values["optimizer"] == "sgd"}
    assert len(momenta) > 5 and all(0 <= value <= 0.99 for value in momenta)


@pytest.mark.parametrize("log", [False, True])
def test_integers_are_drawn_evenly_and_step_to_others(log):
    rng, whole = np.random.default_rng(0), IntRange(low=1, high=64, log=log)
    nets = Networks(SearchSpace(network=NETWORK, hyper={"n": whole}))
    drawn = np.array([dict(nets.random(rng).hyper)["n"] for _ in range(3000)])
    assert drawn.dtype.kind == "i" and (drawn.min(), drawn.max()) == (1, 64)
    assert abs(np.median(drawn) - (6 if log else 32)) < (1 if log else 4)
    ends = np.mean(drawn == 1), np.mean(drawn == 64)
    shares = (math.log(3) / math.log(129), math.log(129 / 127) / math.log(129))
    assert ends == pytest.approx(shares if log else (1 / 64, 1 / 64), abs=0.02)
    for value in (1, 2, 30, 64):
        steps = {step(value, whole, rng) for _ in range(200)}
        assert value not in steps and all(isinstance(n, int) and 1 <= n <= 64 for n in steps)
        assert steps & {value - 1, value + 1}
    assert 1 <= step(1000, whole, rng) <= 64  # a founder's value from outside


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"a": Choice(values=(1,), when={"z": (1,)})}, "a: when names 'z'"),
        (
            {"o": Choice(values=("adam",)), "m": Choice(values=(1,), when={"o": ("sgd",)})},
            "m: when o is 'sgd', which it never is",
        ),
        (
            {
                "a": IntRange(low=0, high=2, when={"b": (1,)}),
                "b": IntRange(low=0, high=2, when={"a": (1,)}),
            },
            "depend on each other",
        ),
    ],
)
def test_conditions_that_cannot_be_are_refused(hyper, message):
    with pytest.raises(ValidationError, match=message):
        SearchSpace(network=NETWORK, hyper=hyper)


def test_ranges_of_integers_are_checked():
    with pytest.raises(ValidationError, match="low < high"):
        IntRange(low=3, high=3)
    with pytest.raises(ValidationError, match="low > 0 if log"):
        IntRange(low=0, high=3, log=True)


def test_founders_need_values_of_what_is_active_alone():
    founder = Founder(
        name="F",
        network=NetworkSpec(input_shape=(4,), layers=()),
        hyper={name: p.values[0] for name, p in TRAIN.items() if isinstance(p, Choice)},
    )
    rates = {"learning_rate": 1e-3, "weight_decay": 1e-5, "accumulation": 1, "force_weight": 0.5}
    genome = founder_genome(founder, SPACE, rates)  # adam, constant: no momentum, no decay
    assert "momentum" not in dict(genome.hyper)
    assert genome == canonical(genome, SPACE)
    with pytest.raises(RunError, match="no value for learning_rate, weight_decay"):
        founder_genome(founder, SPACE, {"accumulation": 1, "force_weight": 0.5})
    with pytest.raises(RunError, match="accumulation must be a number"):
        founder_genome(founder, SPACE, {**rates, "accumulation": "many"})


def test_written_spaces_name_conditions_only_where_there_are_some():
    assert "when" not in FloatRange(low=0, high=1).model_dump()
    text = SPACE.model_dump_json()
    assert SearchSpace.model_validate_json(text) == SPACE
    assert Dense(units=1).model_dump() == {"kind": "dense", "units": 1}
