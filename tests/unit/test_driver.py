"""The search as a whole without Ray: budget, journal, resume, winner, refusals."""

import errno
import json
import os
import socket

import pytest
from ray.exceptions import RaySystemError
from ray.tune.error import TuneError
from runner import toy_data, toy_recipe

from dmi_hpc.config import load_recipe
from dmi_hpc.errors import DataError, Interrupted, LaunchError, RunError
from dmi_hpc.files import exclusive, read_json_lines
from dmi_hpc.run import open_run
from dmi_hpc.tasks import make_task
from search.cli import search
from search.cluster.capacity import Capacity, capacity, local_workers
from search.cluster.tune import cluster, judge_loss, own_errors
from search.driver import HOPELESS, Driver
from search.evolution.evolve import Failure, Success
from search.records.history import Reader
from search.setting import founder_defaults
from search.trials.trial import TrialOutcome


@pytest.fixture
def recipe(tmp_path):
    return load_recipe(toy_recipe(tmp_path / "toy.toml"))


def driver_of(recipe, folder, workers=1):
    driver = Driver(recipe, make_task(recipe.task).space(), folder)
    driver.start(workers, 2.0)
    return driver


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


def test_a_search_continued_on_other_data_is_refused(recipe, tmp_path):
    space = make_task(recipe.task).space()
    Driver(recipe, space, tmp_path, data="aa").start(1, 2.0)
    with pytest.raises(DataError, match=r"journal.jsonl: made from data set aa, found data set bb"):
        Driver(recipe, space, tmp_path, data="bb")
    Driver(recipe, space, tmp_path, data="aa").start(1, 2.0)


def test_no_winner_among_failures_only(recipe, tmp_path):
    driver = driver_of(recipe, tmp_path)
    kinds = ("exception", "lost", "data", "memory", "timeout", "nan")
    for kind in kinds:
        while len(driver.evolution.outcomes) <= kinds.index(kind):
            proposal = driver.next_proposal()
            driver.finished(proposal.id, TrialOutcome(Failure(kind), 0.1, {}))
    assert driver.done
    with pytest.raises(RunError) as caught:
        driver.write_winner()
    for part in ("1 exception", "1 lost", "1 data", "1 memory", "1 timeout", "1 nan", "journal"):
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


def test_the_command_wants_resume_where_a_search_is_and_refuses_a_second(tmp_path):
    data = toy_data(tmp_path / "data")
    path, run = toy_recipe(tmp_path / "toy.toml", data), tmp_path / "run"
    recipe = load_recipe(path)
    open_run(run, recipe)
    (run / "search").mkdir()
    advance(driver_of(recipe, run / "search"), 2)
    with pytest.raises(RunError, match="--resume continues it"):
        search(path, run)
    with (
        exclusive(run / "search", "search"),
        pytest.raises(RunError, match="another search is running"),
    ):
        search(path, run, resume=True)


def test_founders_take_open_hyper_parameters_from_the_recipe(recipe):
    space = make_task(recipe.task).space()
    expected = {"batch_size": 20, "learning_rate": 1e-2}
    assert founder_defaults(space, recipe.train) == expected
    odd = space.model_copy(update={"hyper": {"warp": space.hyper["learning_rate"]}})
    with pytest.raises(RunError, match=r"varies warp, .*valid names: accumulation, .*batch_size"):
        founder_defaults(odd, recipe.train)


def test_workers_fill_the_machine_unless_told(recipe, monkeypatch):
    assert local_workers(recipe.search) == 2
    auto = recipe.search.model_copy(update={"workers": "auto", "trial_threads": 2})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(7)))
    assert local_workers(auto) == 3
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert local_workers(auto) == 8


def test_a_cluster_holds_what_its_nodes_hold():
    cpu = [{"CPU": 8.0, "memory": 16e9}, {"CPU": 5.0, "memory": 6e9}, {"CPU": 1.0, "memory": 1e9}]
    assert capacity(cpu, threads=2) == Capacity(workers=6, memory_GB=3.0, gpus=False)
    mixed = [*cpu, {"CPU": 8.0, "GPU": 4.0, "memory": 32e9}]
    assert capacity(mixed, threads=1) == Capacity(workers=4, memory_GB=8.0, gpus=True)
    with pytest.raises(LaunchError, match=r"CPUs of its nodes: 8, 5, 1; .* trial_threads = 9"):
        capacity(cpu, threads=9)


@pytest.mark.parametrize("kind", ["lost", "data"])
def test_a_trial_that_the_machine_failed_is_asked_once_more(recipe, tmp_path, kind):
    driver, journal = driver_of(recipe, tmp_path), tmp_path / "journal.jsonl"
    first = driver.next_proposal()
    before = journal.read_bytes()
    driver.finished(first.id, TrialOutcome(Failure(kind, "died"), 1.0, {}))
    assert journal.read_bytes() == before
    assert not driver.done
    assert driver.next_proposal() is first
    driver.again(first.id)  # not its fault: counts for nothing
    assert driver.next_proposal() is first
    driver.finished(first.id, TrialOutcome(Failure(kind, "died again"), 1.0, {}))
    assert advance(driver) == [1, 2, 3, 4, 5]
    assert driver.evolution.outcomes[first.id] == Failure(kind, "died again")
    assert driver.done


