"""Successive halving: who goes on, what evolution is told, and that a replay retraces it."""

import numpy as np
import pytest

from search.evolution.evolve import Evolution, EvolutionConfig, Failure, Success
from search.evolution.fidelity import Halving, Rungs, ladder
from search.spaces.parameters import Parameters, Real

SPACE = Parameters({"x": Real(low=-1.0, high=1.0), "y": Real(low=-1.0, high=1.0)})


def search(seed=0, budgets=(1, 4, 16), reduction=4, extrapolate=False, **config):
    evolution = Evolution(SPACE, EvolutionConfig(seed=seed, initial=8, **config))
    return Halving(evolution, Rungs(budgets, reduction, extrapolate=extrapolate))


def curve(stage):
    """After each of eight epochs: those of a genome fall at a rate of its own."""
    rate = 1 + dict(stage.proposal.genome)["x"] ** 2
    return [error(stage) * rate**left for left in reversed(range(8))]


def error(stage):
    """Falls with the budget; near the start, order is noisy."""
    values = dict(stage.proposal.genome)
    noise = np.random.default_rng([stage.proposal.id, stage.rung]).normal() * 0.3 / 4**stage.rung
    return values["x"] ** 2 + values["y"] ** 2 + noise + 4 / 4**stage.rung


def advance(halving, stages):
    told = []
    for _ in range(stages):
        stage = halving.ask()
        halving.tell(stage.proposal.id, Success(error(stage)), curve(stage))
        told.append((stage.proposal.id, stage.rung))
    return told


@pytest.mark.parametrize(
    ("least", "most", "reduction", "expected"),
    [
        (1, 52, 4, (1, 3, 13, 52)),
        (5, 52, 4, (13, 52)),
        (60, 52, 4, (52,)),
        (1, 4, 2, (1, 2, 4)),
        (1, 3, 2, (1, 2, 3)),
    ],
)
def test_a_ladder_ends_with_the_whole_training(least, most, reduction, expected):
    assert ladder(least, most, reduction) == expected


def test_the_best_quarter_of_a_rung_goes_on_each_once():
    rungs = Rungs((1, 4, 16), 4)
    for identifier, value in enumerate((0.5, 0.1, 0.9)):
        rungs.report(identifier, 0, value)
        assert rungs.next_promotion() is None
    rungs.report(3, 0, 0.7)
    assert rungs.next_promotion() == (1, 1)
    rungs.promote(1, 1)
    assert rungs.next_promotion() is None  # one of four
    for identifier in range(4, 8):
        rungs.report(identifier, 0, 0.6)
    assert rungs.next_promotion() == (0, 1)
    rungs.promote(0, 1)
    for identifier, value in ((1, 0.05), (0, 0.04)):
        rungs.report(identifier, 1, value)
    assert rungs.next_promotion() is None  # two there: none of them goes on yet
    assert rungs.best() == (0, 0.04)


def test_higher_rungs_go_first():
    rungs = Rungs((1, 2, 4), 2)
    for identifier in range(4):
        rungs.report(identifier, 0, identifier)
    for identifier in (0, 1):
        rungs.promote(identifier, 1)
        rungs.report(identifier, 1, identifier)
    for identifier in (4, 5):
        rungs.report(identifier, 0, -1.0)
    assert rungs.next_promotion() == (0, 2)


def test_places_compare_at_equal_rungs_alone():
    rungs = Rungs((1, 4), 2)
    for identifier, value in enumerate((3.0, 1.0, 2.0, 4.0)):
        rungs.report(identifier, 0, value)
    assert rungs.places() == {1: 0.25, 2: 0.5, 0: 0.75, 3: 1.0}
    for identifier, value in ((1, 90.0), (2, 80.0)):  # another scale altogether
        rungs.promote(identifier, 1)
        rungs.report(identifier, 1, value)
    assert rungs.places() == {2: 0.25, 1: 0.5, 0: 0.75, 3: 1.0}


def test_what_is_kept_are_those_nearest_to_going_on():
    rungs = Rungs((1, 4), 4)
    for identifier in range(8):
        rungs.report(identifier, 0, -identifier)
    rungs.promote(7, 1)
    assert rungs.next_in_line(3) == [6, 5, 4]
    assert rungs.next_in_line(100) == [6, 5, 4, 3, 2, 1, 0]


def test_a_trial_of_another_search_counts_and_is_not_ours_to_let_go_on():
    rungs = Rungs((1, 4), 2)
    rungs.report(-1, 0, 0.1, waits=False)
    rungs.report(0, 0, 0.3)
    assert rungs.next_promotion() is None  # the better half is the other's
    rungs.report(1, 0, 0.2)
    rungs.report(2, 0, 0.4)
    assert rungs.next_promotion() == (1, 1)
    rungs.report(-1, 1, 0.5, waits=False)
    assert [rungs.reached(number) for number in (-1, 0, 7)] == [1, 0, -1]
    assert rungs.best() == (-1, 0.5)
    assert rungs.places() == {-1: 0.25, 1: 0.5, 0: 0.75, 2: 1.0}


