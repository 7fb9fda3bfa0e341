"""Shares of the kinds of change follow what they brought, and none dies out."""

import pytest

from search.evolution.breeding import CLIMBERS, Breeder, Effort
from search.evolution.evolve import Evolution, EvolutionConfig, Failure, Success
from search.evolution.population import Population
from search.evolution.rates import FLOOR, adapted
from search.spaces.parameters import Choice, Parameters, Real

GIVEN = {"a": 0.5, "b": 0.3, "c": 0.2}


def test_without_results_the_shares_are_the_given_ones():
    assert adapted(GIVEN, []) == pytest.approx(GIVEN)


def test_who_brings_the_best_gains_and_nobody_falls_below_the_floor():
    results = [("a", (1.0 + i,)) for i in range(20)] + [("b", (-1.0 - i,)) for i in range(20)]
    shares = adapted(GIVEN, results)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["b"] > 0.5
    assert shares["a"] < 0.6 * GIVEN["a"]
    assert all(shares[kind] >= FLOOR * GIVEN[kind] for kind in GIVEN)
    assert shares["c"] > shares["a"] * GIVEN["c"] / GIVEN["a"]  # nothing is known of it


def test_ranks_alone_count():
    results = [("a", (float(i),)) for i in range(10)] + [("b", (i + 0.5,)) for i in range(10)]
    stretched = [(kind, (value**5 - 1e6,)) for kind, (value,) in results]
    assert adapted(GIVEN, results) == adapted(GIVEN, stretched)


def test_failures_bring_nothing():
    fine = [("a", (float(i),)) for i in range(8)]
    shares = adapted(GIVEN, [*fine, *[("b", None)] * 8])
    assert shares["b"] < GIVEN["b"]
    assert adapted(GIVEN, [("a", None), ("b", None)])["c"] > GIVEN["c"]


def test_what_others_found_raises_the_mark_without_earning():
    own = [("a", (float(i),)) for i in range(8)]
    migrants = [("migrant", (-1.0 - i,)) for i in range(8)]
    shares = adapted(GIVEN, own + migrants)
    assert set(shares) == set(GIVEN)
    assert shares["a"] < adapted(GIVEN, own)["a"]


def test_several_objectives_count_by_fronts():
    front = [("a", (float(i), 7.0 - i)) for i in range(8)]
    behind = [("b", (9.0 + i, 9.0 + i)) for i in range(8)]
    shares = adapted(GIVEN, front + behind)
    assert shares["a"] > GIVEN["a"] and shares["b"] < GIVEN["b"]


def test_the_breeders_shares_are_all_of_it():
    space = Parameters({"x": Real(low=0.0, high=1.0)})
    breeder = Breeder(space, Population(4), lambda _: (), tournament=2, crossover=0.3)
    assert sum(breeder.shares.values()) == pytest.approx(1)


STEPS = Parameters({"kind": Choice(values=("p", "q", "r")), "x": Real(low=0.0, high=1.0)})


def adapting(surrogate, evaluations):
    """The search, and its shares after every result, relative to what they began with.

    One structure alone can be evaluated: changes of it are wasted, steps are not.
    """
    config = EvolutionConfig(seed=1, adaptive=True, surrogate=surrogate, initial=8, pool=16)
    evolution, seen = Evolution(STEPS, config), []
    given = evolution._breeder.shares
    for _ in range(evaluations):
        proposal = evolution.ask()
        values = dict(proposal.genome)
        fine = values["kind"] == "p"
        evolution.tell(proposal.id, Success(abs(values["x"] - 0.3)) if fine else Failure("nan"))
        shares = evolution._shares
        seen.append({kind: shares[kind] / given[kind] for kind in given})
    return evolution, seen


def test_a_search_uses_every_kind_and_more_of_what_helps():
    evolution, seen = adapting(False, 300)
    origins = {p.origin for p in evolution.proposals.values() if p.id >= 8}
    assert {"random", "incumbent", "crossover", "step", "structure"} == origins
    mean = {kind: sum(shares[kind] for shares in seen) / len(seen) for kind in seen[0]}
    assert mean["structure"] < 0.9 * mean["step"]


def test_with_the_surrogate_climbs_have_a_share_too():
    evolution, seen = adapting(True, 80)
    assert "climb" in {p.origin for p in evolution.proposals.values()}
    assert max(shares["climb"] for shares in seen) > 1.05 * min(s["climb"] for s in seen)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_climbs_take_candidates_from_the_pool_not_more(share):
    fixed = Effort.of(10, 64, 2, None)
    effort = Effort.of(10, 64, 2, {"climb": share})
    total = fixed.size + fixed.climbs * CLIMBERS * fixed.steps
    assert effort.size + effort.climbs * CLIMBERS * effort.steps == total
    assert 1 - effort.size / total == pytest.approx(share, abs=0.05)
    assert Effort.of(10, 64, 0, {"climb": share}) == (64, 0, 8)
