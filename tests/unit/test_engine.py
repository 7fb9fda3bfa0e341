"""The engine package in one process: plans, optimisers, the network's wrappers, the torch engine."""

import builtins

import pytest
import torch
from torch import nn

from dmi_hpc.config import Recipe, TrainConfig
from dmi_hpc.engine import EngineState, TorchEngine, make_engine, plan, statistics_untouched
from dmi_hpc.engine.gradients import GROWTH_INTERVAL, LossScale, average_over_ranks
from dmi_hpc.engine.network import Network
from dmi_hpc.engine.optimizers import make_optimizer, parameter_groups
from dmi_hpc.engine.stages import bytes_of_rank
from dmi_hpc.errors import CheckpointError, LaunchError, RecipeError
from dmi_hpc.world import World
from search.spaces.genome import Genome
from search.trials.trial import trial_config

MB = 1_000_000


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8, bias=False),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 1),
    )


def batch(step, rows=12):
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(step))


def train(engine, steps):
    for step in steps:
        torch.manual_seed(step)  # dropout
        engine.backward(engine(batch(step)).square().mean(), last=True)
        engine.update()


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize(
    ("keys", "ranks", "memory_MB", "engine", "stage"),
    [
        ({}, 4, 32, "torch", 0),  # 16 bytes x 1 M parameters are just half of it
        ({}, 4, 31, "deepspeed", 1),
        ({}, 4, 29, "deepspeed", 2),
        ({}, 4, 20, "deepspeed", 3),
        ({}, 1, 1, "torch", 0),  # nothing to share
        ({"optimizer": "sgd"}, 4, 24, "torch", 0),
        ({"optimizer": "sgd"}, 4, 23.9, "deepspeed", 2),
        ({"optimizer": "lamb"}, 4, 1, "torch", 0),
        ({"engine": "torch"}, 4, 1, "torch", 0),
        ({"engine": "deepspeed"}, 4, 32, "deepspeed", 0),
        ({"offload": "optimizer"}, 1, 100, "deepspeed", 1),
        ({"offload": "all"}, 1, 100, "deepspeed", 3),
        ({"deepspeed": {"wall_clock_breakdown": True}}, 1, 100, "deepspeed", 0),
        ({"zero_stage": 2}, 1, 100, "deepspeed", 2),
        ({"compile": True}, 4, 1, "deepspeed", 2),
    ],
)
def test_auto_takes_the_lowest_stage_that_fits(keys, ranks, memory_MB, engine, stage):
    decided = plan(TrainConfig(**keys), 1 * MB, ranks, int(memory_MB * MB))
    assert (decided.engine, decided.stage) == (engine, stage)


def test_a_plan_gives_its_reason():
    reason = plan(TrainConfig(), 4_600_000, 4, 64_000 * MB).reason
    assert "ZeRO stage 0, the lowest that fits" in reason
    assert "16 bytes x 4.6 M parameters = 0.0736 GB a rank (4 ranks), of 64 GB" in reason
    assert "may not fit" in plan(TrainConfig(), 4_600_000, 4, 1 * MB).reason


@pytest.mark.parametrize(
    ("keys", "found", "expected"),
    [
        ({"engine": "torch", "zero_stage": 1}, 'train.engine is "torch"', "set engine to auto"),
        ({"zero_stage": 0, "offload": "optimizer"}, "train.offload", "stage 1, 2 or 3"),
        ({"zero_stage": 2, "offload": "all"}, "train.offload", "stage 3"),
        ({"engine": "torch", "offload": "all"}, 'train.engine is "torch"', "set engine"),
        ({"zero_stage": 1, "optimizer": "lars"}, '"lars"', "norm of each whole layer"),
        ({"zero_stage": 3, "compile": True}, "train.compile", "stage 0, 1 or 2"),
        (
            {"engine": "torch", "deepspeed": {"aio": {}}},
            "train.deepspeed holds aio",
            "leave them out",
        ),
    ],
)
def test_recipes_that_contradict_themselves(keys, found, expected):
    with pytest.raises(RecipeError) as caught:
        plan(TrainConfig(**keys), 1 * MB, 2, 64_000 * MB)
    assert found in str(caught.value)
    assert expected in str(caught.value)


