"""What does not fit the memory: computed in parts, or never started."""

from dataclasses import replace

import pytest
import torch
from runner import toy_data, toy_recipe

from dmi_hpc.batches import micro_batches
from dmi_hpc.config import load_recipe
from dmi_hpc.errors import TrialFailure
from dmi_hpc.models.cost import cost, parts_that_fit, require_fit
from dmi_hpc.models.space import Choice, NetworkSpace, SearchSpace
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec, Norm, Parallel, Residual
from dmi_hpc.tasks import make_task
from search.evolution.evolve import Evolution, EvolutionConfig, Failure, Success
from search.results.recipes import to_toml, trained_with, training_recipe
from search.spaces.genome import DenseGene, Genome, decode, to_json
from search.spaces.networks import Networks
from search.trials.trial import Evaluator


def memory_of(spec, rows):
    return cost(spec).memory_bytes(rows)


@pytest.mark.parametrize(
    ("rows", "least", "room", "parts"),
    [
        (32, 1, 32, 1),
        (32, 1, 31, 2),
        (32, 1, 10, 4),
        (32, 1, 1, 32),
        (30, 4, 32, 4),  # as the recipe says, though it need not
        (30, 4, 7, 5),
        (3, 8, 1, 3),  # no more parts than rows
        (32, 1, 0, None),
    ],
)
def test_a_batch_is_cut_into_as_few_parts_as_fit(rows, least, room, parts):
    layers = (Dense(units=16), Norm(op="group"), Activation())
    spec = NetworkSpec(input_shape=(8,), layers=layers)
    limit = memory_of(spec, room)
    assert parts_that_fit(spec, cost(spec), rows, limit, least) == parts
    if parts:
        assert require_fit(spec, rows, limit, least) == parts
        cut = micro_batches(rows, rows, parts)
        assert max(part.stop - part.start for part in cut) <= room
    else:
        with pytest.raises(TrialFailure, match="even row by row"):
            require_fit(spec, rows, limit, least)


@pytest.mark.parametrize(
    "layers",
    [
        (Dense(units=16), Norm(op="batch")),
        (Residual(layers=(Dense(units=8), Norm(op="batch"))),),
        (Parallel(branches=((Dense(units=4),), (Dense(units=4), Norm(op="batch")))),),
    ],
)
def test_batch_normalisation_is_not_computed_in_more_parts_than_asked_for(layers):
    spec = NetworkSpec(input_shape=(8,), layers=layers)
    assert require_fit(spec, 32, memory_of(spec, 32)) == 1
    assert require_fit(spec, 32, memory_of(spec, 16), parts=2) == 2
    with pytest.raises(TrialFailure, match="batch normalisation") as caught:
        require_fit(spec, 32, memory_of(spec, 31))
    assert caught.value.kind == "memory"


GENOME = Genome((), None, (DenseGene(32, None, "relu", 0.0),) * 2, (("batch_size", 64),))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture
def recipe(data, tmp_path):
    return load_recipe(toy_recipe(tmp_path / "toy.toml", data))


def evaluated(recipe, data, genome, rows):
    """In a memory that has room for so many rows of `genome`."""
    network = decode(genome, make_task(recipe.task).space().network)
    evaluator = Evaluator(recipe, data, torch.device("cpu"), memory_of(network, rows) / 1e9)
    return evaluator(to_json(genome))


def test_a_trial_in_parts_is_the_same_training(recipe, data):
    whole, parted = (evaluated(recipe, data, GENOME, rows) for rows in (64, 10))
    assert "accumulation" not in whole.metrics
    assert parted.metrics["accumulation"] == 7
    assert parted.told.fitness == pytest.approx(whole.told.fitness, rel=1e-4)
    assert parted.metrics["memory_GB"] < whole.metrics["memory_GB"]


def test_the_recipe_of_a_network_trained_in_parts_says_so(recipe, data, tmp_path):
    outcome = evaluated(recipe, data, GENOME, 10)
    hyper = trained_with(GENOME, outcome.metrics)
    assert hyper == {"batch_size": 64, "accumulation": 7}
    network = decode(GENOME, make_task(recipe.task).space().network)
    path = tmp_path / "winner.toml"
    path.write_text(to_toml(training_recipe(recipe, data, network, hyper, seed=1)))
    assert load_recipe(path).train.accumulation == 7
    assert trained_with(GENOME, {"flops": 1.0}) == {"batch_size": 64}


def test_what_does_not_fit_is_a_failure_before_anything_is_allocated(recipe, data):
    normed = replace(GENOME, dense=(DenseGene(32, "batch", "relu", 0.0),) * 2)
    for genome, rows in ((GENOME, 0), (normed, 63)):
        told = evaluated(recipe, data, genome, rows).told
        assert isinstance(told, Failure) and told.kind == "memory"
    assert isinstance(evaluated(recipe, data, normed, 64).told, Success)


SPACE = SearchSpace(
    network=NetworkSpace(input_shape=(8,), dense_blocks=(1, 4)),
    hyper={"batch_size": Choice(values=(16, 256), ordered=True)},
)


@pytest.mark.parametrize("limits", [{}, {"memory_GB": 5e-3}])
def test_networks_that_cannot_fit_are_not_proposed(limits):
    nets = Networks(SPACE, limits=limits)
    before = nets.fingerprint()
    nets.memory_bytes = 10e6
    assert nets.fingerprint() == before  # what a machine has is no part of the space
    evolution, parted = Evolution(nets, EvolutionConfig(seed=2, initial=20)), 0
    for _ in range(60):
        proposal = evolution.ask()
        network, rows = decode(proposal.genome, SPACE.network), dict(proposal.genome.hyper)
        parts = require_fit(network, rows["batch_size"], 10e6)
        at_once = -(-rows["batch_size"] // parts)
        assert memory_of(network, at_once) <= 1e9 * limits.get("memory_GB", 1.0)
        parted += parts > 1
        evolution.tell(proposal.id, Success(-cost(network).parameters))
    assert parted or limits


def test_ranks_and_the_accumulation_of_the_recipe_count():
    genome = Genome((), None, (DenseGene(2048, None, "relu", 0.0),), (("batch_size", 256),))
    normed = replace(genome, dense=(DenseGene(2048, "batch", "relu", 0.0),))
    room = memory_of(decode(normed, SPACE.network), 64)

    def fits(genome, **options):
        nets = Networks(SPACE, **options)
        assert nets.affordable(genome)
        nets.memory_bytes = room
        return nets.affordable(genome)

    assert fits(genome)
    assert not fits(normed)
    assert fits(normed, ranks=4)
    assert fits(normed, accumulation=4)
    assert not fits(normed, ranks=2)
