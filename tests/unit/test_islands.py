"""Islands learn from each other through nothing but their journals, and none waits for another."""

import json
import subprocess
import sys
import time
from math import log2, log10

import pytest
from island_process import fitness
from runner import LIMIT_S, SUPPORT, environment, toy_recipe

from dmi_hpc.config import load_recipe
from dmi_hpc.errors import RunError
from dmi_hpc.models.space import Choice, NetworkSpace, SearchSpace
from dmi_hpc.tasks import make_task
from search.driver import Driver, Start
from search.evolution.evolve import Failure, Success
from search.records import islands
from search.records.control import request_stop
from search.records.history import Reader, journals
from search.records.islands import island_seed, require_name
from search.records.lines import decode, encode
from search.trials.trial import TrialOutcome

KNOWN_S = 2.0  # until an island knows what another has told, on a busy machine


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(islands, "POLL_S", 0.0)
    monkeypatch.setattr(islands, "POLL_SHARE", 1e9)


@pytest.fixture
def recipe(tmp_path):
    search = "evaluations = 24\ninitial = 4\nsurrogate = false"
    return load_recipe(toy_recipe(tmp_path / "toy.toml", search=search))


def island(recipe, folder, name, space=None, data=""):
    space = space or make_task(recipe.task).space()
    driver = Driver(recipe, space, folder, data=data, start=Start(island=name))
    driver.start(1, 1.0)
    return driver


def evaluate(driver, proposal, told=None):
    told = told or Success(fitness(proposal.hash))
    driver.finished(proposal.id, TrialOutcome(told, 1.0, {}))


def advance(driver, count):
    """Evaluate so many; returns the hashes."""
    proposals = []
    for _ in range(count):
        proposals.append(driver.next_proposal())
        evaluate(driver, proposals[-1])
    return [proposal.hash for proposal in proposals]


def hashes(path, kind="tell"):
    """Of the genomes that an island has told, or taken in."""
    reader = Reader("x", path, 0.0)
    told = [evaluation.hash for evaluation in reader.poll()]
    return told if kind == "tell" else [h for n, h in reader.hashes.items() if n < 0]


def evaluations_of(folder):
    return Reader("x", folder / "journal.jsonl", 0.0).poll()


def test_what_one_has_evaluated_the_other_takes_in_and_never_evaluates(recipe, tmp_path):
    first = island(recipe, tmp_path, "a")
    known = advance(first, 6)
    second = island(recipe, tmp_path, "b")
    assert second.progress.elsewhere == 6
    assert second.evolution.best() == (
        -1 - known.index(min(known, key=fitness)),
        fitness(min(known)),
    )
    assert not set(advance(second, 6)) & set(known)  # not even the task's founder
    new = second.next_proposal()
    assert new.origin in ("crossover", "mutation", "incumbent")
    assert new.id == 6  # migrants take no numbers of its own
    assert len(advance(first, 2)) == 2
    assert first.progress.elsewhere == 6
    assert len(hashes(tmp_path / "islands/a/journal.jsonl", "migrant")) == 6


def test_an_island_is_replayed_from_its_own_journal_alone(recipe, tmp_path):
    first, second = island(recipe, tmp_path, "a"), island(recipe, tmp_path, "b")
    for _ in range(4):
        advance(first, 1)
        advance(second, 2)
    (tmp_path / "islands/a/journal.jsonl").unlink()
    again = Driver(recipe, make_task(recipe.task).space(), tmp_path, start=Start(island="b"))
    assert again.evolution.proposals == second.evolution.proposals
    assert again.evolution.outcomes == second.evolution.outcomes
    assert again.evolution.ask() == second.evolution.ask()
    assert again.progress.finished == 8
    sources = [event["from"] for event in again.journal.events() if event["event"] == "migrant"]
    assert sources == [{"island": "a", "id": number} for number in range(4)]


def test_a_plain_search_is_joined_by_islands_and_the_budget_is_that_of_all(recipe, tmp_path):
    main = island(recipe, tmp_path, "main")
    advance(main, 10)
    other = island(recipe, tmp_path, "b")
    advance(other, 10)
    assert main.next_proposal() is not None
    advance(other, 4)
    assert other.next_proposal() is None and other.done
    assert main.next_proposal() is None
    main_events = {event["event"] for event in main.journal.events()}
    assert "migrant" in main_events
    assert list(journals(tmp_path)) == ["main", "b"]


