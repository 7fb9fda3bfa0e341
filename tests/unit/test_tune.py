"""Slots without Ray's processes: who gets which genome, and when the search gives up."""

from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from runner import toy_recipe

from dmi_hpc.config import load_recipe
from dmi_hpc.deadline import End
from dmi_hpc.errors import LaunchError
from dmi_hpc.files import read_json_lines
from dmi_hpc.tasks import make_task
from search.cluster.allocation import Allocation
from search.cluster.tune import _Adapter, _Desk, _Relay
from search.driver import Driver
from search.evolution.evolve import Success
from search.trials.trial import TrialOutcome


@pytest.fixture
def journal(tmp_path):
    return tmp_path / "journal.jsonl"


@pytest.fixture
def desk(tmp_path):
    text = "evaluations = 3\ninitial = 3\nworkers = 2"
    recipe = load_recipe(toy_recipe(tmp_path / "toy.toml", search=text))
    driver = Driver(recipe, make_task(recipe.task).space(), tmp_path)
    driver.start(2, 1.0)
    return _Desk(driver, Allocation(), lambda: None)


class Slot:
    """A trial of Tune as the scheduler sees it; notes what its actor is given, and when."""

    def __init__(self, name, journal):
        self.trial_id, self.given = name, []
        give = SimpleNamespace(remote=lambda job: self.given.append((job, journal.read_text())))
        self.temporary_state = SimpleNamespace(ray_actor=SimpleNamespace(give=give))


def result(seconds=0.1):
    return {"outcome": TrialOutcome(Success(0.5), seconds, {})}


def asked(journal):
    return [e["id"] for e in read_json_lines(journal) if e["event"] == "ask"]


def test_a_slot_goes_on_to_the_next_genome_and_closes_when_none_is_left(desk, journal):
    adapter, relay = _Adapter(desk), _Relay(desk)
    slot, other = Slot("a", journal), Slot("b", journal)
    first = adapter.suggest("a")["job"]
    adapter.suggest("b")
    assert relay.on_trial_result(None, slot, result()) == TrialScheduler.CONTINUE
    [(job, written)] = slot.given
    assert job != first
    assert written == journal.read_text()  # asked and told before the actor hears of it
    assert asked(journal) == [0, 1, 2]
    assert relay.on_trial_result(None, slot, result()) == TrialScheduler.STOP
    assert adapter.suggest("c") is None  # one still runs, and may be lost
    assert relay.on_trial_result(None, other, result()) == TrialScheduler.STOP
    assert adapter.suggest("c") == Searcher.FINISHED
    assert desk.driver.done


def test_no_genome_is_asked_for_that_could_not_be_evaluated_in_time(desk, journal):
    desk.allocation = Allocation(limit=End(0.0, "time_limit_s"))
    assert _Adapter(desk).suggest("a") == Searcher.FINISHED
    assert asked(journal) == []
    assert "0 s are left (time_limit_s)" in desk.allocation.closed


def test_workers_that_do_nothing_but_die_end_the_search(desk, journal):
    adapter, relay = _Adapter(desk), _Relay(desk)

    def die(times):
        for _ in range(times):
            adapter.suggest("a")
            number, _ = desk.died("a")
            desk.driver.again(number)
            desk.require_life("Traceback ...\nImportError: no libfoo\n")

    die(5)
    adapter.suggest("a")
    assert relay.on_trial_result(None, Slot("a", journal), result()) == TrialScheduler.CONTINUE
    desk.driver.again(desk.died("a")[0])
    die(4)  # five in a row again
    with pytest.raises(LaunchError, match=r"6 workers in a row died.*ImportError: no libfoo"):
        die(1)
