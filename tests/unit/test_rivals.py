"""The comparison with other optimisers: statistics, results files, equal epochs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import wilcoxon

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import search_rivals
from searching import rivals_epochs, statistics
from searching.tables import EPOCHS


def line(arm, seed, regret, problem="p", group="tables"):
    keys = {"problem": problem, "group": group, "arm": arm, "seed": seed, "workers": 16}
    return keys | {"best": [-r for r in regret], "regret": regret, "optimiser_s": 0.002}


def test_holm_multiplies_by_what_is_left_and_never_falls():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]


def test_mean_weighs_problems_equally_whatever_their_number_of_seeds():
    runs = {("a", 0): 0.0, ("b", 0): 1.0, ("b", 1): 1.0, ("b", 2): 1.0}
    assert statistics.mean_interval(runs, np.random.default_rng(0)) == (0.5, 0.5, 0.5)


def test_interval_holds_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        runs = {("a", seed): float(rng.standard_normal()) for seed in range(30)}
        _, low, high = statistics.mean_interval(runs, rng)
        hits += low < 0 < high
    assert 85 <= hits <= 100


def test_comparison_is_paired_over_what_both_have_run():
    ours = {("p", seed): 0.1 + 0.01 * seed for seed in range(8)}
    rival = {("p", seed): 0.2 + 0.03 * seed for seed in range(2, 12)}
    found = statistics.compared(ours, rival)
    differences = [ours["p", s] - rival["p", s] for s in range(2, 8)]
    assert (found.pairs, found.wins, found.losses) == (6, 6, 0)
    assert found.difference == pytest.approx(np.mean(differences))
    assert found.p == wilcoxon(differences).pvalue


def test_equal_arms_do_not_differ():
    runs = {("p", seed): 0.5 for seed in range(5)}
    assert statistics.compared(runs, runs) == (5, 0.0, 0, 0, 1.0)


def test_arms_without_a_common_pair_cannot_be_compared():
    with pytest.raises(ValueError, match="in common"):
        statistics.compared({("p", 0): 1.0}, {("p", 1): 1.0})


def test_ranks_share_ties():
    arms = {"a": {("p", 0): 1.0}, "b": {("p", 0): 1.0}, "c": {("p", 0): 2.0, ("p", 1): 0.0}}
    assert statistics.mean_ranks(arms) == {"a": 1.5, "b": 1.5, "c": 3.0}


def test_report_shows_losses_and_keeps_groups_apart(tmp_path, capsys, monkeypatch):
    path = tmp_path / "a.jsonl"
    lines = [line("ours", s, [0.9, 0.5]) for s in range(6)]
    lines += [line("rival", s, [0.8, 0.1]) for s in range(6)]  # better
    lines += [line("ours", 0, [0.3], group="other")]  # exhausted after one evaluation
    path.write_text("".join(json.dumps(one) + "\n" for one in lines) + '{"torn')
    monkeypatch.setattr(sys, "argv", ["x", "compare", str(path), "--budgets", "1", "2"])
    search_rivals.main()
    text = capsys.readouterr().out
    assert "| rival | +0.100, 0-6, 0.031 | +0.400, 0-6, 0.031 | 6 |" in text
    tables, other = text.index("### tables"), text.index("### other")
    assert other < tables and "0.300 [0.300, 0.300]" in text[other:tables]


def test_a_torn_line_is_run_again_and_the_rest_is_not(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(line("a", 0, [1.0])) + "\n" + '{"problem": "p", "arm')
    search_rivals.run_all(fake, [("p", "a", 0), ("p", "a", 1)], path, processes=1)
    assert [one["seed"] for one in search_rivals.read(path)] == [0, 1]


def fake(job):
    assert job == ("p", "a", 1)
    return line("a", 1, [0.5])


def test_missing_results_are_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "compare", str(tmp_path / "none.jsonl")])
    with pytest.raises(SystemExit):
        search_rivals.main()
    assert "none.jsonl" in capsys.readouterr().err


class Fixed:
    """Asks for the numbers 0, 1, 2 ..; remembers what it was told."""

    def __init__(self):
        self.asked, self.told = 0, []

    def ask(self):
        self.asked += 1
        return self.asked, {"x": float(self.asked)}

    def tell(self, token, score):
        self.told.append((token, score))


def rising(config):
    """Score of epoch e: x + e / 100, so that the best of a trial is its last."""
    return config["x"] + np.arange(1, EPOCHS + 1) / 100, 1.0


def test_epochs_of_all_workers_count_and_each_trial_is_told_its_best():
    optimiser = Fixed()
    best, _ = rivals_epochs.race_epochs(
        rivals_epochs.ToTheEnd(optimiser), rising, workers=4, epochs=4 * EPOCHS, seed=0
    )
    assert len(best) == 4 * EPOCHS and np.all(np.diff(best) >= 0)
    assert 3 <= len(optimiser.told) <= 5
    assert all(score == pytest.approx(token + EPOCHS / 100) for token, score in optimiser.told)


def test_stages_go_on_where_they_paused():
    seen = []

    class Paused:
        def ask(self):
            return rivals_epochs.Stage("t", {"x": 0.0}, 3 * len(seen), 3 * len(seen) + 3)

        def goes_on(self, token, epoch, score):
            return True

        def tell(self, token, epoch, scores):
            seen.append((epoch, len(scores), round(scores.max(), 2)))

    rivals_epochs.race_epochs(Paused(), rising, workers=1, epochs=9, seed=0)
    assert seen == [(3, 3, 0.03), (6, 6, 0.06), (9, 9, 0.09)]


def test_ray_asha_stops_what_is_not_among_the_best_quarter(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(rivals_epochs, "Random", lambda problem, seed: Fixed())
    asha = rivals_epochs.RayASHA(None, 0)
    trials = [asha.ask().token for _ in range(8)]
    first = [asha.goes_on(trial, 1, score) for trial, score in zip(trials, range(8), strict=True)]
    assert all(first)  # each is the best so far
    late = asha.ask().token
    assert not asha.goes_on(late, 1, 0.5)
