"""What a user sees of a search that is there, and how it is steered from elsewhere."""

import json
import time
from dataclasses import replace

import pytest
from runner import toy_data, toy_recipe

from dmi_hpc.config import load_recipe
from dmi_hpc.errors import DataError, DMIError, RecipeError, RunError
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.run import network_to_train, open_run
from dmi_hpc.tasks import make_task
from search import cli, driver
from search.commands import brief
from search.driver import Driver, Start
from search.evolution.evolve import Failure, Success
from search.records import status
from search.records.control import raise_budget, read_control, request_stop
from search.records.history import evaluations
from search.records.journal import Journal, replay
from search.records.lines import encode
from search.records.warm import founders_from
from search.setting import founder_defaults
from search.spaces.genome import to_json
from search.trials.trial import TrialOutcome


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setattr(driver, "LOOK_S", 0.0)


@pytest.fixture
def recipe_file(tmp_path, data):
    return toy_recipe(tmp_path / "toy.toml", data)


@pytest.fixture
def run(tmp_path, recipe_file):
    return open_run(tmp_path / "run", load_recipe(recipe_file)).folder


def begin(run, island="main", **changes):
    opened = open_run(run)
    space = make_task(opened.recipe.task).space()
    search = Driver(opened.recipe, space, opened.search, start=Start(island, **changes))
    search.start(2, 1.0, {"unit": "m"})
    return search


def evaluate(search, count, told=None):
    for _ in range(count):
        proposal = search.next_proposal()
        outcome = told or Success(1.0 + int(proposal.hash[:4], 16) / 16**4)
        search.finished(proposal.id, TrialOutcome(outcome, 0.5, {"parameters": 10}))


def dmi(*arguments):
    cli.app([str(argument) for argument in arguments], standalone_mode=False)


def said(capsys, *arguments):
    dmi(*arguments)
    return capsys.readouterr().out


def test_status_tells_everything_from_the_journal_alone(run, capsys):
    search = begin(run)
    evaluate(search, 2)
    evaluate(search, 1, Failure("memory", "too large"))
    evaluate(search, 1, Success(0.25))
    search.next_proposal()
    page = said(capsys, "status", run)
    assert "4 of 6 evaluations (67 %)" in page
    assert "1 memory" in page
    assert "0.25 m by network 3" in page
    assert "evaluations an hour" in page and " left" in page
    assert "2, " in page and "% busy" in page
    assert "running, last event 0 s ago" in page
    search.end("interrupted")
    assert "interrupted 0 s ago" in said(capsys, "status", run)
    found = json.loads(said(capsys, "status", run, "--json"))
    assert (found["finished"], found["budget"], found["failures"]) == (4, 6, {"memory": 1})
    assert found["best"] == {"network": "3", "fitness": 0.25}
    assert found["islands"][0]["state"] == "interrupted"


def test_a_search_that_was_killed_is_called_silent(run, capsys, monkeypatch):
    evaluate(begin(run), 2)
    now = time.time
    monkeypatch.setattr("time.time", lambda: now() + status.SILENT_S + 1)
    page = said(capsys, "status", run)
    assert "silent for 0:02:01: killed? --resume would continue it" in page


def test_status_of_islands_and_of_damage(run, capsys):
    evaluate(begin(run), 2)
    other = begin(run, "b")
    evaluate(other, 1)
    with other.journal.path.open("ab") as stream:
        stream.write(b"\0\0\0\n" + encode({"event": "end", "time": time.time(), "why": "stopped"}))
    page = said(capsys, "status", run)
    assert "3 of 6 evaluations" in page
    rows = {line.split()[0]: line.split() for line in page.splitlines() if line}
    assert rows["main"][1:4] == ["2", "0", "0"]
    assert rows["b"][1:4] == ["1", "0", "0"]
    assert "stopped" in rows["b"]
    assert "1 line of the journals, passed over" in page


