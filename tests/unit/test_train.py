"""The trainer on the toy task, in this process, with the plain-torch engine."""

import errno
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dmi_hpc import checkpoint
from dmi_hpc.agreement import steps_between
from dmi_hpc.config import DataConfig, TrainConfig
from dmi_hpc.data.build import Alone
from dmi_hpc.data.loader import random_bits
from dmi_hpc.engine import TorchEngine
from dmi_hpc.errors import CheckpointError, DataError, Interrupted, RunError, TrialFailure
from dmi_hpc.models.build import build
from dmi_hpc.models.spec import Activation, Dense, Dropout, NetworkSpec, Norm
from dmi_hpc.problem import Problem
from dmi_hpc.schedule import learning_rate
from dmi_hpc.scores import score
from dmi_hpc.targets import TargetScale
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import BuildContext
from dmi_hpc.train import Job, _Training, fit
from dmi_hpc.world import World

CONFIG = TrainConfig(
    epochs=5, batch_size=20, learning_rate=1e-2, engine="torch", threads=1, patience=None
)
NETWORK = NetworkSpec(
    input_shape=(8,),
    layers=(Dense(units=16), Norm(), Activation(), Dropout(rate=0.1), Dense(units=8), Activation()),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    target = tmp_path_factory.mktemp("toy") / "data"
    context = BuildContext(DataConfig(rows_per_shard=64), 3, Alone(), 1, lambda rows: None)
    make_task({"name": "toy_task:Toy"}).build_data(target, context)
    return target


def problem_of(data, fault="none"):
    return Problem.open(make_task({"name": "toy_task:Toy", "fault": fault}), data)


class Watch:
    def __init__(self, stop_at=None):
        self.epochs, self.steps, self.stop_at = [], 0, stop_at

    def on_step(self, step):
        self.steps += 1

    def on_epoch(self, epoch):
        self.epochs.append(epoch)

    def on_event(self, event, values):
        pass

    def must_stop(self):
        return "the test" if self.stop_at is not None and self.steps >= self.stop_at else None


def job_of(data, folder=None, config=CONFIG, fault="none", network=NETWORK):
    return Job(problem_of(data, fault), network, config, seed=1, checkpoints=folder)


def final(epochs):
    return [(e.train_loss, e.validation_error) for e in epochs]


def weights_digest(folder):
    return checkpoint.read_meta(checkpoint.all_in(folder)[-1]).files[checkpoint.WEIGHTS]


def test_training_learns_and_same_seed_gives_the_same_weights(data, tmp_path):
    config = CONFIG.model_copy(update={"epochs": 30})
    results = [
        fit(job_of(data, tmp_path / name, config), Watch(), resume=False, warn=print)
        for name in "ab"
    ]
    assert (
        results[0].best_error
        == results[1].best_error
        < 0.6 * results[0].history[0].validation_error
    )
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


@pytest.mark.parametrize("stop_at", [3, 10, 14, 25])
def test_an_interrupted_training_continues_exactly(data, tmp_path, stop_at):
    """Dropout masks, batch order, loss sums, early-stop counters: nothing may differ."""
    whole, first, second = Watch(), Watch(stop_at), Watch()
    fit(job_of(data, tmp_path / "whole"), whole, resume=False, warn=print)
    with pytest.raises(Interrupted):
        fit(job_of(data, tmp_path / "cut"), first, resume=False, warn=print)
    fit(job_of(data, tmp_path / "cut"), second, resume=True, warn=print)
    assert final(first.epochs) + final(second.epochs) == final(whole.epochs)
    assert weights_digest(tmp_path / "cut") == weights_digest(tmp_path / "whole")


@pytest.mark.parametrize("stop_at", [3, 14])
def test_a_training_that_saves_when_asked_continues_exactly_too(data, tmp_path, stop_at):
    whole, first, second = Watch(), Watch(stop_at), Watch()
    jobs = [replace(job_of(data, tmp_path / name), saves_epochs=False) for name in ("whole", "cut")]
    alone = fit(jobs[0], whole, resume=False, warn=print)
    assert checkpoint.all_in(tmp_path / "whole") == []
    with pytest.raises(Interrupted):
        fit(jobs[1], first, resume=False, warn=print)
    assert len(checkpoint.all_in(tmp_path / "cut")) == 1
    result = fit(jobs[1], second, resume=True, warn=print)
    assert final(first.epochs) + final(second.epochs) == final(whole.epochs)
    assert (result.best_error, result.best_epoch) == (alone.best_error, alone.best_epoch)


def test_a_torn_checkpoint_is_passed_over(data, tmp_path):
    fit(job_of(data, tmp_path), Watch(), resume=False, warn=print)
    newest = checkpoint.all_in(tmp_path)[-1]
    weights = newest / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    told = []
    found = checkpoint.latest(tmp_path, told.append)
    assert found == checkpoint.all_in(tmp_path)[-2]
    assert "checksum" in told[0]
    assert "expected" in told[0]
    with pytest.raises(CheckpointError, match="checksum"):
        checkpoint.read_meta(newest)


def test_old_checkpoints_go_but_the_best_stays(data, tmp_path):
    config = CONFIG.model_copy(update={"learning_rate": 0.5, "epochs": 8})
    result = fit(job_of(data, tmp_path, config), Watch(), resume=False, warn=print)
    kept = checkpoint.all_in(tmp_path)
    best, meta = checkpoint.best(tmp_path, print)
    assert meta.metrics["validation_error"] == result.best_error
    assert len(kept) <= config.keep_checkpoints + 1
    assert best in kept


def test_patience_ends_the_training(data):
    config = CONFIG.model_copy(update={"learning_rate": 1e-12, "patience": 2, "epochs": 50})
    network = NetworkSpec(input_shape=(8,), layers=(Dense(units=4),))
    result = fit(job_of(data, None, config, network=network), Watch(), resume=False, warn=print)
    assert result.reason == "early stop"
    assert result.epochs == result.best_epoch + 3


def test_a_loss_that_is_not_finite_is_a_typed_failure(data):
    with pytest.raises(TrialFailure) as caught:
        fit(job_of(data, fault="nan"), Watch(), resume=False, warn=print)
    assert caught.value.kind == "nan"
    assert "epoch 0" in caught.value.message


def test_a_last_batch_of_one_row_leaves_batch_statistics_alone(data, tmp_path):
    rows = len(problem_of(data).train_rows)
    config = CONFIG.model_copy(update={"batch_size": rows - 1, "epochs": 2})
    result = fit(job_of(data, tmp_path, config=config), Watch(), resume=False, warn=print)
    assert math.isfinite(result.best_error)
    weights = load_file(checkpoint.all_in(tmp_path)[-1] / checkpoint.WEIGHTS)
    counts = [int(v) for name, v in weights.items() if name.endswith("num_batches_tracked")]
    assert (result.steps, counts) == (4, [2])


def test_padding_does_not_count_in_batch_statistics(data):
    """The last of two ranks has one row less: its network must not see the last one twice."""
    job = job_of(data, config=CONFIG.model_copy(update={"batch_size": 5}))
    engine = TorchEngine(build(NETWORK), job.config, World())
    training = _Training(replace(job, world=World(1, 2, 1, 2, "torchrun")), Watch(), engine)
    (rows, real), tensors = next(iter(training.loader.epoch(0)))
    assert (rows, real, len(tensors["inputs"])) == (5, 2, 3)
    seen, training._rate = [], 0.0
    training.engine.module.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    training._step(rows, real, tensors)
    assert seen == [2]


def test_a_stop_in_the_last_steps_of_an_epoch_comes_after_its_validation(data, tmp_path):
    """Else two states, with and without the epoch's result, would want the same step's folder."""
    steps = -(-len(problem_of(data).train_rows) // CONFIG.batch_size)
    watch = Watch(steps)
    with pytest.raises(Interrupted, match=f"at epoch 1, step {steps}"):
        fit(job_of(data, tmp_path), watch, resume=False, warn=print)
    assert [epoch.epoch for epoch in watch.epochs] == [0]
    assert "validation_error" in checkpoint.read_meta(checkpoint.all_in(tmp_path)[-1]).metrics


@pytest.mark.parametrize(
    ("steps", "seconds", "interval"),
    [(10, 0.1, 10), (10, 0.0, 10), (10, 2.0, 5), (1, 30.0, 1), (4, 1.0, 4)],
)
def test_ranks_agree_at_least_once_a_second(steps, seconds, interval):
    assert steps_between(steps, seconds) == interval


def test_a_full_disk_ends_a_training_with_a_word_for_the_user(data, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("dmi_hpc.checkpoint.write_json", full)
    tmp_path.joinpath("checkpoints").mkdir()
    with pytest.raises(RunError, match=r"no space left .*with --resume"):
        fit(job_of(data, tmp_path / "checkpoints"), Watch(), resume=False, warn=print)
    assert list(tmp_path.joinpath("checkpoints").iterdir()) == []


def test_the_random_state_of_the_gpu_is_kept_too(monkeypatch):
    device, state = torch.device("cuda", 0), torch.arange(16, dtype=torch.uint8)
    given = []
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda device: state)
    monkeypatch.setattr("torch.cuda.set_rng_state", lambda state, device: given.append(state))
    checkpoint.set_random_states(checkpoint.random_states(device), device)
    assert given == [state]


def test_a_damaged_best_checkpoint_is_passed_over(data, tmp_path):
    fit(job_of(data, tmp_path), Watch(), resume=False, warn=print)
    first, _ = checkpoint.best(tmp_path, print)
    weights = first / checkpoint.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    told = []
    second, meta = checkpoint.best(tmp_path, told.append)
    assert second != first
    assert "validation_error" in meta.metrics
    assert len(told) == 1
    assert "next best" in told[0]


def test_a_whole_checkpoint_is_not_written_again_but_a_damaged_one_is(data, tmp_path):
    fit(job_of(data, tmp_path), Watch(), resume=False, warn=print)
    path = checkpoint.all_in(tmp_path)[-1]
    meta, weights = checkpoint.read_meta(path), load_file(path / checkpoint.WEIGHTS)
    inode = path.stat().st_ino
    checkpoint.save(tmp_path, meta, weights, {"a": 1})
    assert path.stat().st_ino == inode
    (path / checkpoint.STATE).write_bytes(b"torn")
    checkpoint.save(tmp_path, meta, weights, {"a": 1})
    assert checkpoint.load_state(path) == {"a": 1}


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_every_optimizer_and_loss_learns(data, optimizer, loss):
    config = CONFIG.model_copy(update={"optimizer": optimizer, "loss": loss, "epochs": 8})
    result = fit(job_of(data, config=config), Watch(), resume=False, warn=print)
    assert result.best_error < result.history[0].validation_error


def test_bfloat16_autocast_trains(data):
    config = CONFIG.model_copy(update={"precision": "bf16", "epochs": 8})
    result = fit(job_of(data, config=config), Watch(), resume=False, warn=print)
    assert result.best_error < result.history[0].validation_error


@pytest.mark.parametrize("transform", ["identity", "log"])
def test_scaled_targets_come_back(transform):
    target = np.random.default_rng(0).lognormal(size=100)
    scale = TargetScale.of(target, transform)
    scaled = scale.scale(target)
    assert abs(scaled.mean()) < 1e-5
    assert abs(scaled.std() - 1) < 1e-5
    np.testing.assert_allclose(scale.unscale(scaled), target, rtol=1e-4)


def test_targets_that_cannot_be_scaled_are_refused():
    with pytest.raises(DataError, match="positive"):
        TargetScale.of(np.array([1.0, -2.0]), "log")
    with pytest.raises(DataError, match="constant"):
        TargetScale.of(np.ones(3), "identity")


def test_schedules():
    config = CONFIG.model_copy(update={"learning_rate": 1.0, "warmup": 0.2})
    for schedule in ("constant", "cosine", "one_cycle"):
        chosen = config.model_copy(update={"schedule": schedule})
        rates = [learning_rate(chosen, p) for p in np.linspace(0, 1, 101)]
        assert max(rates) == pytest.approx(1.0)
        assert rates[0] == {"constant": 0.0, "cosine": 0.0, "one_cycle": 1 / 25}[schedule]
        assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 1e-3)
        assert rates[:21] == sorted(rates[:21])
        assert rates[20:] == sorted(rates[20:], reverse=True)


def test_augmentation_bits_are_uniform_and_differ_by_epoch_and_position():
    bits = random_bits(1, 0, np.arange(20_000))
    assert len(set(bits.tolist())) == 20_000
    assert not set(bits.tolist()) & set(random_bits(1, 1, np.arange(20_000)).tolist())
    ones = ((bits[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).mean(axis=0)
    assert np.abs(ones - 0.5).max() < 0.02


def test_scores_are_those_of_numpy():
    rng = np.random.default_rng(0)
    truth, predicted = rng.normal(5, 1, 50), rng.normal(5, 1, 50)
    error = predicted - truth
    scores = score(predicted, truth)
    assert scores.mae == pytest.approx(np.abs(error).mean())
    assert scores.rmse == pytest.approx(np.sqrt((error**2).mean()))
    assert scores.r2 == pytest.approx(1 - (error**2).sum() / ((truth - truth.mean()) ** 2).sum())
    assert scores.mae_percent == pytest.approx(100 * scores.mae / np.abs(truth).mean())


@pytest.mark.parametrize("fails", ["make_loader", "restore", "write_json"])
def test_the_engine_is_closed_whatever_fails(data, tmp_path, monkeypatch, fails):
    """A process may train again, and DeepSpeed's engine holds memory and hooks until then."""
    closed = []

    class Closing(TorchEngine):
        def __init__(self, *given):
            super().__init__(*given)
            self.settings = {"zero_optimization": {"stage": 0}}

        def close(self):
            closed.append(True)

    def fail(*arguments):
        raise RunError(f"{fails} fails")

    fit(job_of(data, tmp_path / "checkpoints"), Watch(), resume=False, warn=print)
    monkeypatch.setattr("dmi_hpc.train.make_engine", Closing)
    monkeypatch.setattr(f"dmi_hpc.train.{fails}", fail)
    with pytest.raises(RunError, match=f"{fails} fails"):
        fit(job_of(data, tmp_path / "checkpoints"), Watch(), resume=True, warn=print)
    assert closed == [True]


def test_a_checkpoint_of_another_network_closes_the_engine_too(data, tmp_path, monkeypatch):
    closed = []
    monkeypatch.setattr(TorchEngine, "close", lambda self: closed.append(True))
    fit(job_of(data, tmp_path), Watch(), resume=False, warn=print)
    other = NetworkSpec(input_shape=(8,), layers=(Dense(units=3),))
    with pytest.raises(CheckpointError, match="expected"):
        fit(job_of(data, tmp_path, network=other), Watch(), resume=True, warn=print)
    assert closed == [True, True]


def test_weights_of_another_network_are_refused(data, tmp_path):
    fit(job_of(data, tmp_path), Watch(), resume=False, warn=print)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        checkpoint.load_weights(checkpoint.all_in(tmp_path)[-1], torch.nn.Linear(3, 3))
