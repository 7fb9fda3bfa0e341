"""A population that brings nothing better and has become alike makes room for strangers."""

import numpy as np
import pytest

from search.evolution.evolve import Evolution, EvolutionConfig, Failure, Success
from search.evolution.fidelity import Halving, Rungs
from search.spaces.parameters import Parameters, Real

SPACE = Parameters({f"x{i}": Real(low=0.0, high=1.0) for i in range(3)})
PLAIN = {"surrogate": False, "population": 8, "initial": 8}


def point(genome):
    return np.array([value for _, value in genome])


def trap(genome):
    """A wide basin around 0.2, and a narrow one around 0.9 that is better."""
    x = point(genome)
    wide, narrow = ((x - 0.2) ** 2).mean(), ((x - 0.9) ** 2).mean()
    return min(0.1 + wide, 8 * narrow)


def search(evaluations, objective=trap, **config):
    evolution = Evolution(SPACE, EvolutionConfig(**{**PLAIN, **config}))
    for _ in range(evaluations):
        proposal = evolution.ask()
        evolution.tell(proposal.id, Success(objective(proposal.genome)))
    return evolution


def restarts_of(evolution):
    return [p for p in evolution.proposals.values() if p.origin == "restart"]


def test_without_patience_there_are_none():
    evolution = search(200)
    assert evolution.restarts == 0 == len(restarts_of(evolution))


def test_while_it_improves_or_is_diverse_there_are_none():
    numbers = iter(range(10_000))
    improving = search(150, lambda genome: -float(next(numbers)), patience=5)
    assert improving.restarts == 0
    assert search(150, lambda genome: 0.0, patience=5, population=100).restarts == 0


def test_collapse_brings_half_a_population_of_strangers_and_the_best_stays():
    evolution = search(0, patience=20)
    while not evolution.restarts:
        proposal = evolution.ask()
        if not evolution.restarts:
            evolution.tell(proposal.id, Success(trap(proposal.genome)))
    best, _ = evolution.best()
    assert evolution.breeding == (best,)
    known = np.array([point(p.genome) for p in evolution.proposals.values()][:-1])
    distance = np.linalg.norm(known - point(proposal.genome), axis=1).min()
    rng = np.random.default_rng(99)
    strangers = [point(SPACE.random(rng)) for _ in range(200)]
    others = [np.linalg.norm(known - stranger, axis=1).min() for stranger in strangers]
    assert distance > np.median(others)
    origins = [evolution.ask().origin for _ in range(5)]
    assert origins[:3] == ["restart"] * 3 and "restart" not in origins[3:]
    assert evolution.best()[0] == best
    assert evolution.restarts == 1


def test_strangers_find_what_a_collapsed_population_does_not():
    def found(**config):
        return [search(300, seed=seed, **config).best()[1] for seed in range(8)]

    without, restarted = found(), found(patience=20)
    assert sum(value < 0.1 for value in restarted) > sum(value < 0.1 for value in without)


def test_the_models_of_the_surrogate_are_kept():
    evolution = search(120, patience=15, surrogate=True, pool=16, climbs=1)
    assert evolution.restarts
    first = restarts_of(evolution)[0].id
    after = [p for p in evolution.proposals.values() if p.id > first + 4 and p.origin != "restart"]
    assert after and all(p.predicted is not None for p in after)


def test_failures_alone_begin_no_restart():
    evolution = Evolution(SPACE, EvolutionConfig(**PLAIN, patience=3))
    for _ in range(40):
        evolution.tell(evolution.ask().id, Failure("memory"))
    assert evolution.restarts == 0


def test_several_objectives_improve_while_their_front_grows():
    def run(objective):
        evolution = Evolution(SPACE, EvolutionConfig(**PLAIN, patience=10))
        for number in range(120):
            proposal = evolution.ask()
            evolution.tell(proposal.id, objective(number, point(proposal.genome)))
        return evolution.restarts

    assert run(lambda number, x: Success(float(number), (-float(number),))) == 0
    assert run(lambda number, x: Success(((x - 0.5) ** 2).sum(), (0.0,))) > 0


def test_with_rungs_places_count_and_a_replay_restarts_at_the_same_time():
    config = EvolutionConfig(**PLAIN, seed=3, patience=15)
    whole, again = (Halving(Evolution(SPACE, config), Rungs((1, 3), 3)) for _ in range(2))
    for _ in range(250):
        stage = whole.ask()
        if stage.rung:
            again.restore_promotion(stage.proposal.id, stage.rung)
        else:
            again.restore_ask(stage.proposal)
        error = trap(stage.proposal.genome) + 1.0 / (1 + stage.rung)
        for halving in (whole, again):
            halving.tell(stage.proposal.id, Success(error))
    assert whole.evolution.restarts == again.evolution.restarts > 0
    assert whole.ask() == again.ask()


def test_looking_for_a_reason_to_restart_changes_nothing():
    """A search that never collapses is the same with and without."""
    flat = {"objective": lambda genome: 0.0, "population": 100}
    plain, looking = search(80, **flat), search(80, **flat, patience=5)
    assert plain.proposals == looking.proposals


@pytest.mark.parametrize("patience", [0, -1])
def test_patience_is_at_least_one(patience):
    with pytest.raises(ValueError, match="patience"):
        EvolutionConfig(patience=patience)
