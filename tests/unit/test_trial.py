"""One evaluation in this process: its fitness, or the kind of its failure."""

import subprocess
import sys

import pytest
import torch
from runner import toy_data, toy_recipe

from dmi_hpc.config import load_recipe
from dmi_hpc.tasks import make_task
from search.driver import founder_defaults
from search.evolve import Failure, Success
from search.genome import founder_genome, to_json
from search.trial import Evaluator


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


def evaluate(data, folder, task="", search="evaluations = 1", memory_GB=1.0):
    recipe = load_recipe(toy_recipe(folder / "toy.toml", data, task, search=search))
    space = make_task(recipe.task).space()
    genome = founder_genome(space.founders[0], space, founder_defaults(space, recipe.train))
    return Evaluator(recipe, data, torch.device("cpu"), memory_GB)(to_json(genome))


def test_the_same_genome_has_the_same_fitness(data, tmp_path):
    first, second = evaluate(data, tmp_path), evaluate(data, tmp_path)
    assert isinstance(first.told, Success)
    assert first.told == second.told
    assert first.metrics["parameters"] == 8 * 16 + 16 + 16 + 1
    assert first.metrics["epochs"] == 2


@pytest.mark.parametrize(
    ("task", "search", "kind", "said"),
    [
        ('fault = "exception"', "", "exception", "ZeroDivisionError: the user's own bug"),
        ('fault = "nan"', "", "nan", "not finite at epoch 0 step 0"),
        ('fault = "slow"', "trial_time_limit_s = 0.02", "timeout", "not finished after 0.02 s"),
    ],
)
def test_whatever_goes_wrong_is_a_typed_outcome(data, tmp_path, task, search, kind, said):
    outcome = evaluate(data, tmp_path, task, search)
    assert isinstance(outcome.told, Failure)
    assert outcome.told.kind == kind
    assert said in outcome.told.message
    assert ("toy_task.py" in outcome.told.traceback) == (kind == "exception")


def test_a_network_over_the_memory_limit_is_not_started(data, tmp_path):
    told = evaluate(data, tmp_path, memory_GB=1e-9).told
    assert told.kind == "memory"
    assert "161 parameters and batch 20" in told.message


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("CUDA error: out of memory", "memory"),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", "memory"),
        ("CUDA error: an illegal memory access was encountered", "exception"),
    ],
)
@pytest.mark.parametrize("answers", [True, False])
def test_a_device_that_no_longer_answers_spends_its_worker(
    data, tmp_path, monkeypatch, said, kind, answers
):
    def broken(*arguments, **options):
        raise RuntimeError(said)

    monkeypatch.setattr("search.trial.fit", broken)
    monkeypatch.setattr("torch.cuda.synchronize", (lambda device: None) if answers else broken)
    recipe = load_recipe(toy_recipe(tmp_path / "toy.toml", data))
    space = make_task(recipe.task).space()
    genome = founder_genome(space.founders[0], space, founder_defaults(space, recipe.train))
    evaluator = Evaluator(recipe, data, torch.device("cuda", 0), memory_GB=1.0)
    assert evaluator(to_json(genome)).told.kind == kind
    assert evaluator.spent is not answers


HANGS = """
import time
from search import trial
trial.GRACE_S = 0.1
with trial.watchdog(0.05):
    pass
time.sleep(0.3)  # disarmed
print("alive", flush=True)
with trial.watchdog(0.05):
    time.sleep(60)
"""


def test_a_worker_that_hangs_is_ended():
    done = subprocess.run(
        [sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=50, check=False
    )
    assert (done.returncode, done.stdout) == (1, "alive\n")
    assert "Timeout" in done.stderr
