"""The SVM orders candidates, avoids failures, and is a function of what it was told."""

import numpy as np

from dmi_hpc.models.space import Choice, FloatRange, NetworkSpace, SearchSpace
from search.networks import Networks
from search.space import random_genome
from search.surrogate import Surrogate

SPACE = SearchSpace(
    network=NetworkSpace(input_shape=(1, 15, 15, 15), conv_blocks=(1, 4)),
    hyper={
        "learning_rate": FloatRange(low=1e-5, high=1e-1, log=True),
        "optimizer": Choice(values=("adam", "sgd")),
    },
)


def fitness_of(genome):
    values = dict(genome.hyper)
    return (np.log10(values["learning_rate"]) + 3) ** 2 + len(genome.conv)


def genomes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [random_genome(SPACE, rng) for _ in range(count)]


def taught(count, fitness=fitness_of):
    surrogate = Surrogate(Networks(SPACE))
    for genome in genomes(count):
        surrogate.add(genome, fitness(genome))
    return surrogate


def test_it_says_nothing_while_it_knows_little():
    assert taught(7).screen(genomes(5, 1)) is None
    assert taught(8).screen(genomes(5, 1)) is not None
    assert taught(50, lambda genome: None).screen(genomes(5, 1)) is None


def test_unseen_candidates_are_ordered_by_expected_fitness():
    candidates = genomes(200, 1)
    order = taught(200).screen(candidates)
    assert sorted(order) == list(range(200))
    truth = np.array([fitness_of(candidates[i]) for i in order])
    assert truth[:20].mean() < 0.5 * truth.mean()
    assert np.corrcoef(np.arange(200), truth.argsort().argsort())[0, 1] > 0.8


def test_only_the_ranks_of_the_fitness_matter():
    candidates = genomes(50, 1)
    plain = taught(60).screen(candidates)
    assert taught(60, lambda genome: np.exp(5 * fitness_of(genome))).screen(candidates) == plain


def test_candidates_that_look_like_failures_come_last():
    def fails(genome):
        return dict(genome.hyper)["optimizer"] == "sgd"

    surrogate = taught(100, lambda genome: None if fails(genome) else fitness_of(genome))
    candidates = genomes(100, 1)
    order = surrogate.screen(candidates)
    failing = np.array([fails(candidates[i]) for i in order])
    assert failing[:40].mean() < 0.1
    assert failing[-40:].mean() > 0.9


def test_the_model_does_not_depend_on_when_it_was_asked():
    """A resumed search must meet the models that the interrupted one had."""
    candidates = genomes(30, 1)
    often, once = Surrogate(Networks(SPACE)), Surrogate(Networks(SPACE))
    for genome in genomes(63):
        often.add(genome, fitness_of(genome))
        often.screen(candidates)
        once.add(genome, fitness_of(genome))
    assert once.screen(candidates) == often.screen(candidates)


def test_refits_become_rarer_than_every_fourth_tell():
    surrogate = Surrogate(Networks(SPACE))
    genome = genomes(1)[0]
    fits = []
    for count in range(1, 1001):
        surrogate.add(genome, float(count))
        if surrogate._usable == count:
            fits.append(count)
    assert fits[:5] == [4, 8, 12, 16, 20]
    assert fits[-1] - fits[-2] in range(15, 21)