def test_status_counts_a_network_of_several_islands_once(run, capsys):
    first, second = begin(run), begin(run, "b")
    shared, same = first.next_proposal(), second.next_proposal()
    assert shared.hash == same.hash
    for search in (first, second):  # both had begun
        search.finished(0, TrialOutcome(Failure("memory", "too large"), 0.5, {}))
    evaluate(first, 1, Success(0.5))
    taken = first.evolution.proposals[1]
    second.journal.ask(replace(taken, id=7), to_json(taken.genome))
    second.journal.tell(7, Success(0.5), 0.0, {"evaluated_as": "1"})
    found = json.loads(said(capsys, "status", run, "--json"))
    assert (found["finished"], found["failures"]) == (2, {"memory": 1})
    islands = {i["island"]: (i["finished"], i["failed"]) for i in found["islands"]}
    assert islands == {"main": (2, 1), "b": (1, 1)}


def test_watching_ends_with_the_search(run, capsys):
    search = begin(run)
    evaluate(search, 6)
    search.end("finished")
    assert "6 of 6 evaluations (100 %)" in said(capsys, "status", run, "--watch")


def test_status_of_a_journal_alone(run, capsys):
    evaluate(begin(run), 2)
    page = said(capsys, "status", run / "search" / "journal.jsonl")
    assert "2 evaluations" in page


@pytest.mark.parametrize("command", ["status", "top", "stop", "export"])
def test_where_no_search_is_the_answer_says_what_to_do(run, command):
    with pytest.raises(RunError, match=r"no search here .*dmi search RECIPE"):
        dmi(command, run)


def test_top_shows_the_best_first(run, capsys):
    search = begin(run)
    evaluate(search, 3)
    evaluate(search, 1, Success(0.5))
    evaluate(search, 1, Failure("nan"))
    lines = said(capsys, "top", run, "-n", "2").splitlines()
    assert lines[1].split()[:3] == ["3", "0.5", "0.5"]
    assert "dense " in lines[1] and "learning_rate=" in lines[1]
    assert len(lines) == 3


def test_a_genome_in_a_line():
    genome = {
        "conv": [],
        "readout": None,
        "dense": [{"units": 16, "norm": None}, {"units": 8, "norm": "batch"}],
        "hyper": {"batch_size": 20, "learning_rate": 0.012345},
    }
    assert brief(genome) == "dense 16-8, batch_size=20 learning_rate=0.0123"


def test_a_stop_is_obeyed_by_those_that_run_and_forgotten_by_the_next(run, capsys):
    first, second = begin(run), begin(run, "b")
    proposal = first.next_proposal()
    assert "2 searches asked to stop; what runs ends first" in said(capsys, "stop", run)
    assert first.next_proposal() is None
    assert not first.done  # one is running
    first.finished(proposal.id, TrialOutcome(Success(1.0), 0.5, {}))
    assert first.done and not first.stopped_now
    assert second.next_proposal() is None and second.done
    first.end("stopped")
    again = begin(run)
    assert again.next_proposal() is not None
    dmi("stop", run, "--now")
    again.attend()
    assert again.stopped_now


def test_a_search_that_has_ended_is_not_stopped(run):
    search = begin(run)
    evaluate(search, 6)
    search.end("finished")
    with pytest.raises(RunError, match="no search runs here"):
        dmi("stop", run)
    assert read_control(run / "search").stop == ""


def test_a_running_search_takes_up_a_larger_budget(run, capsys):
    search = begin(run)
    evaluate(search, 6)
    assert search.done
    told = said(capsys, "extend", run, "--evaluations", 8)
    assert "6 -> 8 evaluations, 6 are done; it is taken up at once" in told
    assert search.next_proposal() is not None
    assert search.progress.budget == 8
    again = begin(run)
    assert again.progress.budget == 8
    assert "1 of 8" not in said(capsys, "status", run)
    with pytest.raises(RunError, match="its budget is 8"):
        dmi("extend", run, "--evaluations", 8)
    extended = [event for event in again.journal.events() if event["event"] == "extend"]
    assert [event["evaluations"] for event in extended] == [8]


