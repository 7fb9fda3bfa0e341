"""What trials will take by their costs, and those that the end of the time interrupts."""

import pytest
from runner import toy_recipe

from dmi_hpc.config import load_recipe
from dmi_hpc.deadline import End
from dmi_hpc.files import read_json_lines
from dmi_hpc.tasks import make_task
from search.cluster.allocation import Allocation
from search.cluster.desk import Desk
from search.driver import Driver
from search.evolution.evolve import Failure, Success
from search.spaces.genome import from_json
from search.trials.pace import load_of
from search.trials.trial import Left, TrialOutcome

END = 10_000.0
LEARNING = 16  # trials, before the end is near


@pytest.fixture
def clock(monkeypatch):
    now = {"now": 0.0}
    monkeypatch.setattr("search.cluster.desk.time.time", lambda: now["now"])
    return now


def desk_of(folder, workers=1, evaluations=60, limit_s=None, rungs=""):
    text = f"evaluations = {evaluations}\ninitial = 60\nworkers = {workers}\n{rungs}"
    recipe = load_recipe(toy_recipe(folder / "toy.toml", search=text))
    driver = Driver(recipe, make_task(recipe.task).space(), folder)
    driver.start(workers, 1.0)
    return Desk(driver, Allocation(limit=End(END, "time_limit_s")), lambda: None, limit_s)


def seconds_of(desk, job):
    """A second, and 3 ms for each weight: a trial of the toy space takes up to ten seconds."""
    return 1.0 + 3e-3 * load_of(from_json(job["genome"]), desk.driver.space.network, 1).parameters


def train(desk, slot, job):
    desk.finished(slot, TrialOutcome(Success(0.5), seconds_of(desk, job), {}))


def number_of(desk, slot):
    return desk._numbers[slot]


def taught(folder, **options):
    desk = desk_of(folder, **options)
    for _ in range(LEARNING):
        train(desk, "a", desk.next_for("a"))
    return desk


def told(desk):
    lines = read_json_lines(desk.driver.journal.path)
    return {line["id"]: line for line in lines if line["event"] == "tell"}


def test_the_journal_has_what_was_foretold_of_each_trial(tmp_path, clock):
    desk = taught(tmp_path)
    job = desk.next_for("a")
    number = number_of(desk, "a")
    train(desk, "a", job)
    assert "predicted_s" not in told(desk)[0]["metrics"]
    assert told(desk)[number]["metrics"]["predicted_s"] == pytest.approx(
        seconds_of(desk, job), rel=0.35
    )


def test_failures_teach_nothing(tmp_path, clock):
    desk = desk_of(tmp_path, evaluations=100)
    for number in range(2 * LEARNING):
        job = desk.next_for("a")
        outcome = Success(0.5) if number % 2 else Failure("nan", "not finite")
        seconds = seconds_of(desk, job) if number % 2 else 1e-3
        desk.finished("a", TrialOutcome(outcome, seconds, {}))
    job = desk.next_for("a")
    foretold = desk._forecast._pace.seconds(desk._forecast._load(number_of(desk, "a")))
    assert foretold == pytest.approx(seconds_of(desk, job), rel=0.35)


def test_a_trial_that_must_stop_is_left_to_the_next_session(tmp_path, clock):
    """Nothing of it is told: it is the first of the next session, and goes on there."""
    desk = desk_of(tmp_path, workers=2)
    first, second = desk.next_for("a"), desk.next_for("b")
    assert first is not None and second is not None
    assert first["assignment"].end is None  # no job ends
    desk.finished("a", Left(3.0))
    assert desk.next_for("a") is None and not desk.is_done  # the other still runs
    desk.finished("b", Left(3.0))
    assert desk.is_done and "next session" in desk.allocation.closed
    assert told(desk) == {}
    assert desk.driver.progress.busy_s == 6.0
    again = Driver(load_recipe(tmp_path / "toy.toml"), desk.driver.space, tmp_path)
    again.start(2, 1.0)
    assert [again.next_proposal().id for _ in range(2)] == [0, 1]


def test_a_trial_far_over_the_limit_is_not_started(tmp_path, clock):
    desk = taught(tmp_path, evaluations=60)
    desk._forecast._limit_s, begun = 3.0, []
    while (job := desk.next_for("a")) is not None:
        begun.append(seconds_of(desk, job))
        train(desk, "a", job)
    refused = [line for line in told(desk).values() if line["status"] == "failed"]
    assert refused and begun
    assert {line["failure"] for line in refused} == {"timeout"}
    assert all("not started: expected to take" in line["message"] for line in refused)
    assert all(line["seconds"] == 0 and line["metrics"]["predicted_s"] > 3 for line in refused)
    assert max(begun) < 6.0


def test_a_stage_is_judged_by_its_own_epochs(tmp_path, clock):
    text = "least_epochs = 1\nreduction = 2"
    desk = desk_of(tmp_path, rungs=text)
    for number in range(40):
        desk.next_for("a")
        stage = desk.driver.halving.stage(number_of(desk, "a"))
        load = desk._forecast._load(stage.proposal.id)
        assert load.amount == 1.0  # of 1 and 2 epochs
        desk.finished("a", TrialOutcome(Success(1.0 / (1 + number)), 1.0, {}))
        if stage.rung:
            break
    assert stage.rung == 1
