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
from search.cluster.desk import Desk, SpentWorker
from search.cluster.tune import _Adapter, _Relay
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
    return Desk(driver, Allocation(), lambda: None)


class Slot:
    """A trial of Tune as the scheduler sees it; notes what its actor is given, and when."""

    def __init__(self, name, journal):
        self.trial_id, self.given = name, []
        give = SimpleNamespace(remote=lambda job: self.given.append((job, journal.read_text())))
        self.temporary_state = SimpleNamespace(ray_actor=SimpleNamespace(give=give))


READY = {"outcome": None}


def result(seconds=0.1):
    return {"outcome": TrialOutcome(Success(0.5), seconds, {})}


def asked(journal):
    return [e["id"] for e in read_json_lines(journal) if e["event"] == "ask"]


def told(journal):
    return [(e["id"], e["status"]) for e in read_json_lines(journal) if e["event"] == "tell"]


def test_a_slot_goes_on_to_the_next_genome_and_closes_when_none_is_left(desk, journal):
    adapter, relay = _Adapter(desk), _Relay(desk)
    slot, other = Slot("a", journal), Slot("b", journal)
    assert adapter.suggest("a") == adapter.suggest("b") == {}
    assert slot.given == []
    assert relay.on_trial_result(None, slot, READY) == TrialScheduler.CONTINUE
    assert relay.on_trial_result(None, other, READY) == TrialScheduler.CONTINUE
    assert relay.on_trial_result(None, slot, result()) == TrialScheduler.CONTINUE
    [(first, _), (job, written)] = slot.given
    assert job != first
    assert written == journal.read_text()  # asked and told before the actor hears of it
    assert asked(journal) == [0, 1, 2]
    assert relay.on_trial_result(None, slot, result()) == TrialScheduler.STOP
    adapter.on_trial_complete("a")
    assert adapter.suggest("c") is None  # one still runs, and may be lost
    assert relay.on_trial_result(None, other, result()) == TrialScheduler.STOP
    assert adapter.suggest("c") == Searcher.FINISHED
    assert desk.driver.done


def test_no_genome_is_asked_for_that_could_not_be_evaluated_in_time(desk, journal):
    desk.allocation = Allocation(limit=End(0.0, "time_limit_s"))
    assert _Adapter(desk).suggest("a") == Searcher.FINISHED
    assert asked(journal) == []
    assert "0 s are left (time_limit_s)" in desk.allocation.closed


def test_a_genome_whose_worker_is_ready_too_late_stays_for_the_next_session(desk, journal):
    adapter, relay = _Adapter(desk), _Relay(desk)
    adapter.suggest("a")
    desk.allocation = Allocation(limit=End(0.0, "time_limit_s"))
    assert relay.on_trial_result(None, Slot("a", journal), READY) == TrialScheduler.STOP
    assert (asked(journal), told(journal)) == ([0], [])
    assert desk.driver.next_proposal().id == 0


def test_workers_that_do_nothing_but_die_end_the_search(desk, journal):
    adapter, relay = _Adapter(desk), _Relay(desk)
    no_libfoo = "Traceback ...\nImportError: no libfoo\n"

    def die(times):
        for _ in range(times):
            adapter.suggest("a")
            desk.died("a", None, no_libfoo)

    die(5)
    adapter.suggest("a")
    slot = Slot("a", journal)
    assert relay.on_trial_result(None, slot, READY) == TrialScheduler.CONTINUE
    assert relay.on_trial_result(None, slot, result()) == TrialScheduler.CONTINUE
    desk.died("a", None, f"{SpentWorker.__name__}")
    die(4)  # five in a row again
    with pytest.raises(LaunchError, match=r"6 workers in a row died.*ImportError: no libfoo"):
        die(1)


def test_a_slot_that_waits_for_a_node_that_is_gone_gives_its_genome_away(desk, journal):
    room = {"room": 2}
    desk._room = lambda: room["room"]
    adapter, relay = _Adapter(desk), _Relay(desk)
    slot = Slot("a", journal)
    assert adapter.suggest("a") == adapter.suggest("b") == {}
    relay.on_trial_result(None, slot, READY)
    relay.on_trial_result(None, slot, result())
    assert asked(journal) == [0, 1, 2]  # b still waits, with 1, in good hope
    room["room"] = 1
    desk.attend()
    relay.on_trial_result(None, slot, result())
    assert desk._numbers["a"] == 1
    assert relay.on_trial_result(None, Slot("b", journal), READY) == TrialScheduler.STOP
    assert desk.driver.progress.workers == 1


def test_room_that_comes_back_is_used(desk, journal):
    room = {"room": 1}
    desk._room = lambda: room["room"]
    adapter = _Adapter(desk)
    assert [adapter.suggest("a"), adapter.suggest("b")] == [{}, None]
    desk.attend()
    room["room"] = 2
    desk.attend()
    assert adapter.suggest("b") == {}
    changes = [e["workers"] for e in read_json_lines(journal) if e["event"] == "workers"]
    assert changes == [1, 2]


def test_nodes_that_die_are_no_verdict_on_a_network_unless_it_happens_time_and_again(desk, journal):
    gone = "ray.exceptions.ActorDiedError: The actor died because its node has died. Node Id: 1"
    adapter, relay = _Adapter(desk), _Relay(desk)

    def lose(slot):
        assert adapter.suggest(slot) == {}
        relay.on_trial_result(None, Slot(slot, journal), READY)
        number = desk._numbers[slot]
        desk.died(slot, None, gone)
        return number

    assert [lose("a"), lose("b"), lose("c")] == [0, 0, 0]
    assert told(journal) == []
    assert lose("d") == 0
    assert told(journal) == [(0, "failed")]
    for slot in "efghijklm":  # nor do they count as workers that do nothing but die
        adapter.suggest(slot)
        desk.died(slot, None, gone)