def test_what_several_islands_have_evaluated_counts_once(recipe, tmp_path):
    first, second = island(recipe, tmp_path, "a"), island(recipe, tmp_path, "b")
    mine, same = first.next_proposal(), second.next_proposal()
    assert mine.hash == same.hash  # both begin with the task's founder
    evaluate(second, same)
    known = {mine.hash, *advance(second, 22)}
    assert (second.progress.finished, second.progress.elsewhere) == (23, 0)
    last = first.next_proposal()  # what runs here and is known by now took no place of its own
    assert last.hash not in known
    assert first.next_proposal() is None
    evaluate(first, mine)
    evaluate(first, last, Failure("memory", "too large"))
    assert first.next_proposal() is None and first.done
    assert second.next_proposal() is None and second.done
    again = island(recipe, tmp_path, "a")
    for driver, own, others in ((first, 2, 22), (second, 23, 1), (again, 2, 22)):
        assert (driver.progress.finished, driver.progress.elsewhere) == (own, others)
        assert sum(driver.progress.failures.values()) == (driver is not second)


def test_the_best_of_all_islands_is_the_winner_of_each(recipe, tmp_path):
    first, second = island(recipe, tmp_path, "a"), island(recipe, tmp_path, "b")
    proposal = first.next_proposal()
    evaluate(first, proposal, Success(-1.0))
    evaluate(second, second.next_proposal(), Success(-0.5))
    second.attend()
    winner = json.loads(second.write_winner().read_text())
    assert (winner["island"], winner["id"], winner["fitness"]) == ("a", proposal.id, -1.0)
    assert winner == json.loads((tmp_path / "winner.json").read_text())  # training takes this one
    evaluate(first, first.next_proposal(), Success(-2.0))
    first.write_winner()
    second.write_winner()  # of before: keeps the better one
    assert json.loads((tmp_path / "winner.json").read_text())["fitness"] == -2.0


def test_what_cannot_be_compared_is_left_out_and_said(recipe, tmp_path):
    space = make_task(recipe.task).space()
    advance(island(recipe, tmp_path, "a", data="aa"), 2)
    smaller = space.model_copy(
        update={"network": space.network.model_copy(update={"dense_blocks": (1, 2)})}
    )
    advance(island(recipe, tmp_path, "b", smaller, data="bb"), 2)
    damaged = tmp_path / "islands/c/journal.jsonl"
    damaged.parent.mkdir()
    damaged.write_text("nonsense\n")
    driver = island(recipe, tmp_path, "d", data="bb")
    assert min(driver.evolution.proposals, default=0) == 0
    data, other_space, header = driver.warnings
    assert "another data set" in data
    assert "search space is another one" in other_space
    assert "not the header" in header
    assert len(advance(driver, 2)) == 2


def test_failures_teach_the_others_but_not_those_of_the_machine(recipe, tmp_path):
    first = island(recipe, tmp_path, "a")
    for kind in ("memory", "lost"):
        evaluate(first, first.next_proposal(), Failure(kind, "message", "traceback"))
    second = island(recipe, tmp_path, "b")
    assert list(second.evolution.outcomes.values()) == [Failure("memory", "message", "traceback")]


