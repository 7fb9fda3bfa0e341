"""Trainings and engines over real ranks: the noise scale, and the running mean of shared weights."""

import pytest
import torch
from ranks import ranks
from runner import toy_data
from torch import nn

from dmi_hpc import checkpoint, collectives
from dmi_hpc.batches import micro_batch_sizes, micro_batches
from dmi_hpc.config import TrainConfig
from dmi_hpc.engine import make_engine
from dmi_hpc.errors import RecipeError
from dmi_hpc.job import Job
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec, Norm
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.train import fit

pytestmark = [pytest.mark.slow]

NETWORK = NetworkSpec(
    input_shape=(8,), layers=(Dense(units=17), Norm(), Activation(), Dense(units=9))
)
# small weights are shared too, as they are in large networks
SHARED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


class Watch:
    def __init__(self):
        self.steps, self.epochs = [], []

    def on_step(self, step):
        self.steps.append(step)

    def on_epoch(self, epoch):
        self.epochs.append(epoch)

    def on_event(self, event, values):
        pass

    def must_stop(self):
        return None


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


def trained(world, data, folder=None, **keys):
    """Observer of a training, and its last checkpoint's weights and state on rank 0."""
    config = TrainConfig(**{"epochs": 4, "batch_size": 20, "learning_rate": 1e-2, **keys})
    problem, watch = Problem.open(make_task({"name": "toy_task:Toy"}), data), Watch()
    job = Job(problem, NETWORK, config, seed=1, world=world, checkpoints=folder)
    fit(job, watch, resume=False, warn=print)
    if folder is None or not world.is_first:
        return watch, {}, {}
    last = checkpoint.all_in(folder)[-1]
    return watch, checkpoint.read_weights(last), checkpoint.load_state(last)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(output, rows):
    return output.square().sum() / rows


@ranks(2)
def test_squares_are_those_of_gradients_by_hand(world):
    """15 rows: neither ranks nor micro-batches have equally many."""
    rows, module = 15, network()
    share = -(-rows // world.size)
    for accumulation in (1, 4):
        config = TrainConfig(noise_scale=True, accumulation=accumulation, clip_norm=1e-3)
        engine = make_engine(network(), config, world)
        for step in range(3):
            inputs = torch.randn(rows, 5, generator=torch.Generator().manual_seed(step))
            module.load_state_dict(engine.module.state_dict())
            own = []
            for part in inputs.split(micro_batch_sizes(rows, world.size, accumulation)):
                module.zero_grad()
                loss_of(module(part), rows).backward()
                own.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
            mine = inputs[world.rank * share :][:share]
            parts = micro_batches(share, len(mine), accumulation)
            for number, part in enumerate(parts, 1):
                loss = loss_of(engine(mine[part]), rows) * world.size
                engine.backward(loss, last=number == len(parts))
            found = [float(square) for square in engine.update().squares]
            expected = sum(g.square().sum() for g in own), sum(own).square().sum()
            assert found == pytest.approx([float(square) for square in expected], rel=1e-5)
            assert collectives.gather_objects(found) == [found] * world.size


@ranks(2)
def test_a_training_of_two_ranks_tells_its_noise_scale(world, data):
    """The same as one rank's in two parts, but for the statistics of the norm; and all else too."""
    told, _, _ = trained(world, data, noise_scale=True)
    plain, _, _ = trained(world, data)
    found = told.steps[-1].noise.value()
    assert found > 0
    assert collectives.gather_objects(found) == [found] * world.size
    assert [e.validation_error for e in told.epochs] == pytest.approx(
        [e.validation_error for e in plain.epochs], rel=1e-5
    )


@ranks(2, limit_s=150)
def test_the_mean_of_shared_weights_is_that_of_whole_ones(world, data, tmp_path):
    """And DeepSpeed, which shows no gradient of a micro-batch, refuses the noise scale.

    With SGD: Adam makes steps out of the rounding that a bias before a norm has for its gradient.
    """
    found, common = {}, {"average": 0.97, "optimizer": "sgd"}
    for name, keys in {
        "torch": {"engine": "torch"},
        "stage 0": {"engine": "deepspeed", "zero_stage": 0},
        "stage 3": {"engine": "deepspeed", "zero_stage": 3, "deepspeed": SHARED},
    }.items():
        watch, mean, state = trained(world, data, tmp_path / name / "c", **common, **keys)
        found[name] = [epoch.validation_error for epoch in watch.epochs], mean, state.get("weights")
    curve, mean, own = found.pop("torch")
    for name, (other_curve, other_mean, other_own) in found.items():
        assert other_curve == pytest.approx(curve, rel=1e-5), name
        for held, expected in ((other_mean, mean), (other_own, own)):
            if world.is_first:
                assert held.keys() == expected.keys()
                for key, tensor in held.items():
                    torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6)
    if world.is_first:
        assert max(float((mean[key] - own[key]).abs().max()) for key in own) > 1e-3
    with pytest.raises(RecipeError, match="the engine is DeepSpeed"):
        trained(world, data, noise_scale=True, zero_stage=1)
