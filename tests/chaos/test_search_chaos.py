"""One trial in five fails in some way, and processes of Ray and the search are killed at random."""

import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from runner import SUPPORT, TOY, dmi, members, start, toy_data

from dmi_hpc.files import read_json_lines

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]  # on a busy machine; 2 minutes on a free one

HERE = Path(__file__).parent
EVALUATIONS = 30
KILLS = ("slot", "driver", "raylet", "slot", "driver", "slot")
CAUSES = {11: "exception", 12: "memory", 13: "timeout", 14: "lost", 15: "nan", 16: "exception"}
SEARCH = f"""workers = 3
evaluations = {EVALUATIONS}
initial = {EVALUATIONS}
surrogate = false
trial_time_limit_s = 20"""


def events(run, kind):
    path = run / "search" / "journal.jsonl"
    return [e for e in read_json_lines(path) if e["event"] == kind] if path.exists() else []


def told(run):
    """{id: (status, fitness)}; no evaluation stands there twice."""
    tells = events(run, "tell")
    assert len({tell["id"] for tell in tells}) == len(tells)
    return {tell["id"]: (tell["status"], tell.get("fitness")) for tell in tells}


def victims(process, kind):
    """Processes of a kind that a search has started, or itself."""
    if kind == "driver":
        return [psutil.Process(process.pid)]
    names = {"slot": "ray::Slot", "raylet": "raylet"}
    return members(process, lambda child: child.name().startswith(names[kind]))


def wait_until(condition, process, limit_s=120):
    """Until it holds (True), or the process ended."""
    end = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    assert process.poll() is not None, f"waited {limit_s} s in vain"
    return False


def session(recipe, run, kinds, pick, cwd):
    """Run the search, and kill something of it after some further results, until it ends."""
    path = f"{HERE}:{SUPPORT}"
    process = start("search", recipe, "--out", run, "--resume", cwd=cwd, PYTHONPATH=path)
    while kinds:
        before = len(told(run))
        if not wait_until(lambda b=before: len(told(run)) >= b + pick.randint(1, 2), process):
            break
        found = victims(process, kinds[0])
        if not found:
            continue
        try:
            pick.choice(found).send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:  # it has ended by itself
            continue
        kind = kinds.pop(0)
        if kind != "slot":
            break
    out, err = process.communicate(timeout=200)
    assert process.returncode in (0, 75, -signal.SIGKILL), f"{process.returncode}\n{out}\n{err}"
    return process.returncode


def test_nothing_finished_is_lost_or_repeated_and_the_search_completes(tmp_path):
    data, recipe, run = toy_data(tmp_path / "data"), tmp_path / "chaos.toml", tmp_path / "run"
    text = TOY.format(
        task="", data=f'path = "{data}"', train="epochs = 3", search=SEARCH, seed=4
    ).replace("toy_task:Toy", "chaos_task:Chaos")
    recipe.write_text(text)
    pick, kinds, kept, code = random.Random(5), list(KILLS), {}, None
    for _ in range(8):
        code = session(recipe, run, kinds, pick, tmp_path)
        now = told(run)
        assert kept.items() <= now.items()
        kept = now
        if code == 0:
            break
    assert code == 0
    assert len(kept) == EVALUATIONS
    sizes = {ask["id"]: ask["genome"]["hyper"]["batch_size"] for ask in events(run, "ask")}
    assert len(sizes) == EVALUATIONS
    failures = {tell["id"]: tell.get("failure") for tell in events(run, "tell")}
    assert set(CAUSES) <= set(sizes.values())
    for number, size in sizes.items():
        # a worker that was killed twice with the same trial counts as lost
        assert failures[number] in (CAUSES.get(size), "lost"), (number, size, failures[number])
    assert sum(kind is None for kind in failures.values()) >= EVALUATIONS // 2
    again = dmi(
        "search", recipe, "--out", run, "--resume", cwd=tmp_path, PYTHONPATH=f"{HERE}:{SUPPORT}"
    )
    assert f"{EVALUATIONS} evaluations" in again.stdout
    assert told(run) == kept