def test_trials_of_a_search_need_no_ranks():
    recipe = Recipe(
        name="a", task={"name": "elemnet"}, train=TrainConfig(zero_stage=3, offload="all")
    )
    config = trial_config(recipe, Genome(conv=(), readout=None, dense=(), hyper=()))
    assert plan(config, 1 * MB, 1, MB).engine == "torch"


def test_memory_falls_with_stages_ranks_and_offload():
    config = TrainConfig()
    by_stage = [bytes_of_rank(stage, config, 1 * MB, 4) for stage in range(4)]
    assert by_stage == sorted(by_stage, reverse=True)
    assert by_stage[0] == 16 * MB
    assert by_stage[3] == (20 // 4 + 4) * MB  # shared, and a bucket
    assert bytes_of_rank(3, config, 1 * MB, 8) == (20 / 8 + 4) * MB
    offloaded = TrainConfig(offload="optimizer")
    assert bytes_of_rank(2, offloaded, 1 * MB, 4) == 9 * MB
    half = TrainConfig(precision="bf16")
    assert bytes_of_rank(0, half, 1 * MB, 4) == 18 * MB


def test_slower_learning_toward_the_input():
    groups = parameter_groups(network(), TrainConfig(learning_rate=0.1, layer_decay=0.5))
    assert [group["lr_scale"] for group in groups] == [0.25, 0.5, 1.0]
    assert [group["lr"] for group in groups] == [0.025, 0.05, 0.1]
    assert [len(group["params"]) for group in groups] == [3, 2, 2]  # a norm is its layer's
    assert len(parameter_groups(network(), TrainConfig())) == 1


def test_frozen_weights_are_not_the_optimisers():
    module = network()
    module[0].requires_grad_(False)
    (group,) = parameter_groups(module, TrainConfig())
    assert len(group["params"]) == 6
    with pytest.raises(RecipeError, match="every weight is frozen"):
        parameter_groups(module.requires_grad_(False), TrainConfig())


def test_missing_large_batch_optimisers_say_how_to_get_them(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **keys):
        if name.startswith("pytorch_optimizer"):
            raise ImportError(name)
        return real(name, *rest, **keys)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RecipeError, match=r"pip install dmi-hpc\[optimizers\]"):
        make_optimizer(network(), TrainConfig(optimizer="lamb"))


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "lamb", "lars"])
def test_state_continues_exactly(optimizer):
    if optimizer in ("lamb", "lars"):
        pytest.importorskip("pytorch_optimizer")
    config = TrainConfig(optimizer=optimizer, learning_rate=1e-2, layer_decay=0.9, precision="fp16")
    whole, first, second = (make_engine(network(), config, World()) for _ in range(3))
    train(whole, range(8))
    train(first, range(5))
    state = first.state()
    second.load(EngineState(dict(state.weights), dict(state.optimizer), state.scaler))
    train(first, range(5, 6))  # the loaded state is a copy
    train(second, range(5, 8))
    torch.testing.assert_close(weights(second.module), weights(whole.module), rtol=0, atol=0)
    for a, b in zip(whole.module.buffers(), second.module.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert second.state().scaler == whole.state().scaler


def test_weights_of_another_network_are_refused():
    engine = make_engine(network(), TrainConfig(), World())
    other = make_engine(nn.Sequential(nn.Linear(5, 7)), TrainConfig(), World())
    with pytest.raises(CheckpointError, match=r"0\.weight: found \(7, 5\), expected \(8, 5\)"):
        engine.load(other.state())


def test_state_before_the_first_step_is_that_of_the_weights_alone():
    engine = make_engine(network(), TrainConfig(), World())
    state = engine.state()
    assert state.optimizer == {}
    engine.load(state)


def test_a_state_holds_until_the_next_update():
    """Also running statistics, which each forward pass changes."""
    engine = make_engine(network(), TrainConfig(), World())
    train(engine, range(2))
    state = engine.state()
    before = {name: tensor.clone() for name, tensor in state.weights.items()}
    engine.backward(engine(batch(2)).square().mean(), last=True)
    for name, tensor in state.weights.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, msg=name)


