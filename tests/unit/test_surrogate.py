"""The surrogate orders candidates, avoids failures, and is a function of what it was told."""

import numpy as np
import pytest
from scipy.stats import rankdata
from threadpoolctl import threadpool_info, threadpool_limits

from search.evolution.regression import Regression
from search.evolution.surrogate import MOST_FITTED, Surrogate, _ranked
from search.spaces.parameters import Choice, Parameters, Real

SPACE = Parameters(
    {
        "rate": Real(low=1e-5, high=1e-1, log=True),
        "layers": Choice(values=(1, 2, 3, 4), ordered=True),
        "optimizer": Choice(values=("adam", "sgd", "lamb")),
    }
)


def fitness_of(genome):
    values = dict(genome)
    return (np.log10(values["rate"]) + 3) ** 2 + values["layers"]


def genomes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [SPACE.random(rng) for _ in range(count)]


def taught(count, values_of=lambda genome: (fitness_of(genome),)):
    surrogate = Surrogate(SPACE)
    teach(surrogate, genomes(count), values_of)
    return surrogate


def teach(surrogate, known, values_of=lambda genome: (fitness_of(genome),), first=0):
    for number, genome in enumerate(known, start=first):
        surrogate.asked(number, genome)
        surrogate.add(number, values_of(genome))


def test_it_says_nothing_while_it_knows_little():
    assert taught(7).judge(genomes(5, 1)) is None
    assert taught(8).judge(genomes(5, 1)) is not None
    assert taught(50, lambda genome: None).judge(genomes(5, 1)) is None


def test_unseen_candidates_get_their_share_of_what_is_better():
    candidates = genomes(200, 1)
    judged = taught(150).judge(candidates)
    truth = np.array([fitness_of(genome) for genome in candidates])
    shares = truth.argsort().argsort() / 200
    assert np.corrcoef(judged.expected, shares)[0, 1] > 0.95
    assert np.abs(judged.expected - shares).mean() < 0.1
    assert not judged.fails.any()


def test_only_the_ranks_of_the_fitness_matter():
    candidates = genomes(50, 1)
    plain = taught(60).judge(candidates)
    stretched = taught(60, lambda genome: (np.exp(5 * fitness_of(genome)),)).judge(candidates)
    assert np.array_equal(plain.expected, stretched.expected)


def test_candidates_that_look_like_failures_are_named():
    def fails(genome):
        return dict(genome)["optimizer"] == "sgd"

    surrogate = taught(100, lambda genome: None if fails(genome) else (fitness_of(genome),))
    candidates = genomes(100, 1)
    judged = surrogate.judge(candidates)
    assert np.mean(judged.fails == [fails(genome) for genome in candidates]) > 0.95


def test_what_runs_already_is_less_uncertain_but_no_better():
    surrogate = taught(40)
    candidates = genomes(20, 1)
    before = surrogate.judge(candidates)
    surrogate.asked(40, candidates[0])
    after = surrogate.judge(candidates)
    assert after.deviation[0] < 0.8 * before.deviation[0]
    assert np.array_equal(after.expected, before.expected)
    surrogate.forget(40)
    assert np.array_equal(surrogate.judge(candidates).deviation, before.deviation)


def test_with_several_objectives_it_learns_the_order_of_the_fronts():
    """x and 1 - x are all one front: only what makes both worse is bad."""

    def values(genome):
        place = (np.log10(dict(genome)["rate"]) + 5) / 4
        worse = dict(genome)["layers"]
        return place + worse, 1 - place + worse

    judged = taught(120, values).judge(candidates := genomes(100, 1))
    layers = [dict(genome)["layers"] for genome in candidates]
    assert np.corrcoef(judged.expected, layers)[0, 1] > 0.9


def test_the_model_does_not_depend_on_when_it_was_asked():
    """A resumed search must meet the models that the interrupted one had."""
    candidates = genomes(30, 1)
    often, once = Surrogate(SPACE), Surrogate(SPACE)
    for number, genome in enumerate(genomes(63)):
        teach(often, [genome], first=number)
        often.judge(candidates)
        teach(once, [genome], first=number)
        for surrogate in (often, once):
            surrogate.revise(number // 2, (float(number),))
    assert np.array_equal(once.judge(candidates).expected, often.judge(candidates).expected)


def test_revised_values_count_from_the_next_fit_on():
    surrogate, candidates = taught(40), genomes(60, 1)
    before = surrogate.judge(candidates).expected
    for number, genome in enumerate(genomes(40)):
        surrogate.revise(number, (-fitness_of(genome),))
    teach(surrogate, genomes(10, 5), lambda genome: (-fitness_of(genome),), first=40)
    after = surrogate.judge(candidates).expected
    assert np.corrcoef(before, after)[0, 1] < -0.8


def test_long_histories_are_fitted_by_the_best_and_the_newest():
    surrogate = Surrogate(SPACE)
    known = genomes(1500)
    teach(surrogate, known)
    rows = surrogate._kept
    assert len(rows) == MOST_FITTED
    best = np.argsort([fitness_of(genome) for genome in known[:1400]])[:100]
    assert set(best.tolist()) <= set(rows)
    assert rows[-1] > 1400
    judged = surrogate.judge(candidates := genomes(200, 1))
    truth = [fitness_of(genome) for genome in candidates]
    assert np.corrcoef(judged.expected, np.argsort(np.argsort(truth)))[0, 1] > 0.9


@pytest.mark.parametrize("failing", [0, 5])
def test_refits_become_rarer(failing, monkeypatch):
    surrogate, fits = Surrogate(SPACE), []
    monkeypatch.setattr(surrogate, "_select", lambda: fits.append(len(surrogate._points)))
    (genome,) = genomes(1)
    for number in range(1000):
        surrogate.asked(number, genome)
        surrogate.add(number, None if number < failing else (float(number),))
    assert fits[:5] == [8, 9, 10, 11, 12]
    assert fits[-1] - fits[-2] in range(30, 41)


def test_equal_values_share_a_place():
    rng = np.random.default_rng(0)
    for count in (1, 2, 9, 300):
        values = rng.integers(0, max(1, count // 3), count).astype(float)
        assert np.array_equal(_ranked(values), rankdata(values))


def blas_threads():
    return [
        library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
    ]


def test_it_takes_one_thread_and_leaves_the_others_as_they_were(monkeypatch):
    seen, predict = [], Regression.predict

    def watched(*arguments):
        seen.extend(blas_threads())
        return predict(*arguments)

    monkeypatch.setattr(Regression, "predict", watched)
    surrogate = taught(20)
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        surrogate.judge(genomes(5, 1))
        assert blas_threads() == before
    assert seen
    assert set(seen) == {1}
    assert max(before) == 2
