"""The search on Ray by real processes: killed, signalled, and with user code that fails."""

import os
import random
import signal

import pytest
from runner import assert_gone, dmi, ended, family, start, toy_data, toy_recipe, wait_for

from dmi_hpc.files import read_json_lines
from search.driver import exclusive

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


def events(run, kind):
    return [e for e in read_json_lines(run / "search" / "journal.jsonl") if e["event"] == kind]


def evaluations(run):
    """{(id, hash, fitness)} of all tells; every proposal and every outcome stands there once."""
    asks, tells = events(run, "ask"), events(run, "tell")
    hashes = {ask["id"]: ask["hash"] for ask in asks}
    assert len(hashes) == len(asks) == len(set(hashes.values()))
    assert len({tell["id"] for tell in tells}) == len(tells)
    return {(tell["id"], hashes[tell["id"]], tell["fitness"]) for tell in tells}


def test_kill_and_signals_then_resume_end_with_the_same_evaluations(data, tmp_path):
    """kill -9 of the driver alone, then SIGTERM, then SIGINT, each after a random tell."""
    budget, pick = 14, random.Random(2)
    recipe = toy_recipe(
        tmp_path / "toy.toml", data, task='fault = "slow"', search=f"workers = 1\n#{budget}"
    )
    recipe.write_text(
        recipe.read_text()
        .replace("evaluations = 10", f"evaluations = {budget}", 1)
        .replace("workers = 2\n", "", 1)
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    dmi("search", recipe, "--out", whole, cwd=tmp_path)
    arguments = ("search", recipe, "--out", run)
    told, options = 0, ()
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process = start(*arguments, *options, cwd=tmp_path)
        until = told + pick.randint(1, 3)
        wait_for(lambda until=until: len(events(run, "tell")) >= until, process)
        helpers = family(process)
        os.kill(process.pid, number)
        if number == signal.SIGKILL:
            ended(process, -signal.SIGKILL)
            again = dmi(*arguments, cwd=tmp_path, code=2)
            assert "--resume continues it" in again.stderr
            with exclusive(run / "search"):
                second = dmi(*arguments, "--resume", cwd=tmp_path, code=2)
            assert "another search is running here" in second.stderr
        else:
            assert "--resume continues" in ended(process, 75)
        assert helpers
        assert_gone(helpers)
        kept, options = evaluations(run), ("--resume",)
        told = len(kept)
        assert until <= told < budget
        assert kept <= evaluations(whole)
    dmi(*arguments, "--resume", cwd=tmp_path)
    assert evaluations(run) == evaluations(whole)
    assert len(evaluations(run)) == budget
    winner = (run / "search" / "winner.json").read_text()
    assert winner == (whole / "search" / "winner.json").read_text()


def test_every_kind_of_failure_is_an_outcome_and_the_search_goes_on(data, tmp_path):
    recipe = toy_recipe(
        tmp_path / "toy.toml",
        data,
        task='faults = { 8 = "exception", 16 = "nan", 32 = "die", 64 = "stuck" }',
        search="trial_time_limit_s = 6\ntrial_memory_GB = 3e-4",
    )
    run = tmp_path / "run"
    done = dmi("search", recipe, "--out", run, cwd=tmp_path)
    tells = {tell["id"]: tell for tell in events(run, "tell")}
    sizes = {ask["id"]: ask["genome"]["hyper"]["batch_size"] for ask in events(run, "ask")}
    print([(sizes[k], t.get("failure"), t["seconds"]) for k, t in tells.items()])
    print(done.stdout, done.stderr)
    assert False
