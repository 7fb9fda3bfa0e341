"""Networks whose layers hold layers are trained, recomputed, interrupted and frozen like any other."""

import pytest

from dmi_hpc import checkpoint
from dmi_hpc.config import DataConfig, TrainConfig
from dmi_hpc.data.build import Alone
from dmi_hpc.errors import Interrupted
from dmi_hpc.job import Job
from dmi_hpc.models.build import build
from dmi_hpc.models.spec import (
    Activation,
    Dense,
    Dropout,
    NetworkSpec,
    Norm,
    Parallel,
    Residual,
)
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import BuildContext
from dmi_hpc.train import fit
from dmi_hpc.transfer import freeze

BLOCK = (Dense(units=8), Norm(), Activation())
NETWORK = NetworkSpec(
    input_shape=(8,),
    layers=(
        *BLOCK,
        Residual(layers=BLOCK),
        Parallel(branches=((), (Dense(units=5), Activation(function="tanh")))),
        Dropout(rate=0.2),
        Residual(layers=(Dense(units=6), Activation())),
    ),
)
TASK = {"name": "toy_task:Toy", "faults": {}}
STOPS_AFTER = 9  # steps, in the second epoch


class Watch:
    def __init__(self, stop_at=None):
        self.steps, self.curve, self.stop_at = 0, [], stop_at

    def on_step(self, step):
        self.steps += 1

    def on_epoch(self, epoch):
        self.curve.append((epoch.train_loss, epoch.validation_error))

    def on_event(self, event, values):
        pass

    def must_stop(self):
        return "the test" if self.steps == self.stop_at else None


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    target, task = tmp_path_factory.mktemp("toy") / "data", make_task(TASK)
    context = BuildContext(DataConfig(rows_per_shard=64), 3, Alone(), 1, lambda rows: None)
    task.build_data(target, context)
    return Problem.open(task, target)


def trained(problem, folder, stop_at=None, *, resume=False, **changes):
    config = TrainConfig(
        epochs=4, batch_size=20, learning_rate=1e-2, engine="torch", threads=1, **changes
    )
    watch = Watch(stop_at)
    job = Job(problem, NETWORK, config, seed=1, checkpoints=folder)
    try:
        fit(job, watch, resume=resume, warn=print)
    except Interrupted:
        assert stop_at is not None
    return watch.curve


def test_an_interrupted_training_and_a_recomputed_one_are_the_same(problem, tmp_path):
    whole = trained(problem, tmp_path / "whole")
    assert whole[-1][0] < 0.8 * whole[0][0]
    assert trained(problem, tmp_path / "again", activation_checkpointing=True) == whole
    first = trained(problem, tmp_path / "cut", STOPS_AFTER)
    assert first + trained(problem, tmp_path / "cut", resume=True) == whole
    digests = {
        checkpoint.read_meta(checkpoint.all_in(tmp_path / name)[-1]).files[checkpoint.WEIGHTS]
        for name in ("whole", "cut")
    }
    assert len(digests) == 1


def test_weights_inside_layers_have_names_to_freeze_them_by():
    module = build(NETWORK)
    assert freeze(module, ("3.layers.*", "4.branches.1.0.bias")) == (
        *(f"3.layers.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")),
        "4.branches.1.0.bias",
    )
