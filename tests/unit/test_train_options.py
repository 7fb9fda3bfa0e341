"""What the recipe can ask of a training, in this process, with the plain-torch engine."""

import math

import numpy as np
import pytest
import torch

from dmi_hpc import checkpoint
from dmi_hpc.config import DataConfig, TrainConfig
from dmi_hpc.data.build import Alone
from dmi_hpc.engine.network import require_compiler
from dmi_hpc.errors import Interrupted, LaunchError, TrialFailure
from dmi_hpc.job import Job
from dmi_hpc.models.spec import Activation, Dense, Dropout, NetworkSpec, Norm
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import BuildContext
from dmi_hpc.train import fit

CONFIG = TrainConfig(epochs=5, batch_size=20, learning_rate=1e-2, engine="torch", threads=1)
PLAIN = NetworkSpec(input_shape=(8,), layers=(Dense(units=16), Activation(), Dense(units=8)))
NOISY = NetworkSpec(
    input_shape=(8,), layers=(Dense(units=16), Norm(), Activation(), Dropout(rate=0.1))
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    target = tmp_path_factory.mktemp("toy") / "data"
    context = BuildContext(DataConfig(rows_per_shard=64), 3, Alone(), 1, lambda rows: None)
    make_task({"name": "toy_task:Toy"}).build_data(target, context)
    return target


class Watch:
    def __init__(self, stop_at=None):
        self.epochs, self.steps, self.events, self.stop_at = [], [], [], stop_at

    def on_step(self, step):
        self.steps.append(step)

    def on_epoch(self, epoch):
        self.epochs.append(epoch)

    def on_event(self, event, values):
        self.events.append((event, values))

    def must_stop(self):
        return "the test" if self.stop_at is not None and len(self.steps) >= self.stop_at else None


def job_of(data, folder=None, network=PLAIN, faults=None, **changes):
    task = {"name": "toy_task:Toy", "faults": faults or {}}
    config = TrainConfig.model_validate({**CONFIG.model_dump(), **changes})
    return Job(Problem.open(make_task(task), data), network, config, seed=1, checkpoints=folder)


def trained(*arguments, watch=None, resume=False, **options):
    watch = watch or Watch()
    return fit(job_of(*arguments, **options), watch, resume=resume, warn=print), watch


def curve(watch):
    return [(epoch.train_loss, epoch.validation_error) for epoch in watch.epochs]


def digest(folder):
    return checkpoint.read_meta(checkpoint.all_in(folder)[-1]).files[checkpoint.WEIGHTS]


def test_accumulation_is_the_same_training(data):
    """In parts of unequal size, the last batch of an epoch too."""
    _, whole = trained(data)
    for parts in (2, 3, 20, 50):
        _, watch = trained(data, accumulation=parts)
        np.testing.assert_allclose(curve(watch), curve(whole), rtol=2e-4)


VARIANTS = {
    "average": {"average": 0.9},
    "plateau": {"schedule": "plateau", "decay_epochs": 1, "warmup": 0.0, "learning_rate": 0.2},
    "step": {"schedule": "step", "decay_epochs": 2},
    "bf16, clipped": {"precision": "bf16", "clip_norm": 0.5},
    "fp16": {"precision": "fp16"},
    "sgd, large batch": {"optimizer": "sgd", "reference_batch": 5, "batch_scaling": "sqrt"},
    "lamb": {"optimizer": "lamb"},
    "layers": {"layer_decay": 0.7, "freeze": ("0.*",)},
    "accumulation": {"accumulation": 2},
    "skip": {"not_finite": "skip"},
    "reproducible": {"reproducible": True},
    "recomputed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop_at", [9, 21])
def test_an_interrupted_training_continues_exactly(data, tmp_path, variant, stop_at):
    options = {"network": NOISY, **VARIANTS[variant]}
    _, whole = trained(data, tmp_path / "whole", **options)
    first = Watch(stop_at)
    with pytest.raises(Interrupted, match="the test"):
        trained(data, tmp_path / "cut", watch=first, **options)
    _, second = trained(data, tmp_path / "cut", resume=True, **options)
    assert curve(first) + curve(second) == curve(whole)
    assert digest(tmp_path / "cut") == digest(tmp_path / "whole")
    rates = [step.learning_rate for step in whole.steps]
    assert [step.learning_rate for step in first.steps + second.steps] == rates


def test_the_running_mean_is_what_is_judged_and_saved(data, tmp_path):
    trained(data, tmp_path / "own")
    result, _ = trained(data, tmp_path / "mean", average=0.9)
    own, mean = (
        checkpoint.read_weights(checkpoint.all_in(tmp_path / name)[-1]) for name in ("own", "mean")
    )
    kept = checkpoint.load_state(checkpoint.all_in(tmp_path / "mean")[-1])["weights"]
    assert not torch.equal(own["0.weight"], mean["0.weight"])
    assert all(torch.equal(kept[name], own[name]) for name in own)
    assert result.best_error < math.inf


def last_of_an_epoch(data):
    """(steps of an epoch, rows of its last one)"""
    rows = len(Problem.open(make_task({"name": "toy_task:Toy"}), data).train_rows)
    return -(-rows // CONFIG.batch_size), rows % CONFIG.batch_size


def test_a_loss_that_is_not_finite_names_step_and_rows(data):
    steps, rest = last_of_an_epoch(data)
    said = rf"not finite at epoch 0 step {steps - 1}, rank 0: .* {20 * (steps - 1)} .*rows( \d+)+"
    with pytest.raises(TrialFailure, match=said) as failed:
        trained(data, faults={rest: "nan"})
    assert failed.value.kind == "nan"


def test_steps_that_are_not_finite_can_be_left_out(data, tmp_path):
    steps, rest = last_of_an_epoch(data)
    _, watch = trained(data, tmp_path, faults={rest: "nan"}, not_finite="skip")
    assert [step.skipped for step in watch.steps] == [k == steps - 1 for k in range(steps)] * 5
    assert all(math.isfinite(epoch.train_loss) for epoch in watch.epochs)
    assert watch.epochs[-1].validation_error < watch.epochs[0].validation_error
    state = checkpoint.load_state(checkpoint.all_in(tmp_path)[-1])
    assert state["counters"]["skipped"] == 5


def test_checkpoints_come_within_an_epoch_too(data, tmp_path):
    _, watch = trained(data, tmp_path, checkpoint_s=1e-9, keep_checkpoints=1000)
    steps, _ = last_of_an_epoch(data)
    names = [path.name for path in checkpoint.all_in(tmp_path)]
    assert len(names) > 5
    assert f"step-{steps:08d}" in names
    told = [values["step"] for event, values in watch.events if event == "checkpoint"]
    assert told == [int(name.removeprefix("step-")) for name in names]


def test_decisions_are_told(data):
    _, watch = trained(data, freeze=("0.*",))
    said = " ".join(values["message"] for event, values in watch.events if event == "decision")
    assert "frozen: 0.weight, 0.bias" in said
    assert "engine torch" in said


@pytest.mark.slow
@pytest.mark.timeout(150)
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own use of it
def test_a_compiled_network_trains_to_the_same_losses(data, tmp_path, monkeypatch):
    """Its last batch of an epoch has another size: the network is compiled for any."""
    try:
        require_compiler()
    except LaunchError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    _, plain = trained(data)
    _, compiled = trained(data, compile=True)
    np.testing.assert_allclose(curve(compiled), curve(plain), rtol=1e-4)
    assert list(tmp_path.rglob("*.so")), "nothing was compiled"
