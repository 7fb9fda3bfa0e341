"""`GeneticSearch` in a user's own script: a Tuner with ASHA, killed and restored; foreign clusters."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runner import (
    LIMIT_S,
    assert_gone,
    dmi,
    ended,
    environment,
    family,
    start,
    toy_data,
    toy_recipe,
    wait_for,
)

from dmi_hpc.files import read_json_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]

EXAMPLE = ROOT / "docs" / "examples" / "genetic_search.py"
EPOCHS = "    for epoch in range(1, 10):\n"


def script(folder, pause_s=0.0):
    """Start the documentation's script; pause_s: of an epoch."""
    path, text = folder / "user.py", EXAMPLE.read_text()
    assert EPOCHS in text
    path.write_text(text.replace(EPOCHS, f"{EPOCHS}        __import__('time').sleep({pause_s})\n"))
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "TUNE_GLOBAL_CHECKPOINT_S": "1"}
    return subprocess.Popen(
        [sys.executable, str(path), str(folder)],
        cwd=folder,
        env=environment(**quiet, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def best_of(process):
    """The best error, as the script says."""
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, f"{out}\n{err}"
    return float(re.search(r"best error ([\d.]+) with \{'lr': .*'units': \d+, 'depth': 3", out)[1])


def events(folder, kind):
    path = folder / "journal.jsonl"
    return [e for e in read_json_lines(path) if e["event"] == kind] if path.exists() else []


def test_a_tuner_with_asha(tmp_path):
    best = best_of(script(tmp_path))
    tells = events(tmp_path, "tell")
    assert len({tell["id"] for tell in tells}) == len(tells) == 24
    epochs = {tell["metrics"]["iterations"][-1] for tell in tells}
    assert 9 in epochs
    assert epochs & {1, 3}, "ASHA stopped none"
    whole = [tell for tell in tells if tell["metrics"]["iterations"][-1] == 9]
    ordered = sorted(whole, key=lambda tell: tell["metrics"]["scores"][-1])
    assert [t["fitness"] for t in ordered] == sorted(t["fitness"] for t in whole)
    assert ordered[0]["metrics"]["scores"][-1] == pytest.approx(best, abs=1e-4)


def test_a_killed_tuner_is_restored_and_repeats_nothing_that_had_finished(tmp_path):
    process = script(tmp_path, pause_s=0.1)
    wait_for(lambda: len(events(tmp_path, "tell")) >= 6, process)
    helpers = family(process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=LIMIT_S)
    kept = {tell["id"]: tell for tell in events(tmp_path, "tell")}
    best_of(script(tmp_path))
    asks, tells = events(tmp_path, "ask"), events(tmp_path, "tell")
    assert len({tell["id"] for tell in tells}) == len(tells)
    assert kept.items() <= {tell["id"]: tell for tell in tells}.items()
    assert len({ask["hash"] for ask in asks}) == len(asks)
    assert len(tells) >= 24
    assert_gone(helpers, limit_s=100)


FOREIGN = """
import sys, time
import ray

ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR")


@ray.remote
class Counter:
    n = 0

    def next(self):
        self.n += 1
        return self.n


counter = Counter.remote()
while True:
    print(ray.get(counter.next.remote(), timeout=60), len(ray.nodes()), flush=True)
    time.sleep(0.05)
"""


def test_two_searches_beside_a_foreign_cluster_do_not_disturb_each_other(tmp_path):
    data = toy_data(tmp_path / "data")
    recipe = toy_recipe(
        tmp_path / "toy.toml", data, search="workers = 1\ninitial = 3\nevaluations = 5"
    )
    log = tmp_path / "foreign.log"
    with log.open("w") as out:
        foreign = subprocess.Popen(
            [sys.executable, "-c", FOREIGN],
            env=environment(RAY_USAGE_STATS_ENABLED="0"),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_for(lambda: len(log.read_text().splitlines()) > 3, foreign)
        searches = [
            start("search", recipe, "--out", tmp_path / name, cwd=tmp_path) for name in "ab"
        ]
        for process in searches:
            ended(process, 0)
        before = len(log.read_text().splitlines())
        wait_for(lambda: len(log.read_text().splitlines()) > before + 3, foreign)
        lines = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
        assert lines == [(number, 1) for number in range(1, len(lines) + 1)]
    finally:
        helpers = family(foreign) if foreign.poll() is None else []
        foreign.terminate()
        foreign.wait(timeout=60)
        assert_gone(helpers, limit_s=100)
    journals = [read_json_lines(tmp_path / name / "search" / "journal.jsonl") for name in "ab"]
    asked, other = ([e["hash"] for e in j if e["event"] == "ask"] for j in journals)
    assert asked == other  # one worker, one seed: neither took the other's trials
    assert [sum(e["event"] == "tell" for e in j) for j in journals] == [5, 5]
    dmi("search", recipe, "--out", tmp_path / "a", "--resume", cwd=tmp_path)
