"""The search on Ray by real processes: killed, signalled, and with user code that fails."""

import os
import random
import signal
import time
from contextlib import suppress

import psutil
import pytest
from runner import assert_gone, dmi, ended, family, members, start, toy_data, toy_recipe, wait_for

from dmi_hpc.files import read_json_lines

# batches of trials that are to be stopped between two of them, on a busy machine too
UNHURRIED = {"TOY_SLOW_S": "0.03"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # several searches in a row


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


def events(run, kind):
    return [e for e in read_json_lines(run / "search" / "journal.jsonl") if e["event"] == kind]


def is_named(name):
    return lambda process: process.name() == name


def evaluations(run):
    """{(id, hash, fitness)} of all tells; every proposal and every outcome stands there once."""
    asks, tells = events(run, "ask"), events(run, "tell")
    hashes = {ask["id"]: ask["hash"] for ask in asks}
    assert len(hashes) == len(asks) == len(set(hashes.values()))
    assert len({tell["id"] for tell in tells}) == len(tells)
    return {(tell["id"], hashes[tell["id"]], tell["fitness"]) for tell in tells}


def test_kill_and_signals_then_resume_end_with_the_same_evaluations(data, tmp_path):
    """kill -9 of the driver alone, then SIGTERM, then SIGINT, each after a random tell."""
    pick = random.Random(2)
    recipe = toy_recipe(
        tmp_path / "toy.toml",
        data,
        'fault = "slow"',
        search="workers = 1\ninitial = 5\nevaluations = 14",
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    dmi("search", recipe, "--out", whole, cwd=tmp_path)
    expected = evaluations(whole)
    assert len(expected) == 14
    kept: set[tuple[int, str, float]] = set()
    orphans = []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        options = ("--resume",) if kept else ()
        process = start("search", recipe, "--out", run, *options, cwd=tmp_path, **UNHURRIED)
        until = len(kept) + pick.randint(1, 3)
        wait_for(lambda until=until: len(events(run, "tell")) >= until, process)
        helpers = family(process)
        assert helpers
        os.kill(process.pid, number)
        if number == signal.SIGKILL:
            ended(process, -signal.SIGKILL)
            orphans = helpers  # Ray's agents call for their dead cluster for a minute
        else:
            assert "--resume continues" in ended(process, 75)
            assert_gone(helpers)
        before, kept = kept, evaluations(run)
        assert before < kept < expected
        assert len(kept) >= until
    dmi("search", recipe, "--out", run, "--resume", cwd=tmp_path)
    assert evaluations(run) == expected
    winner = (run / "search" / "winner.json").read_text()
    assert winner == (whole / "search" / "winner.json").read_text()
    assert_gone(orphans, limit_s=100)


def test_every_kind_of_failure_is_an_outcome_and_the_search_goes_on(data, tmp_path):
    """But the time limit, which tests/unit/test_trial.py has: here a busy machine would decide."""
    recipe = toy_recipe(
        tmp_path / "toy.toml",
        data,
        'faults = { 8 = "exception", 16 = "nan", 32 = "die" }',
        search="""workers = 2
evaluations = 9
initial = 9
trial_memory_GB = 3e-6""",
        seed=6,  # of the random networks: all kinds are among the first nine
    )
    run = tmp_path / "run"
    done = dmi("search", recipe, "--out", run, cwd=tmp_path)
    assert "9 evaluations (8 failed)" in done.stdout
    assert "Traceback" not in done.stderr
    sizes = {ask["id"]: ask["genome"]["hyper"]["batch_size"] for ask in events(run, "ask")}
    found = [(sizes[tell["id"]], tell.get("failure")) for tell in events(run, "tell")]
    kinds = {8: "exception", 16: "nan", 20: None, 32: "lost", 64: None}
    assert sum(kind == "memory" for _, kind in found) == 1
    assert all(kind in (kinds[size], "memory") for size, kind in found)
    assert {kind for _, kind in found} == {*kinds.values(), "memory"}
    traceback = next(t["traceback"] for t in events(run, "tell") if t.get("failure") == "exception")
    assert "toy_task.py" in traceback
    assert "ZeroDivisionError: the user's own bug" in traceback


def test_kill_at_any_moment_with_two_workers_repeats_nothing(data, tmp_path):
    """While Ray starts, right after an ask, and once more between two of them; then to the end."""
    recipe = toy_recipe(
        tmp_path / "toy.toml",
        data,
        'fault = "slow"',
        search="workers = 2\ninitial = 4\nevaluations = 8",
    )
    run, told = tmp_path / "run", set()
    for asks in (0, 2, 5):
        process = start("search", recipe, "--out", run, "--resume", cwd=tmp_path, **UNHURRIED)
        if asks:
            wait_for(lambda asks=asks: len(events(run, "ask")) >= asks, process)
        else:
            wait_for(lambda p=process: members(p, is_named("gcs_server")), process)
        os.kill(process.pid, signal.SIGKILL)
        ended(process, -signal.SIGKILL)
        before, told = told, evaluations(run)
        assert before <= told
    dmi("search", recipe, "--out", run, "--resume", cwd=tmp_path)
    assert told < evaluations(run)  # which asserts that nothing stands there twice
    assert len(events(run, "ask")) == len(events(run, "tell")) == 8


def two_long_trials(folder, data, search=""):
    """Recipe of a search of two trials, 40 epochs of three batches each, side by side."""
    text = f"workers = 2\ninitial = 2\nevaluations = 2\n{search}"
    recipe = toy_recipe(folder / "toy.toml", data, 'fault = "slow"', search=text)
    space = '[search.space.hyper]\nbatch_size = { kind = "choice", values = [64] }\n'
    recipe.write_text(recipe.read_text().replace("\nepochs = 2\n", "\nepochs = 40\n") + space)
    return recipe


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """Evaluations of the two long trials."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    recipe, run = two_long_trials(folder, data), folder / "run"
    dmi("search", recipe, "--out", run, cwd=folder, TOY_SLOW_S="0")
    return evaluations(run)


def saved_steps(run):
    """Optimizer steps of each trial at its last checkpoint."""
    trials = (run / "search" / "trials").glob("*/checkpoints")
    return [max((int(p.name[5:]) for p in t.glob("step-*")), default=0) for t in trials]


def assert_resumed(run, expected):
    """Both trials went on from a checkpoint, to where they come without an interruption."""
    assert evaluations(run) == expected
    assert all(tell["metrics"]["resumed_epochs"] >= 1 for tell in events(run, "tell"))
    assert not any((run / "search" / "trials").iterdir())


def test_trials_that_the_end_of_the_job_interrupts_go_on_in_the_next_one(
    data, uninterrupted, tmp_path
):
    recipe, run = two_long_trials(tmp_path, data), tmp_path / "run"
    end = str(int(time.time()) + 60)
    process = start(
        "search", recipe, "--out", run, cwd=tmp_path, TOY_SLOW_S="0.5", SLURM_JOB_END_TIME=end
    )
    ended(process, 75)
    assert time.time() < float(end)
    assert len(events(run, "ask")) == 2
    assert events(run, "tell") == []
    assert sum(steps > 0 for steps in saved_steps(run)) == 2
    dmi("search", run, "--resume", cwd=tmp_path, TOY_SLOW_S="0")
    assert_resumed(run, uninterrupted)


def test_trials_that_are_killed_go_on_from_their_last_checkpoint(data, uninterrupted, tmp_path):
    recipe = two_long_trials(tmp_path, data, "train = { checkpoint_s = 1.0 }")
    run = tmp_path / "run"
    process = start("search", recipe, "--out", run, cwd=tmp_path, TOY_SLOW_S="0.4")
    wait_for(lambda: sum(steps > 3 for steps in saved_steps(run)) == 2, process)
    orphans = family(process)
    process.kill()
    ended(process, -signal.SIGKILL)
    assert events(run, "tell") == []
    dmi("search", run, "--resume", cwd=tmp_path, TOY_SLOW_S="0")
    assert_resumed(run, uninterrupted)
    for orphan in orphans:  # Ray's agents would end by themselves within a minute
        with suppress(psutil.NoSuchProcess):
            orphan.kill()
    assert_gone(orphans)


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_the_death_of_ray_itself_is_no_failure_of_a_network(data, tmp_path, name):
    recipe = toy_recipe(
        tmp_path / "toy.toml", data, 'fault = "slow"', search="workers = 2\nevaluations = 300"
    )
    run = tmp_path / "run"
    process = start("search", recipe, "--out", run, cwd=tmp_path)
    wait_for(lambda: events(run, "tell"), process)
    members(process, is_named(name))[0].kill()
    assert "--resume continues" in ended(process, 75)
    assert all(tell["status"] == "ok" for tell in events(run, "tell"))


def test_code_that_hangs_costs_one_trial(data, tmp_path):
    recipe = toy_recipe(
        tmp_path / "toy.toml",
        data,
        'faults = { 20 = "hang" }',  # the founder's batches
        search="workers = 1\ninitial = 3\nevaluations = 3\ntrial_time_limit_s = 20",
    )
    run = tmp_path / "run"
    dmi("search", recipe, "--out", run, cwd=tmp_path)
    kinds = {tell["id"]: tell.get("failure") for tell in events(run, "tell")}
    assert kinds == {0: "timeout", 1: None, 2: None}
