"""One evaluation in this process: its fitness, or the kind of its failure."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from runner import toy_data, toy_recipe
from safetensors.torch import load_file, save_file

from dmi_hpc.config import load_recipe
from dmi_hpc.deadline import End
from dmi_hpc.tasks import make_task
from search.evolution.evolve import Failure, Success
from search.records.kept import Kept, Origin
from search.setting import founder_defaults
from search.spaces.genome import DenseGene, founder_genome, to_json
from search.trials.ending import Assignment, Goal
from search.trials.trial import Evaluator, Left


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

    monkeypatch.setattr("search.trials.trial.fit", broken)
    monkeypatch.setattr("torch.cuda.synchronize", (lambda device: None) if answers else broken)
    recipe = load_recipe(toy_recipe(tmp_path / "toy.toml", data))
    space = make_task(recipe.task).space()
    genome = founder_genome(space.founders[0], space, founder_defaults(space, recipe.train))
    evaluator = Evaluator(recipe, data, torch.device("cuda", 0), memory_GB=1.0)
    assert evaluator(to_json(genome)).told.kind == kind
    assert evaluator.spent is not answers


def test_a_shard_that_is_lost_under_a_trial_is_a_failure_of_the_data(data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "copy")
    for shard in copy.glob("*.h5"):
        shard.write_bytes(shard.read_bytes()[:100])
    recipe = load_recipe(toy_recipe(tmp_path / "toy.toml", copy))
    space = make_task(recipe.task).space()
    genome = founder_genome(space.founders[0], space, founder_defaults(space, recipe.train))
    told = Evaluator(recipe, copy, torch.device("cpu"), memory_GB=1.0)(to_json(genome)).told
    assert told.kind == "data"
    assert ".h5" in told.message
    assert "Traceback" in told.traceback


def keeping(data, folder, epochs=6, train=""):
    """An evaluator that keeps what its trials need, and the genome of the founder."""
    path = toy_recipe(folder / "toy.toml", data, train=f"epochs = 6\n{train}")
    path.write_text(path.read_text().replace("\nepochs = 2\n", f"\nepochs = {epochs}\n"))
    recipe = load_recipe(path)
    space = make_task(recipe.task).space()
    genome = founder_genome(space.founders[0], space, founder_defaults(space, recipe.train))
    kept = Kept(folder / "search")
    return Evaluator(recipe, data, torch.device("cpu"), 1.0, kept), kept, genome


@pytest.mark.parametrize("lasting", [False, True])
def test_a_trial_that_the_end_of_the_time_interrupts_goes_on_exactly(data, tmp_path, lasting):
    evaluator, kept, genome = keeping(data, tmp_path)
    whole = evaluator(to_json(genome), Assignment(1, lasting=lasting))
    now = End(time.time(), "the test")
    left = evaluator(to_json(genome), Assignment(2, lasting=lasting, end=now))
    assert isinstance(left, Left)
    assert len(list(kept.checkpoints(2).glob("step-*"))) == 1
    went_on = evaluator(to_json(genome), Assignment(2, lasting=lasting))
    assert went_on.told == whole.told
    assert list(kept.checkpoints(1).glob("step-*")) == [] or lasting  # short ones save nothing


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle", "plateau"])
def test_a_trial_that_paused_goes_on_as_if_it_had_not(data, tmp_path, schedule):
    train = f'schedule = "{schedule}"'
    straight, kept, genome = keeping(data, tmp_path, train=train)
    whole = straight(to_json(genome), Assignment(1))
    for epochs in (1, 3, 6):
        # each time another worker
        evaluator, *_ = keeping(data, tmp_path, train=train)
        paused = evaluator(to_json(genome), Assignment(2, Goal(epochs)))
        assert paused.metrics["epochs"] == epochs
    assert paused.told == whole.told
    first, second = kept.weights(1), kept.weights(2)
    assert first.weights.keys() == second.weights.keys()
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    assert len(list(kept.checkpoints(2).iterdir())) <= 2  # the newest and the best


def test_in_one_go_or_kept_the_fitness_is_the_same(data, tmp_path):
    evaluator, _, genome = keeping(data, tmp_path)
    plain, kept = evaluator(to_json(genome)), evaluator(to_json(genome), Assignment(1))
    assert plain.told == kept.told
    assert kept.metrics["lineage_epochs"] == kept.metrics["epochs"] == 6


@pytest.mark.parametrize(
    ("goal", "epochs"),
    [(Goal(300, "samples"), 3), (Goal(1e-9, "seconds"), 1), (Goal(1e9, "seconds"), 6)],
)
def test_budgets_in_samples_and_seconds(data, tmp_path, goal, epochs):
    evaluator, *_, genome = keeping(data, tmp_path)
    metrics = evaluator(to_json(genome), Assignment(1, goal)).metrics
    assert metrics["epochs"] == epochs
    assert metrics["training_s"] > 0


def test_a_goal_that_was_reached_before_costs_nothing_more(data, tmp_path):
    evaluator, *_, genome = keeping(data, tmp_path)
    first = evaluator(to_json(genome), Assignment(1))
    again = evaluator(to_json(genome), Assignment(1))
    assert again.told == first.told
    assert again.metrics == first.metrics


def wider(genome):
    (gene,) = genome.dense
    return replace(genome, dense=(replace(gene, units=2 * gene.units),))


def test_a_child_begins_with_the_weights_of_its_parent(data, tmp_path):
    evaluator, kept, genome = keeping(data, tmp_path)
    parent = evaluator(to_json(genome), Assignment(1))
    child = to_json(wider(genome))
    anew = evaluator(child, Assignment(2, Goal(1)))
    inherits = evaluator(child, Assignment(3, Goal(1), parents=(7, 1)))
    assert inherits.told.fitness < anew.told.fitness
    assert inherits.metrics["inherited_from"] == 1
    assert inherits.metrics["inherited"] == 1.0
    assert inherits.metrics["lineage_epochs"] == parent.metrics["epochs"] + 1
    assert "inherited_from" not in anew.metrics
    assert kept.weights(7) is None


@pytest.mark.parametrize("parents", [(1, 2), (2, 1)])
def test_of_two_parents_the_one_whose_weights_err_less_is_taken(data, tmp_path, parents):
    evaluator, _, genome = keeping(data, tmp_path)
    evaluator(to_json(genome), Assignment(1, Goal(1)))
    evaluator(to_json(genome), Assignment(2))
    child = evaluator(to_json(wider(genome)), Assignment(3, Goal(1), parents))
    assert child.metrics["inherited_from"] == 2


def test_weights_that_are_worth_nothing_here_are_not_inherited(data, tmp_path):
    evaluator, _, genome = keeping(data, tmp_path)
    deeper = replace(wider(genome), dense=(DenseGene(4, "batch", "tanh", 0.0),) * 3)
    evaluator(to_json(genome), Assignment(1))
    child = evaluator(to_json(deeper), Assignment(2, parents=(1,)))
    assert child.told == evaluator(to_json(deeper), Assignment(3)).told
    assert "inherited_from" not in child.metrics
    assert child.metrics["epochs"] == child.metrics["lineage_epochs"] == 6


def test_a_child_that_inherits_is_trained_half_as_long_on_a_schedule_of_its_own(data, tmp_path):
    evaluator, _, genome = keeping(data, tmp_path)
    evaluator(to_json(genome), Assignment(1))
    paused = evaluator(to_json(wider(genome)), Assignment(2, Goal(4), parents=(1,)))
    ended = evaluator(to_json(wider(genome)), Assignment(2, parents=(1,)))
    straight = evaluator(to_json(wider(genome)), Assignment(2 + 1, parents=(1,)))
    assert (paused.metrics["epochs"], ended.metrics["epochs"]) == (2, 3)
    assert ended.metrics["lineage_epochs"] == straight.metrics["lineage_epochs"] == 6 + 3


def test_weights_that_an_earlier_version_kept_are_passed_over(data, tmp_path):
    evaluator, kept, genome = keeping(data, tmp_path)
    evaluator(to_json(genome), Assignment(1))
    (path,) = tmp_path.rglob("1.safetensors")
    about = {"network": kept.weights(1).network.model_dump_json(), "epochs": "6.0"}
    save_file(load_file(path), path, metadata=about)
    child = evaluator(to_json(wider(genome)), Assignment(2, parents=(1,)))
    assert "inherited_from" not in child.metrics


def test_a_trial_that_goes_on_does_not_inherit_again(data, tmp_path):
    evaluator, kept, genome = keeping(data, tmp_path)
    evaluator(to_json(genome), Assignment(1, Goal(2)))
    evaluator(to_json(genome), Assignment(2, Goal(2), parents=(1,)))
    kept.prune({2}, {2})
    last = evaluator(to_json(genome), Assignment(2, Goal(6), parents=(1,)))
    assert last.metrics["inherited_from"] == 1
    assert last.metrics["lineage_epochs"] == 2 + 3


def test_what_is_kept_stays_bounded(data, tmp_path):
    evaluator, kept, genome = keeping(data, tmp_path)
    for number in range(4):
        evaluator(to_json(genome), Assignment(number, Goal(1)))
    kept.prune(trials={1, 2}, parents={3})
    assert sorted(path.name for path in (tmp_path / "search" / "trials").iterdir()) == ["1", "2"]
    assert [kept.weights(number) is not None for number in range(4)] == [False] * 3 + [True]
    # its checkpoint is gone: it begins anew, and comes as far
    assert evaluator(to_json(genome), Assignment(0, Goal(2))).metrics["epochs"] == 2


@pytest.mark.parametrize("name", ["weights", "origin"])
def test_what_is_damaged_is_named(data, tmp_path, name):
    evaluator, _, genome = keeping(data, tmp_path)
    evaluator(to_json(genome), Assignment(1, Goal(1)))
    (path,) = (tmp_path / "search").rglob("1.safetensors" if name == "weights" else "origin.json")
    path.write_bytes(b"{")
    number, parents = (2, (1,)) if name == "weights" else (1, ())
    told = evaluator(to_json(genome), Assignment(number, Goal(2), parents)).told
    assert told.kind == "exception"
    assert str(path) in told.message
    assert "Remove the" in told.message


def test_an_origin_is_read_as_it_was_saved(tmp_path):
    origin = Origin(parent=3, share=0.25, epochs=12.0, seconds=1.5)
    Kept(tmp_path).save_origin(4, origin)
    assert Kept(tmp_path).origin(4) == origin


HANGS = """
import time
from search.trials import trial
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
