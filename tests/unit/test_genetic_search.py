"""`GeneticSearch` as Tune calls it, without Ray's processes; tests/integration has a real Tuner."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
from ray import tune
from ray.tune.search import ConcurrencyLimiter, Searcher

from dmi_hpc.errors import RecipeError, RunError
from search.evolution.evolve import Failure, Success
from search.genetic_search import GeneticSearch

SPACE = {
    "net": {"units": tune.randint(8, 129), "act": tune.choice(["relu", "gelu", math.tanh])},
    "lr": tune.loguniform(1e-4, 1e-1),
    "epochs": 3,
}


def search_of(mode="min", space=SPACE, **options):
    search = GeneticSearch(seed=1, initial=5, **options)
    assert search.set_search_properties("loss", mode, space, num_samples=10)
    return search


def loss(config):
    return abs(math.log10(config["lr"]) + 2) + config["net"]["units"] / 100


def run(search, names, score=loss):
    """One trial after the other, three iterations each."""
    for name in names:
        config = search.suggest(name)
        for i in (1, 2, 3):
            search.on_trial_result(
                trial_id=name, result={"loss": score(config) + 3 - i, "training_iteration": i}
            )
        search.on_trial_complete(
            trial_id=name, result={"loss": score(config), "training_iteration": 3}, error=False
        )


def test_it_finds_what_is_good_and_repeats_nothing():
    search = search_of()
    run(search, [f"t{i}" for i in range(60)])
    told = search.evolution.outcomes
    values = [told[i].fitness for i in range(60)]
    assert min(values[30:]) < min(values[:10])
    assert np.median(values[30:]) < np.median(values[:10])
    assert len({p.hash for p in search.evolution.proposals.values()}) == 60


def test_a_config_holds_what_is_searched_nested_and_the_things_themselves():
    search = search_of()
    configs = [search.suggest(f"t{i}") for i in range(30)]
    assert all(set(c) == {"net", "lr"} and set(c["net"]) == {"units", "act"} for c in configs)
    assert {c["net"]["act"] for c in configs} == {"relu", "gelu", math.tanh}


def test_max_is_min_of_the_negative():
    low, high = search_of("min"), search_of("max")
    for number in range(20):
        configs = [search.suggest(f"t{number}") for search in (low, high)]
        assert configs[0] == configs[1]
        for search, sign in ((low, 1), (high, -1)):
            search.on_trial_complete(
                f"t{number}", {"loss": sign * loss(configs[0]), "training_iteration": 1}
            )
    assert low.evolution.outcomes == high.evolution.outcomes


@pytest.mark.parametrize(
    ("result", "error", "kind"),
    [
        ({"loss": math.nan, "training_iteration": 1}, False, "nan"),
        ({"loss": math.inf, "training_iteration": 1}, False, "nan"),
        ({"accuracy": 1.0, "training_iteration": 1}, False, "nan"),
        (None, True, "exception"),
        (None, False, "lost"),
    ],
)
def test_what_is_no_score_is_a_failure(result, error, kind):
    search = search_of()
    search.suggest("a")
    search.on_trial_complete(trial_id="a", result=result, error=error)
    assert search.evolution.outcomes[0].kind == kind
    search.on_trial_complete(trial_id="a", result=result, error=error)  # twice says nothing new
    search.on_trial_complete(trial_id="unknown", error=True)


def stop(search, name, scores, *, at):
    """As Tune does for a trial that a scheduler stops at iteration `at`."""
    search.suggest(name)
    for iteration in range(1, at):
        result = {"loss": scores[iteration - 1], "training_iteration": iteration}
        search.on_trial_result(trial_id=name, result=result)
    last = {"loss": scores[at - 1], "training_iteration": at, "done": True}
    search.on_trial_complete(trial_id=name, result=last)
    return search.evolution.outcomes[max(search.evolution.outcomes)].fitness


def test_a_stopped_trial_is_compared_at_the_iteration_where_it_was_stopped():
    search = search_of()
    full = stop(search, "a", [0.9, 0.5, 0.1], at=3)
    better = stop(search, "b", [0.8], at=1)
    worse = stop(search, "c", [0.95], at=1)
    best = stop(search, "d", [0.7, 0.4, 0.05], at=3)
    assert best < better < full < worse
    assert full == 0.1


@pytest.mark.parametrize("how", ["state", "pickle", "copy", "journal"])
def test_a_continued_search_asks_as_if_nothing_had_been(tmp_path, how):
    """Two trials in flight, one of which Tune forgot."""
    whole = search_of()
    options = {"journal": tmp_path / "journal.jsonl"} if how == "journal" else {}
    cut = search_of(**options)
    for search in (whole, cut):
        run(search, [f"t{i}" for i in range(20)])
        stop(search, "stopped", [0.5], at=1)
        search.suggest("open")
        search.on_trial_result(trial_id="open", result={"loss": 0.1, "training_iteration": 1})
    if how == "state":
        cut.save(str(tmp_path / "state"))
        cut = search_of()
        cut.restore(str(tmp_path / "state"))
    elif how == "pickle":
        cut = pickle.loads(pickle.dumps(cut))
    elif how == "copy":
        cut = copy.deepcopy(cut)
    else:
        cut = search_of(**options)
        again = cut.suggest("open")  # the journal knows no trials of Tune: it is asked again
        proposal = cut.evolution.proposals[21]
        assert again["lr"] == dict(proposal.genome)["lr"]
    for search in (whole, cut):
        result = {"loss": 0.2, "training_iteration": 2}
        search.on_trial_complete(trial_id="open", result=result)
    run(whole, [f"u{i}" for i in range(10)])
    run(cut, [f"u{i}" for i in range(10)])
    assert cut.evolution.proposals == whole.evolution.proposals
    if how != "journal":
        assert cut.evolution.outcomes == whole.evolution.outcomes


def test_a_state_is_taken_over_before_the_space_is_known_too(tmp_path):
    search = search_of()
    run(search, ["a", "b"])
    search.save(str(tmp_path / "state"))
    other = GeneticSearch(seed=1, initial=5)
    other.restore(str(tmp_path / "state"))
    with pytest.raises(RunError, match="knows no space yet"):
        other.suggest("c")
    copied = pickle.loads(pickle.dumps(other))
    for restored in (other, copied):
        assert restored.set_search_properties("loss", "min", SPACE)
        assert restored.evolution.outcomes == search.evolution.outcomes


def test_a_state_tells_the_space_to_a_restored_tuner(tmp_path):
    """Which calls neither `set_search_properties` nor says the metric."""
    plain = {
        "net": {"units": tune.randint(8, 129), "kind": tune.choice(["a", "b"])},
        "x": tune.uniform(0, 1),
    }
    search = search_of(space=plain)
    assert search.suggest("a")
    search.save(str(tmp_path / "state"))
    other = GeneticSearch(seed=1, initial=5)
    other.restore(str(tmp_path / "state"))
    other.on_trial_complete("a", {"loss": 0.5, "training_iteration": 1})
    assert other.evolution.outcomes == {0: Success(0.5)}
    search.on_trial_complete("a", {"loss": 0.5, "training_iteration": 1})
    assert other.suggest("b") == search.suggest("b")


def test_a_state_of_something_else_is_refused(tmp_path):
    (tmp_path / "state").write_text(json.dumps({"version": 0}))
    with pytest.raises(RunError, match="no state of GeneticSearch"):
        GeneticSearch().restore(str(tmp_path / "state"))


def test_a_journal_extends_a_search_and_belongs_to_its_metric(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = search_of(journal=path)
    run(first, [f"t{i}" for i in range(8)])
    second = search_of(journal=path)
    assert second.evolution.outcomes == first.evolution.outcomes
    run(second, [f"u{i}" for i in range(4)])
    assert len(search_of(journal=path).evolution.outcomes) == 12
    with pytest.raises(RunError, match=r"journal of metric loss \(min\), found accuracy \(max\)"):
        GeneticSearch(seed=1, initial=5, journal=path).set_search_properties(
            "accuracy", "max", SPACE
        )


def test_points_evaluated_elsewhere_teach_and_are_not_repeated():
    search = GeneticSearch(seed=1, initial=5)
    point = {"net": {"units": 20, "act": math.tanh}, "lr": 1e-2, "epochs": 3}
    search.add_evaluated_point(point, 0.3)
    assert search.set_search_properties("loss", "min", SPACE)
    flat = {"net/units": 21, "net/act": "relu", "lr": 1e-3}
    search.add_evaluated_point(flat, 0.0, pruned=True, intermediate_values=[0.4])
    search.add_evaluated_point({**flat, "lr": 2e-3}, math.nan)
    search.add_evaluated_point({**flat, "lr": 3e-3}, 0.0, error=True)
    search.add_evaluated_point(point, 0.9)  # known
    told = search.evolution.outcomes
    assert [type(told[i]) for i in range(4)] == [Success, Success, Failure, Failure]
    assert told[0] == Success(0.3)
    assert len(told) == 4
    assert search.evolution.proposals[0].origin == "given"
    run(search, ["a"])
    assert len(search.evolution.outcomes) == 5


def test_points_to_evaluate_come_first():
    points = [
        {"net": {"units": 30, "act": "gelu"}, "lr": 1e-3},
        {"net": {"units": 9, "act": math.tanh}, "lr": 0.1},
    ]
    search = search_of(points_to_evaluate=points)
    assert [search.suggest(name) for name in "ab"] == points


def test_a_small_space_ends():
    search = search_of(space={"a": tune.choice([1, 2, 3])})
    found = {search.suggest(str(i))["a"] for i in range(3)}
    assert found == {1, 2, 3}
    assert search.suggest("more") == Searcher.FINISHED


def test_a_space_of_our_own_and_no_second_one():
    from search.spaces.parameters import Choice, Real

    space = {
        "optimizer": Choice(values=("adam", "sgd")),
        "momentum": Real(low=0.0, high=0.9, when={"optimizer": ("sgd",)}),
    }
    search = GeneticSearch(space=space)
    assert not search.set_search_properties("loss", "min", {"lr": tune.uniform(0, 1)})
    assert search.set_search_properties("loss", "min", {"epochs": 3})
    configs = [search.suggest(str(i)) for i in range(12)]
    assert all(("momentum" in config) == (config["optimizer"] == "sgd") for config in configs)


def test_no_domain_at_all_is_refused():
    with pytest.raises(RecipeError, match="found no domain to search"):
        GeneticSearch().set_search_properties("loss", "min", {"lr": 0.1})


def test_a_limiter_limits():
    limited = ConcurrencyLimiter(GeneticSearch(seed=1), max_concurrent=2)
    assert limited.set_search_properties("loss", "min", SPACE)
    assert [limited.suggest(name) is None for name in "abc"] == [False, False, True]
    limited.on_trial_complete("a", {"loss": 1.0, "training_iteration": 1})
    assert limited.suggest("d") is not None