def test_beyond_the_limit_the_best_are_taken_in_and_the_rest_is_still_not_repeated(
    recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(islands, "FREE_MIGRANTS", 2)
    monkeypatch.setattr(islands, "MIGRANTS_PER_OWN", 0)
    space = SearchSpace(
        network=NetworkSpace(input_shape=(8,), dense_blocks=(0, 0)),
        hyper={"batch_size": Choice(values=(8, 16, 32, 64, 128, 256), ordered=True)},
    )
    known = advance(island(recipe, tmp_path, "a", space), 5)
    second = island(recipe, tmp_path, "b", space)
    taken = hashes(second.journal.path, "migrant")
    assert set(taken) == set(sorted(known, key=fitness)[:2])
    proposal = second.next_proposal()
    assert proposal.hash not in known
    assert second.next_proposal() is None  # the space is exhausted, though `a` knows three more
    tells = [event for event in second.journal.events() if event["event"] == "tell"]
    assert {tell["metrics"]["evaluated_as"][:2] for tell in tells} == {"a:"}
    assert len(tells) == 3
    again = Driver(recipe, space, tmp_path, start=Start(island="b"))
    assert again.evolution.outcomes == second.evolution.outcomes
    for driver in (second, again):  # what it only took over is no evaluation of its own
        assert (driver.progress.finished, driver.progress.elsewhere) == (0, 5)
    first = Driver(recipe, space, tmp_path, start=Start(island="a"))
    assert (first.progress.finished, first.progress.elsewhere) == (5, 0)


def test_what_was_interrupted_here_and_evaluated_elsewhere_is_not_repeated(recipe, tmp_path):
    first, second = island(recipe, tmp_path, "a"), island(recipe, tmp_path, "b")
    founder, same = first.next_proposal(), second.next_proposal()
    assert founder.hash == same.hash  # both began at once
    evaluate(second, same)
    again = island(recipe, tmp_path, "a")  # the first one was killed
    assert again.next_proposal().hash != founder.hash
    assert again.evolution.outcomes == {founder.id: Success(fitness(founder.hash))}


def test_an_island_of_unknown_genes_is_left_out(recipe, tmp_path):
    advance(island(recipe, tmp_path, "a"), 1)
    path = tmp_path / "islands/a/journal.jsonl"
    lines = [decode(line) for line in path.read_bytes().splitlines()]
    lines[1]["genome"]["dense"][0]["warp"] = 9
    path.write_bytes(b"".join(map(encode, lines)))
    driver = island(recipe, tmp_path, "b")
    assert "another DMI-HPC" in driver.warnings[0]
    assert len(advance(driver, 1)) == 1


@pytest.mark.parametrize("name", ["main", "", "a/b", "..", "a b", ".hidden", "x" * 65])
def test_odd_names_are_refused(name):
    with pytest.raises(RunError, match="SLURM_ARRAY_TASK_ID"):
        require_name(name)


def test_every_island_draws_its_own_random_numbers():
    assert island_seed(7, "main") == 7
    seeds = {island_seed(seed, str(name)) for seed in (1, 2) for name in range(100)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)


def distance(genome):
    """A smooth objective with one optimum."""
    hyper = dict(genome.hyper)
    blocks = sum(
        abs(log2(g.units / 16)) + (g.activation != "silu") + 5 * g.dropout + (g.norm is not None)
        for g in genome.dense
    )
    rate = abs(log10(hyper["learning_rate"] / 0.02))
    return 2 * abs(len(genome.dense) - 3) + blocks + rate + abs(log2(hyper["batch_size"] / 32))


def best_of(drivers, rounds):
    """All take turns, as workers of equal speed."""
    for _ in range(rounds):
        for driver in drivers:
            proposal = driver.next_proposal()
            evaluate(driver, proposal, Success(distance(proposal.genome)))
    return min(driver.evolution.best()[1] for driver in drivers)


def test_islands_gain_over_separate_searches(tmp_path):
    gains = []
    for seed in range(5):
        search = "evaluations = 100\ninitial = 8\nsurrogate = false"
        path = toy_recipe(tmp_path / f"{seed}.toml", search=search, seed=seed)
        recipe, names = load_recipe(path), "abcd"
        together = [island(recipe, tmp_path / f"{seed}", name) for name in names]
        apart = [island(recipe, tmp_path / f"{seed}-{name}", name) for name in names]
        gains.append(best_of(apart, 25) - best_of(together, 25))
    assert sum(gains) / len(gains) > 0.5
    assert sum(gain > 0 for gain in gains) >= 4


def process(recipe_file, folder, name):
    script = [sys.executable, str(SUPPORT / "island_process.py")]
    return subprocess.Popen(
        [*script, str(recipe_file), str(folder), name],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def until(condition, processes):
    end = time.monotonic() + LIMIT_S
    while not condition():
        for running in processes:
            assert running.poll() in (None, 0), running.communicate()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_processes_that_are_killed_and_join_late_repeat_nothing_that_they_know(tmp_path):
    search = "evaluations = 100000\ninitial = 6\nsurrogate = false"
    file, run = toy_recipe(tmp_path / "toy.toml", search=search), tmp_path / "search"

    def told(name):
        path = run / "islands" / name / "journal.jsonl"
        return hashes(path) if path.exists() else []

    alive = [process(file, run, "a")]
    doomed = process(file, run, "b")
    until(lambda: len(told("b")) >= 10, alive)
    doomed.kill()
    doomed.communicate()
    alive.append(process(file, run, "late"))
    until(lambda: len(told("late")) >= 10, alive)
    request_stop(run, "drain")
    for running in alive:
        said, _ = running.communicate(timeout=LIMIT_S)
        assert running.returncode == 0, said
    everything = [identity for name in ("a", "b", "late") for identity in told(name)]
    # twice is only what two had begun before either could know of the other's
    seen = [e for name in ("a", "b", "late") for e in evaluations_of(run / "islands" / name)]
    first = {e.hash: e for e in sorted(seen, key=lambda e: e.told, reverse=True)}
    assert all(e.asked < first[e.hash].told + KNOWN_S for e in seen)
    assert len(set(everything)) > 0.8 * len(everything)
    assert set(told("b")) <= {*hashes(run / "islands/late/journal.jsonl", "migrant"), *told("late")}
    winner = json.loads((run / "winner.json").read_text())
    assert winner["fitness"] == min(map(fitness, everything))
    recipe, space = load_recipe(file), make_task({"name": "toy_task:Toy"}).space()
    for name in ("a", "late", "b"):  # the killed one goes on where it was
        driver = Driver(recipe, space, run, start=Start(island=name))
        assert driver.progress.finished + driver.progress.elsewhere == len(set(everything))
        assert driver.warnings == []
        assert len(driver.evolution.pending()) <= (name == "b")