def test_the_work_of_a_trial_that_is_left_counts_and_it_goes_on_first(recipe, tmp_path):
    driver = driver_of(recipe, tmp_path)
    advance(driver, 1)
    left = driver.next_proposal()
    driver.left(left.id, 7.0)
    assert driver.progress.busy_s == pytest.approx(7.5)
    assert driver.progress.running == 0
    following = driver_of(recipe, tmp_path)
    assert following.next_proposal().id == left.id
    reader = Reader("main", following.journal.path)
    reader.poll()
    assert reader.clock.busy_s == pytest.approx(7.5)


def test_the_last_trial_may_be_lost_too(recipe, tmp_path):
    driver = driver_of(recipe, tmp_path)
    advance(driver, 5)
    last = driver.next_proposal()
    assert driver.next_proposal() is None
    assert not driver.done  # a runner asks again
    driver.finished(last.id, TrialOutcome(Failure("lost"), 1.0, {}))
    assert driver.next_proposal() is last


@pytest.mark.parametrize(
    ("seconds", "limit_s", "text", "kind"),
    [
        (9.0, None, "killed", None),
        (9.0, 10.0, "killed", None),
        (11.0, 10.0, "killed", "timeout"),
        (11.0, 10.0, "ray::step() SpentWorker", None),
    ],
)
def test_a_dead_worker_is_a_timeout_only_after_the_limit(
    recipe, tmp_path, seconds, limit_s, text, kind
):
    driver = driver_of(recipe, tmp_path)
    proposal = driver.next_proposal()
    judge_loss(driver, proposal.id, seconds, limit_s, text)
    told = driver.evolution.outcomes.get(proposal.id)
    assert (told.kind if told else None) == kind
    assert driver.next_proposal().id == (0 if kind is None else 1)


def test_what_ray_says_of_a_death_is_in_the_journal(recipe, tmp_path):
    driver = driver_of(recipe, tmp_path)
    proposal = driver.next_proposal()
    for _ in range(2):
        judge_loss(driver, proposal.id, 1.0, None, "Traceback ...\nImportError: no libfoo\n")
        driver.next_proposal()
    tell = read_json_lines(tmp_path / "journal.jsonl")[-2]
    assert (tell["event"], tell["failure"]) == ("tell", "lost")
    assert "ImportError: no libfoo" in tell["message"]
    assert "Traceback" in tell["traceback"]


def test_a_session_records_what_its_machine_gave(recipe, tmp_path):
    driver_of(recipe, tmp_path)
    Driver(recipe, make_task(recipe.task).space(), tmp_path).start(3, 0.5)
    first, second = read_json_lines(tmp_path / "journal.jsonl")
    assert (first["config"]["workers"], first["config"]["trial_memory_GB"]) == (1, 2.0)
    assert second["event"] == "resume"
    assert (second["config"]["workers"], second["config"]["trial_memory_GB"]) == (3, 0.5)
    assert second["config"]["evaluations"] == recipe.search.evaluations


def test_a_full_disk_ends_the_search_and_loses_nothing(recipe, tmp_path, monkeypatch):
    driver = driver_of(recipe, tmp_path)
    proposal = driver.next_proposal()
    write, room = os.write, [20, 0]

    def full(handle, data):
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data[: room.pop(0)])

    monkeypatch.setattr("os.write", full)
    with pytest.raises(RunError, match=r"no space left"):
        driver.finished(proposal.id, outcome(0))
    assert not driver.evolution.outcomes
    monkeypatch.undo()
    again = driver_of(recipe, tmp_path)
    assert again.next_proposal().id == proposal.id
    assert advance(again) == [1, 2, 3, 4, 5]


def test_only_the_first_rank_searches(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    search(tmp_path / "unread.toml", tmp_path / "run")
    assert "rank 0 drives the search" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_ray_address_without_a_cluster_is_refused(recipe, tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{unused.getsockname()[1]}")
        refused = pytest.raises(LaunchError, match="no Ray cluster there takes us in")
        with refused, cluster(recipe.search, tmp_path):
            pass


@pytest.mark.parametrize("inner", [RunError("disk full"), Interrupted("asked to stop")])
def test_tune_does_not_hide_our_errors(inner):
    wrapped = TuneError("Traceback ...")
    wrapped.__context__ = inner  # as by Tune's: except Exception: raise TuneError(traceback)
    with pytest.raises(type(inner), match=str(inner)), own_errors():
        raise wrapped


def test_a_failure_of_ray_is_an_interruption():
    with pytest.raises(Interrupted, match=r"Ray failed .*no raylet"), own_errors():
        raise RaySystemError("no raylet")


def test_another_worker_tries_again_what_a_machine_failed(recipe, tmp_path):
    driver = driver_of(recipe, tmp_path, workers=2)
    first = driver.next_proposal("a")
    driver.finished(first.id, TrialOutcome(Failure("data", "EIO"), 1.0, {}), "a")
    assert driver.next_proposal("a") is not first
    assert driver.next_proposal("b") is first


def test_a_search_in_which_everything_fails_stops_itself(recipe, tmp_path):
    search = recipe.search.model_copy(update={"evaluations": 200})
    driver = driver_of(recipe.model_copy(update={"search": search}), tmp_path)

    def fail(times):
        for _ in range(times):
            proposal = driver.next_proposal()
            driver.finished(proposal.id, TrialOutcome(Failure("exception", "my bug"), 0.1, {}))

    fail(HOPELESS - 1)
    driver.finished(driver.next_proposal().id, TrialOutcome(Success(1.0), 0.1, {}))
    fail(HOPELESS - 1)
    with pytest.raises(RunError, match=r"last 30 .* failed.*59 exception.*my bug.*--resume"):
        fail(1)
    assert len(driver.evolution.outcomes) == 2 * HOPELESS  # all are in the journal
