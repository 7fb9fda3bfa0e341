"""Forces on several ranks: gradients of gradients reach every weight, as on one rank."""

from dataclasses import replace

import pytest
import torch
from ranks import ranks

from dmi_hpc.config import TrainConfig
from dmi_hpc.engine import make_engine
from dmi_hpc.losses import row_losses
from dmi_hpc.models.build import build
from dmi_hpc.models.graphs import nominal_graphs
from dmi_hpc.models.spec import (
    Activation,
    CFConv,
    Dense,
    GraphInput,
    GraphReadout,
    NetworkSpec,
    RadialBasis,
    Residual,
)
from dmi_hpc.targets import TargetScale
from dmi_hpc.world import World

pytestmark = [pytest.mark.slow]

SPEC = NetworkSpec(
    input_shape=(2, 4),
    graph=GraphInput(edge_features=3, edges=12),
    basis=RadialBasis(cutoff=3.0, count=8, width=0.4),
    forces=True,
    layers=(
        Dense(units=6),
        Residual(layers=(CFConv(channels=6, filters=5),)),
        Activation(function="shifted_softplus"),
        GraphReadout(),
    ),
)
SCALE = TargetScale(transform="identity", mean=0.0, std=1.0)


def after_training(world, kind, **options):
    """Weights after some steps on four graphs, each rank with its share of them."""
    torch.manual_seed(0)
    config = TrainConfig(engine=kind, optimizer="sgd", learning_rate=0.05, loss="mse", **options)
    engine = make_engine(build(SPEC).train(), config, world)
    batch, share = nominal_graphs(SPEC, 4), 4 // world.size
    rng = torch.Generator().manual_seed(1)
    forces, energy = torch.randn(16, 3, generator=rng), torch.randn(4, generator=rng)
    for _ in range(4):
        part = slice(world.rank * share, (world.rank + 1) * share)
        given = replace(batch, forces=forces)[part]
        output = engine(given)
        losses = row_losses(config, SCALE, output, energy[part], given)
        engine.backward(losses.mean(), last=True)
        engine.update()
    state = engine.state()
    engine.close()
    return None if state is None else state.weights


@ranks(2)
def test_two_ranks_train_forces_as_one_does(world):
    torch.manual_seed(0)
    begin = build(SPEC).state_dict()
    wanted = after_training(World(), "torch")
    assert not any(torch.equal(wanted[name], begin[name]) for name in begin)
    for kind, options in (
        ("torch", {}),
        ("torch", {"noise_scale": True}),  # without DistributedDataParallel
        ("deepspeed", {"zero_stage": 0}),
        ("deepspeed", {"zero_stage": 2}),
    ):
        found = after_training(world, kind, **options)
        if world.is_first:
            for name in wanted:
                torch.testing.assert_close(
                    found[name].cpu(), wanted[name], atol=1e-6, rtol=1e-4, msg=f"{kind} {name}"
                )