def test_micro_batches_add_up():
    config = TrainConfig(optimizer="sgd", learning_rate=0.1)
    once, parts = (make_engine(network().eval(), config, World()) for _ in range(2))
    inputs = batch(0)
    once.backward(once(inputs).square().mean(), last=True)
    for number, part in enumerate(inputs.chunk(3)):
        parts.backward(parts(part).square().sum() / len(inputs), last=number == 2)
    assert once.update().norm is None  # nobody asked for it
    parts.update()
    torch.testing.assert_close(weights(once.module), weights(parts.module))


def test_clipping_is_that_of_torch():
    config = TrainConfig(optimizer="sgd", momentum=0.0, learning_rate=0.1, clip_norm=0.01)
    engine, module = make_engine(network().eval(), config, World()), network().eval()
    before = weights(module)
    engine.backward(engine(batch(0)).square().mean(), last=True)
    norm = engine.update().norm
    module(batch(0)).square().mean().backward()
    expected = nn.utils.clip_grad_norm_(module.parameters(), 0.01)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close((weights(engine.module) - before).norm(), torch.tensor(1e-3))


def test_a_failing_step_is_taken_unless_skipping_is_asked_for():
    for keys, skipped in (({}, False), ({"not_finite": "skip"}, True)):
        engine = make_engine(network(), TrainConfig(**keys), World())
        engine.backward(engine(batch(0)).sum() * torch.nan, last=True)
        assert engine.update().skipped is skipped
        assert bool(weights(engine.module).isfinite().all()) is skipped


def test_loss_scale_follows_overflows():
    scale = LossScale()
    scale.after(finite=False)
    assert scale.value == 2.0**15
    for _ in range(GROWTH_INTERVAL):
        scale.after(finite=True)
    assert scale.value == 2.0**16
    other = LossScale()
    scale.after(finite=False)
    other.load(scale.state())
    assert other.state() == scale.state() == {"scale": 2.0**15, "good_steps": 0.0}


def test_gradients_are_averaged_in_buckets(monkeypatch):
    monkeypatch.setattr("dmi_hpc.engine.gradients.BUCKET", 10)
    monkeypatch.setattr("dmi_hpc.collectives.sum_", lambda t: t.mul_(3))
    module = network()
    module(batch(0)).sum().backward()
    before = [p.grad.clone() for p in module.parameters()]
    average_over_ranks([p.grad for p in module.parameters()], 2)
    for parameter, old in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, 1.5 * old)


@pytest.mark.parametrize("rows", [1, 12])
def test_checkpointed_activations_leave_everything_the_same(rows):
    """Also running statistics, which the repeated pass would count twice, and dropout's masks."""
    plain, spare = network(), network()
    config = TrainConfig(activation_checkpointing=True)
    for module, run in ((plain, Network(plain, TrainConfig())), (spare, Network(spare, config))):
        for step in range(3):
            torch.manual_seed(step)
            with statistics_untouched(module, rows=rows):
                output = run(batch(step, rows))
            output.square().sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), spare.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0, msg=name)
    for (name, a), (_, b) in zip(plain.named_buffers(), spare.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
    assert all(norm.momentum == 0.1 for norm in spare if isinstance(norm, nn.BatchNorm1d))


def test_checkpointed_activations_are_not_kept():
    torch.manual_seed(0)
    layers = [layer for _ in range(16) for layer in (nn.Linear(8, 8), nn.Tanh())]
    kept = {}
    for name, config in (
        ("all", TrainConfig()),
        ("some", TrainConfig(activation_checkpointing=True)),
    ):
        sizes = []
        run = Network(nn.Sequential(*layers), config)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel() * (t.shape[0] == 64)) or t, lambda t: t
        ):
            run(torch.randn(64, 8))
        kept[name] = sum(sizes)
    assert kept["some"] < kept["all"] / 2


def test_networks_that_are_no_row_of_layers_cannot_be_checkpointed():
    with pytest.raises(RecipeError, match="activation_checkpointing"):
        Network(nn.Bilinear(2, 2, 1), TrainConfig(activation_checkpointing=True))


def test_frozen_norms_stay_frozen():
    module = network()
    module[1].eval()
    with statistics_untouched(module, rows=1):
        pass
    assert not module[1].training


def test_no_compiler_present(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(LaunchError, match="no compiler is present"):
        TorchEngine(network(), TrainConfig(compile=True), World())
