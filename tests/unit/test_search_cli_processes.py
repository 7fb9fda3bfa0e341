"""A search that runs is watched and stopped by other processes."""

import json

import pytest
from runner import dmi, ended, start, toy_data, toy_recipe, wait_for

from dmi_hpc.files import read_json_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def events(run, kind):
    return [e for e in read_json_lines(run / "search" / "journal.jsonl") if e["event"] == kind]


def test_a_search_is_stopped_from_elsewhere_and_continued(tmp_path):
    data, run = toy_data(tmp_path / "data"), tmp_path / "run"
    recipe = toy_recipe(
        tmp_path / "toy.toml",
        data,
        'fault = "slow"',
        search="workers = 1\ninitial = 3\nevaluations = 1000",
    )
    searching = start("search", recipe, "--out", run, cwd=tmp_path)
    wait_for(lambda: len(events(run, "tell")) >= 2, searching)
    seen = json.loads(dmi("search", "status", run, "--json", cwd=tmp_path).stdout)
    assert seen["islands"][0]["state"] == "running"
    assert seen["finished"] >= 2
    assert "1 search asked to stop" in dmi("search", "stop", run, "--now", cwd=tmp_path).stdout
    ended(searching, 0)  # not 75: nobody is to requeue it
    assert [event["why"] for event in events(run, "end")] == ["stopped"]
    best = min(tell["fitness"] for tell in events(run, "tell"))
    assert json.loads((run / "search" / "winner.json").read_text())["fitness"] == best
    told = {tell["id"] for tell in events(run, "tell")}
    unfinished = {ask["id"] for ask in events(run, "ask")} - told
    assert len(unfinished) <= 1  # none if the stop was seen between two trials

    again = start("search", run, "--resume", cwd=tmp_path)
    wait_for(lambda: unfinished < {tell["id"] for tell in events(run, "tell")} - told, again)
    dmi("search", "stop", run, cwd=tmp_path)
    ended(again, 0)
    asks, tells = events(run, "ask"), events(run, "tell")
    assert len({tell["id"] for tell in tells}) == len(tells) == len(asks)  # it ended what ran
