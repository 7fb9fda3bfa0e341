"""The search as a whole without Ray: budget, journal, resume, winner, refusals."""

import json

import pytest
from runner import toy_data, toy_recipe

from dmi_hpc.config import load_recipe
from dmi_hpc.errors import RunError
from dmi_hpc.files import read_json_lines
from dmi_hpc.run import open_run
from dmi_hpc.tasks import make_task
from search.cli import search, workers_of
from search.driver import Driver, exclusive, founder_defaults
from search.evolve import Failure, Success
from search.trial import TrialOutcome


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(toy_recipe(tmp_path / "toy.toml"))


def driver_of(recipe, folder):
    return Driver(recipe, make_task(recipe.task).space(), folder, workers=1)


def outcome(number):
    """A fitness that depends on the number alone; every third fails."""
    told = Failure("nan", "loss is nan") if number % 3 == 2 else Success(1 / (number + 1))
    return TrialOutcome(told, 0.5, {})


def advance(driver, steps=None):
    """Evaluate one after the other; returns the numbers evaluated."""
    numbers = []
    while steps is None or len(numbers) < steps:
        proposal = driver.next_proposal()
        if proposal is None:
            break
        driver.finished(proposal.id, outcome(proposal.id))
        numbers.append(proposal.id)
    return numbers


def test_the_budget_is_reached_exactly_and_the_best_wins(recipe, tmp_path):
    driver = driver_of(recipe, tmp_path)
    assert advance(driver) == [0, 1, 2, 3, 4, 5]
    assert driver.done
    winner = json.loads(driver.write_winner().read_text())
    assert (winner["id"], winner["fitness"]) == (4, 1 / 5)
    assert driver.progress.failures == {"nan": 2}
    assert driver.progress.busy_s == pytest.approx(3.0)


@pytest.mark.parametrize("told", [1, 3, 5])
def test_a_continued_search_repeats_nothing_and_ends_alike(recipe, tmp_path, told):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = driver_of(recipe, tmp_path / "whole")
    advance(whole)
    first = driver_of(recipe, tmp_path / "cut")
    advance(first, told)
    lost = first.next_proposal()  # in flight when the driver dies
    second = driver_of(recipe, tmp_path / "cut")
    assert second.progress.finished == told
    assert advance(second) == list(range(lost.id, 6))
    assert second.evolution.proposals == whole.evolution.proposals
    assert second.evolution.outcomes == whole.evolution.outcomes
    events = [e["event"] for e in read_json_lines(tmp_path / "cut" / "journal.jsonl")]
    assert (events.count("ask"), events.count("tell"), events.count("resume")) == (6, 6, 1)


def test_no_winner_among_failures_only(recipe, tmp_path):
    driver = driver_of(recipe, tmp_path)
    kinds = ("exception", "lost", "lost", "memory", "timeout", "nan")
    for kind in kinds:
        proposal = driver.next_proposal()
        driver.finished(proposal.id, TrialOutcome(Failure(kind), 0.1, {}))
    assert driver.done
    with pytest.raises(RunError) as caught:
        driver.write_winner()
    for part in ("1 exception", "2 lost", "1 memory", "1 timeout", "1 nan", "journal"):
        assert part in str(caught.value)
    assert not (tmp_path / "winner.json").exists()


def test_no_trial_starts_after_the_time_limit(tmp_path):
    text = "evaluations = 6\ntime_limit_s = 100"
    driver = driver_of(load_recipe(toy_recipe(tmp_path / "t.toml", search=text)), tmp_path)
    proposal = driver.next_proposal()
    driver.progress.started -= 101
    assert driver.next_proposal() is None
    assert not driver.done  # one is running
    driver.finished(proposal.id, outcome(0))
    assert driver.done


def test_a_second_search_in_a_folder_is_refused(tmp_path):
    refused = pytest.raises(RunError, match="another search is running here")
    with exclusive(tmp_path), refused, exclusive(tmp_path):
        pass
    with exclusive(tmp_path):  # the lock went with its holder
        pass


def test_the_command_wants_resume_where_a_search_is_and_refuses_a_second(tmp_path):
    data = toy_data(tmp_path / "data")
    path, run = toy_recipe(tmp_path / "toy.toml", data), tmp_path / "run"
    recipe = load_recipe(path)
    open_run(run, recipe)
    (run / "search").mkdir()
    advance(driver_of(recipe, run / "search"), 2)
    with pytest.raises(RunError, match="--resume continues it"):
        search(path, run)
    with exclusive(run / "search"), pytest.raises(RunError, match="another search is running"):
        search(path, run, resume=True)


def test_founders_take_open_hyper_parameters_from_the_recipe(recipe):
    space = make_task(recipe.task).space()
    expected = {"batch_size": 20, "learning_rate": 1e-2}
    assert founder_defaults(space, recipe.train) == expected
    odd = space.model_copy(update={"hyper": {"warp": space.hyper["learning_rate"]}})
    with pytest.raises(RunError, match=r"varies warp, .*valid names: augment, batch_size"):
        founder_defaults(odd, recipe.train)


def test_workers_fill_the_machine_unless_told(recipe, monkeypatch):
    assert workers_of(recipe.search) == 2
    auto = recipe.search.model_copy(update={"workers": "auto", "trial_threads": 2})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(7)))
    assert workers_of(auto) == 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert workers_of(auto) == 8
