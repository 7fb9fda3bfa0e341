"""Searches over four nodes: all of them work, one may be lost; islands learn of each other."""

import re
from collections import Counter

import pytest
from cluster_runs import assert_each_told_once, follow, journal, noting_recipe, told, wait_until

from dmi_hpc.sessions import sessions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_every_node_works_and_one_may_be_lost(user, tmp_path):
    run = tmp_path / "run"
    user.launch("-N", 4, "-t", 5, "search", noting_recipe(tmp_path, 40), "--out", run)
    wait_until(user.slurm, run, lambda: len(journal(run, "tell")) >= 12)
    user.slurm.node(3).crash()
    follow(user.slurm, run)
    assert [s.how for s in sessions(run)] == ["finished"], told(user.slurm, run)
    assert_each_told_once(run, 40)
    seen = {path.name.partition(".")[0] for path in (tmp_path / "seen").iterdir()}
    assert seen == {"node1", "node2", "node3", "node4"}
    said = user.dmi("search", "status", run).stdout
    assert re.search(r"workers .*\d+ % busy", said), said


def test_islands_of_an_array_exchange_migrants(user, tmp_path):
    run = tmp_path / "run"
    words = ("-N", 2, "-t", 5, "--islands", 2, "search")
    user.launch(*words, noting_recipe(tmp_path, 30), "--out", run)
    wait_until(user.slurm, run, lambda: bool(journal(run, "tell", "island-1")))
    follow(user.slurm, run)
    found = {s.island: s.how for s in sessions(run)}
    assert found == {"island-0": "finished", "island-1": "finished"}, told(user.slurm, run)
    tells = [journal(run, "tell", island) for island in found]
    assert all(tells)
    assert len(tells[0]) + len(tells[1]) >= 30
    asks = [ask for island in found for ask in journal(run, "ask", island)]
    hashes = Counter(ask["hash"] for ask in asks)
    assert max(hashes.values()) <= 2  # both may have begun it before either could know
    assert any(journal(run, "migrant", island) for island in found)