def test_with_several_objectives_fronts_go_on_and_places_are_of_the_error():
    rungs = Rungs((1, 4), 2)
    values = {0: (0.1, 9.0), 1: (0.2, 9.5), 2: (0.3, 9.9), 3: (0.9, 1.0)}
    for identifier, (value, other) in values.items():
        rungs.report(identifier, 0, value, others=(other,))
    goes_on = []
    while (promotion := rungs.next_promotion()) is not None:
        rungs.promote(*promotion)
        goes_on.append(promotion[0])
    assert sorted(goes_on) == [0, 3]  # no network is better in both than these
    assert rungs.places() == {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0}
    for identifier, value in ((0, 0.05), (3, 0.04)):
        rungs.report(identifier, 1, value, others=(values[identifier][1],))
    assert rungs.places() == {3: 0.25, 1: 0.5, 2: 0.75, 0: 1.0}


def test_who_goes_on_is_who_is_expected_to_be_ahead():
    """Of two equal errors, that of the curve which still falls comes first once that was seen."""
    rungs = Rungs((4, 12), 2, extrapolate=True)
    falling, flat = (4.0, 2.0, 1.5, 1.0), (1.0, 1.0, 1.0, 1.0)
    for number in range(16):
        rungs.report(number, 0, 1.0, curve=flat if number % 2 else falling)
    for _ in range(8):
        number, rung = rungs.next_promotion()
        rungs.promote(number, rung)
        rungs.report(number, rung, 1.0 if number % 2 else 0.5)
    rungs.report(16, 0, 0.95, curve=flat)
    rungs.report(17, 0, 1.0, curve=falling)
    goes_on = []
    while (promotion := rungs.next_promotion()) is not None:
        rungs.promote(*promotion)
        goes_on.append(promotion[0])
    assert 17 in goes_on and 16 not in goes_on
    assert rungs.places()[17] < rungs.places()[16]


def test_budgets_must_rise():
    with pytest.raises(AssertionError):
        Rungs((4, 1))


def test_one_rung_is_evolution_as_it_is():
    plain, halving = Evolution(SPACE, EvolutionConfig(seed=3)), search(3, budgets=(16,))
    halving.evolution.config = plain.config
    for _ in range(30):
        proposal, stage = plain.ask(), halving.ask()
        assert stage.proposal == proposal
        value = sum(v**2 for _, v in proposal.genome)
        plain.tell(proposal.id, Success(value))
        halving.tell(proposal.id, Success(value))
    assert halving.best() == plain.best()


def test_a_quarter_of_each_rung_goes_on():
    halving = search()
    rungs = [rung for _, rung in advance(halving, 160)]
    assert rungs.count(2) > 0
    for rung in (0, 1):  # each new best of a rung goes on as well, so it is a little more
        assert rungs.count(rung) // 4 <= rungs.count(rung + 1) <= rungs.count(rung) // 2
    identifier, value = halving.best()
    assert value == halving.rungs.error(identifier, 2)
    assert halving.evolution.best()[0] in halving.evolution.outcomes


def test_the_fitness_of_a_trial_is_its_lowest_error_so_far():
    halving = search(budgets=(1, 2), reduction=2)
    for value in (1.0, 2.0):
        halving.tell(halving.ask().proposal.id, Success(value))
    stage = halving.ask()
    assert (stage.proposal.id, stage.rung) == (0, 1)
    halving.tell(0, Success(5.0))
    assert halving.best() == (0, 1.0)


@pytest.mark.parametrize("outcome", [Failure("lost"), Success(float("nan"))])
def test_a_trial_that_fails_later_stays_judged_by_what_it_reached(outcome):
    halving = search(budgets=(1, 2), reduction=2)
    for value in (1.0, 2.0):
        halving.tell(halving.ask().proposal.id, Success(value))
    halving.ask()
    assert isinstance(halving.tell(0, outcome), Failure)
    assert halving.best() == (0, 1.0)
    assert [halving.ask().rung for _ in range(3)] == [0, 0, 0]  # it goes on no more


def test_a_failure_at_the_first_rung_is_evolutions():
    halving = search()
    halving.tell(halving.ask().proposal.id, Failure("memory"))
    assert halving.evolution.outcomes == {0: Failure("memory")}
    assert halving.best() is None


@pytest.mark.parametrize("cut", [1, 37, 80])
@pytest.mark.parametrize("extrapolate", [False, True])
def test_a_replay_goes_on_as_if_there_had_been_no_interruption(cut, extrapolate):
    whole, first, again = (search(seed=5, extrapolate=extrapolate) for _ in range(3))
    expected = advance(whole, 110)
    for identifier, rung in advance(first, cut):
        stage = (
            again.restore_promotion(identifier, rung)
            if rung
            else again.restore_ask(first.evolution.proposals[identifier])
        )
        again.tell(identifier, Success(error(stage)), curve(stage))
    begun = first.ask()  # and one that was begun, but not told
    if begun.rung:
        again.restore_promotion(begun.proposal.id, begun.rung)
    else:
        again.restore_ask(begun.proposal)
    assert again.pending() == [begun]
    again.tell(begun.proposal.id, Success(error(begun)), curve(begun))
    assert advance(again, 109 - cut) == expected[cut + 1 :]
