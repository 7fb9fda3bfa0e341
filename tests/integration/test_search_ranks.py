"""Trials of several ranks: two at once, each of two DeepSpeed ranks in one placement group."""

import subprocess
import sys
from itertools import pairwise

import pytest
from runner import SUPPORT, environment, toy_data, toy_recipe

from dmi_hpc.files import read_json_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TASK = """
import os
import torch.distributed as dist
from toy_task import Toy


class Uneven(Toy):
    def inputs(self, fields):
        second = dist.is_initialized() and dist.get_rank() == 1
        if second and len(fields["x"]) == 4:
            raise ZeroDivisionError("on one rank alone")
        if second and len(fields["x"]) == 8:
            os._exit(3)
        return super().inputs(fields)

    def space(self):
        space = super().space()
        founders = [
            space.founders[0].model_copy(update={"name": str(n), "hyper": {"batch_size": n}})
            for n in (8, 16, 32)
        ]
        return space.model_copy(update={"founders": tuple(founders)})
"""

SCRIPT = """
import sys
from pathlib import Path

from dmi_hpc.config import load_recipe
from dmi_hpc.tasks import make_task
from search.cluster.capacity import Shape
from search.driver import Driver
from search.cluster.environment import ray_environment, with_absolute_import_paths

recipe, data, home = load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
driver = Driver(recipe, make_task(recipe.task).space(), home)
with_absolute_import_paths()
with ray_environment() as folder:
    from search.cluster.tune import TrialContext, cluster, run_trials

    with cluster(recipe.search, folder, Shape(ranks=2)) as found:
        assert found.workers == 2, found
        driver.start(found.workers, found.trial_memory_GB)
        kept = driver.folder
        context = TrialContext(recipe, data, folder, found.trial_memory_GB, ranks=2, kept=kept)
        run_trials(driver, context, found, lambda: None, lambda: False)
"""


def searched(folder, task, engine, evaluations, more=""):
    """Events of a search with trials of two ranks. more: keys of [search]."""
    data, home = toy_data(folder / "data"), folder / "search"
    home.mkdir()
    text = f"workers = 2\nevaluations = {evaluations}\ninitial = {evaluations}\n{more}"
    train = f'epochs = 6\nengine = "{engine}"'
    recipe = toy_recipe(folder / "toy.toml", data, train=train, search=text, seed=6)
    recipe.write_text(recipe.read_text().replace("toy_task:Toy", task))
    (folder / "uneven.py").write_text(TASK)
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, str(recipe), str(data), str(home)],
        env=environment(PYTHONPATH=f"{folder}:{SUPPORT}"),
        capture_output=True,
        text=True,
        timeout=350,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return read_json_lines(home / "journal.jsonl")


def by_number(events):
    """{id: (batch size, tell)}."""
    sizes = {e["id"]: e["genome"]["hyper"]["batch_size"] for e in events if e["event"] == "ask"}
    return {e["id"]: (sizes[e["id"]], e) for e in events if e["event"] == "tell"}


def test_two_trials_at_once_of_two_deepspeed_ranks(tmp_path):
    found = by_number(searched(tmp_path, "toy_task:Toy", "deepspeed", 6))
    tells = [tell for _, tell in found.values()]
    assert [tell["status"] for tell in tells] == ["ok"] * 6
    assert all(tell["metrics"]["ranks"] == 2 for tell in tells)
    spans = sorted((tell["time"] - tell["seconds"], tell["time"]) for tell in tells)
    overlaps = [later[0] < sooner[1] for sooner, later in pairwise(spans)]
    assert any(overlaps)


def test_a_rank_that_fails_alone_does_not_hang_the_others(tmp_path):
    found = by_number(searched(tmp_path, "uneven:Uneven", "torch", 3))
    # batches of 4 and 8 rows a rank, and 16
    told = {size: tell.get("failure") for size, tell in found.values()}
    assert told == {8: "exception", 16: "lost", 32: None}
    message = next(tell["message"] for size, tell in found.values() if size == 8)
    assert "on one rank alone" in message


def test_trials_of_two_ranks_pause_go_on_and_have_several_objectives(tmp_path):
    more = 'least_epochs = 1\nreduction = 2\nobjectives = ["error", "flops"]'
    events = searched(tmp_path, "toy_task:Toy", "deepspeed", 6, more + "\nextrapolate = true")
    told = [e for e in events if e["event"] == "tell"]
    assert [e["status"] for e in told] == ["ok"] * len(told)
    epochs = {0: 1, 1: 2}
    assert {e["metrics"]["rung"] for e in told} == set(epochs)
    assert all(e["metrics"]["epochs"] == epochs[e["metrics"]["rung"]] for e in told)
    assert all(len(e["metrics"]["curve"]) == e["metrics"]["epochs"] for e in told)
    assert all(e["metrics"]["ranks"] == 2 for e in told)
    assert all(e["others"] == [e["metrics"]["flops"]] for e in told)
    errors = {}
    for e in told:  # one and the same training goes on: its best model stays
        assert e["fitness"] <= errors.get(e["id"], e["fitness"])
        errors[e["id"]] = e["fitness"]
    assert len([e for e in told if e["metrics"]["rung"] == 0]) == 6