def test_stop_and_budget_do_not_overwrite_each_other(tmp_path):
    raise_budget(tmp_path, 7)
    request_stop(tmp_path, "now")
    assert (read_control(tmp_path).evaluations, read_control(tmp_path).how) == (7, "now")
    raise_budget(tmp_path, 9)
    assert read_control(tmp_path).stop
    (tmp_path / "control.json").write_text('{"stopp": 1}')
    with pytest.raises(RunError, match=r"control\.json: damaged"):
        read_control(tmp_path)


def test_a_budget_that_is_reached_writes_the_winner_without_any_worker(run, capsys):
    evaluate(begin(run), 6)
    told = said(capsys, run, "--resume")
    assert "6 evaluations (0 failed)" in told
    assert (run / "search" / "winner.json").exists()


def test_a_recipe_is_searched_without_naming_the_command(tmp_path, recipe_file, run):
    with pytest.raises(RecipeError, match="no such recipe"):
        dmi(tmp_path / "none.toml")
    begin(run)
    for arguments in ((recipe_file, "--out", run), ("run", recipe_file, "--out", run), (run,)):
        with pytest.raises(RunError, match="--resume continues it"):
            dmi(*arguments)
    with pytest.raises(RunError, match="leave --out away"):
        dmi(run, "--out", tmp_path / "other")
    with pytest.raises(RunError, match="--from is for the beginning"):
        dmi(run, "--resume", "--from", run)
    with pytest.raises(RunError, match="expected a name"):
        dmi(recipe_file, "--island", "a/b")


def test_a_merged_search_has_everything_once_and_goes_on(tmp_path, recipe_file, run, capsys):
    recipe = load_recipe(recipe_file)
    other = open_run(tmp_path / "other", recipe.model_copy(update={"seed": 9})).folder
    first, second, island = begin(run), begin(other), begin(run, "b")
    evaluate(first, 3)
    evaluate(second, 6)
    evaluate(island, 3)
    told = said(capsys, "merge", run, other, "--out", tmp_path / "merged")
    assert "10 evaluations, 2 duplicates left out" in told  # the founder, of three
    assert "merged " in said(capsys, "status", tmp_path / "merged")
    found = evaluations(tmp_path / "merged")
    assert sorted(e.id for e in found) == list(range(10))
    sources = {e.hash for place in (run, other) for e in evaluations(place)}
    assert {e.hash for e in found} == sources
    assert all(parent < e.id for e in found for parent in e.parents)
    bred = [e for e in evaluations(other) if len(e.parents) == 2]
    names = {e.hash: e.id for e in found}
    ids = {e.id: e.hash for e in evaluations(other)}
    for child in bred:
        merged = next(e for e in found if e.hash == child.hash)
        assert set(merged.parents) == {names[ids[parent]] for parent in child.parents}
    dmi("extend", tmp_path / "merged", "--evaluations", 12)
    again = begin(tmp_path / "merged")
    assert again.progress.finished == 10
    evaluate(again, 2)
    assert again.done
    assert again.evolution.best()[1] == min(e.fitness for e in evaluations(tmp_path / "merged"))


def test_a_success_is_kept_rather_than_the_same_networks_failure(tmp_path, recipe_file, run):
    other = open_run(tmp_path / "other", load_recipe(recipe_file)).folder
    evaluate(begin(run), 1, Failure("timeout"))
    evaluate(begin(other), 1, Success(0.5))
    dmi("merge", run, other, "--out", tmp_path / "merged")
    assert [e.fitness for e in evaluations(tmp_path / "merged")] == [0.5]


def test_searches_that_cannot_be_compared_are_not_merged(tmp_path, data, run):
    evaluate(begin(run), 2)
    longer = toy_recipe(tmp_path / "longer.toml", data, train="epochs = 6\nloss = 'mae'")
    other = open_run(tmp_path / "other", load_recipe(longer)).folder
    evaluate(begin(other), 2)
    with pytest.raises(RunError, match=r"cannot be compared: train.loss is mse and mae"):
        dmi("merge", run, other, "--out", tmp_path / "merged")
    with pytest.raises(RunError, match="holds a run already"):
        dmi("merge", run, "--out", other)
    assert not (tmp_path / "merged").exists()


def test_the_exported_recipe_trains_the_winner(run, tmp_path, capsys):
    search = begin(run)
    evaluate(search, 5)
    evaluate(search, 1, Success(0.5))
    told = said(capsys, "export", run, "--out", tmp_path / "winner.toml")
    assert "network 5, validation error 0.5" in told
    recipe = load_recipe(tmp_path / "winner.toml")
    winner = json.loads(search.write_winner().read_text())
    published = make_task(recipe.task).published_network()
    network, changes = network_to_train(open_run(tmp_path / "trained", recipe), published)
    assert network == NetworkSpec.model_validate(winner["network"])
    assert changes == {}
    for name, value in winner["hyper"].items():
        assert getattr(recipe.train, name) == value
    assert recipe.name == "toy-5"  # its run folder is not that of the search
    assert said(capsys, "export", run, "--network", "5") == (tmp_path / "winner.toml").read_text()
    with pytest.raises(RunError, match="exists already"):
        dmi("export", run, "--out", tmp_path / "winner.toml")
    with pytest.raises(RunError, match="no successful evaluation of that name"):
        dmi("export", run, "--network", "b:7")


def test_a_new_search_begins_with_the_best_of_earlier_ones(tmp_path, run, data):
    search = begin(run)
    evaluate(search, 6)
    best = sorted(evaluations(run), key=lambda e: e.fitness)[:2]
    space = make_task({"name": "toy_task:Toy"}).space()
    defaults = founder_defaults(space, open_run(run).recipe.train)
    # another task: other inputs, one more hyper-parameter, smaller networks
    network = space.network.model_copy(update={"input_shape": (5,), "dense_blocks": (1, 2)})
    other = space.model_copy(update={"network": network, "founders": ()})
    founders = founders_from([run], other, defaults, count=2)
    assert [founder.source["id"] for founder in founders] == [str(e.id) for e in best]
    recipe = load_recipe(toy_recipe(tmp_path / "new.toml", data, seed=8))
    start = Start(founders=founders)
    for _ in range(2):  # begun, and continued without its founders named again
        search = Driver(recipe, other, tmp_path / "search", start=start)
        search.start(1, 1.0)
        proposals = [search.next_proposal() for _ in range(3)]
        assert [p.origin for p in proposals] == ["founder", "founder", "random"]
        assert [p.genome for p in proposals[:2]] == [founder.genome for founder in founders]
        start = Start()
    asks = [event for event in search.journal.events() if event["event"] == "ask"]
    assert asks[0]["source"]["run"] == str(run)


def test_nothing_to_begin_with_is_said(tmp_path, run):
    space = make_task({"name": "toy_task:Toy"}).space()
    with pytest.raises(RunError, match="no search here"):
        founders_from([run], space, {})
    evaluate(begin(run), 2, Failure("nan"))
    with pytest.raises(RunError, match="no evaluation there has succeeded"):
        founders_from([run], space, {})


def test_the_data_is_wanted_before_anything_is_written(tmp_path):
    recipe = toy_recipe(tmp_path / "toy.toml")
    with pytest.raises(DataError, match="dmi data build"):
        dmi(recipe, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "search").exists()


def test_all_errors_are_the_users_own(run):
    (run / "search").mkdir()
    (run / "search" / "journal.jsonl").write_text("nonsense\n")
    for command in ("status", "top", "export"):
        with pytest.raises(DMIError, match="not the header"):
            dmi(command, run)


def test_a_journal_of_another_space_tells_of_the_way_out(run):
    evaluate(begin(run), 2)
    opened = open_run(run)
    space = make_task(opened.recipe.task).space()
    network = space.network.model_copy(update={"dense_blocks": (1, 4)})
    larger = space.model_copy(update={"network": network})
    with pytest.raises(RunError, match="--larger-space"):
        Driver(opened.recipe, larger, opened.search)
    search = Driver(opened.recipe, larger, opened.search, start=Start(larger_space=True))
    assert search.progress.finished == 2
    journal = Journal.open(search.journal.path)
    fresh = type(search.evolution)(search.evolution.space, search.evolution.config)
    assert replay(journal, fresh) == []
