"""The gradient noise scale of a training, from its micro-batches to what a person sees of it."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn

from dmi_hpc.batches import make_loader, micro_batch_sizes, micro_batches
from dmi_hpc.config import DataConfig, TrainConfig
from dmi_hpc.data.build import Alone
from dmi_hpc.deadline import Deadline
from dmi_hpc.engine import TorchEngine, make_engine
from dmi_hpc.errors import RecipeError
from dmi_hpc.files import read_json_lines
from dmi_hpc.job import Job
from dmi_hpc.meters import NoiseScale
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec
from dmi_hpc.problem import Problem
from dmi_hpc.screen import pieces
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.base import BuildContext
from dmi_hpc.train import fit
from dmi_hpc.watch import StopFlag, TrainingWatch
from dmi_hpc.world import World

PLAIN = NetworkSpec(input_shape=(8,), layers=(Dense(units=16), Activation(), Dense(units=8)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    target = tmp_path_factory.mktemp("toy") / "data"
    context = BuildContext(DataConfig(rows_per_shard=64), 3, Alone(), 1, lambda rows: None)
    make_task({"name": "toy_task:Toy"}).build_data(target, context)
    return target


def job_of(data, folder=None, **changes):
    keys = {"epochs": 5, "batch_size": 20, "engine": "torch", "threads": 1, "noise_scale": True}
    config = TrainConfig.model_validate({**keys, **changes})
    problem = Problem.open(make_task({"name": "toy_task:Toy"}), data)
    return Job(problem, PLAIN, config, seed=1, checkpoints=folder)


class Watch:
    def __init__(self):
        self.steps = []

    def on_step(self, step):
        self.steps.append(step)

    def on_epoch(self, epoch):
        pass

    def on_event(self, event, values):
        pass

    def must_stop(self):
        return None


def trained(*arguments, **options):
    watch = Watch()
    result = fit(job_of(*arguments, **options), watch, resume=False, warn=print)
    return result, watch.steps


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("accumulation", [1, 3, 50])
@pytest.mark.parametrize("rows", [2, 5, 20])
def test_micro_batches_hold_each_row_of_a_batch_once(rows, ranks, accumulation):
    share, found, counts = -(-rows // ranks), [], set()
    for rank in range(ranks):
        real = min(max(rows - rank * share, 0), share)
        parts = micro_batches(share, real, accumulation)
        counts.add(len(parts))
        held = [range(share)[part] for part in parts]
        assert all(len(rows_of_part) > 0 for rows_of_part in held)  # its backward pass is awaited
        found.append([sum(row < real for row in part) for part in held])
    assert len(counts) == 1
    sizes = micro_batch_sizes(rows, ranks, accumulation)
    assert sizes == [n for of_rank in found for n in of_rank if n]
    assert sum(sizes) == rows


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize(
    "keys", [{}, {"clip_norm": 1e-3}, {"precision": "fp16"}, {"freeze": ("0.*",)}]
)
def test_squares_are_those_of_gradients_by_hand(keys):
    """Of each micro-batch by itself; before clipping, without loss scale or frozen weights."""
    config = TrainConfig(noise_scale=True, accumulation=4, optimizer="sgd", **keys)
    module = network()
    module[0].requires_grad_("freeze" not in keys)
    engine = make_engine(module, config, World())
    for step in range(3):
        inputs = torch.randn(14, 5, generator=torch.Generator().manual_seed(step))
        losses = [
            engine(inputs[part]).square().sum() / 14
            for part in micro_batches(14, 14, accumulation=4)
        ]
        weights = [p for p in module.parameters() if p.requires_grad]
        own = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, retain_graph=True)])
            for loss in losses
        ]
        for number, loss in enumerate(losses):
            engine.backward(loss, last=number == 3)
        parts, whole = engine.update().squares
        rel = 1e-2 if "precision" in keys else 1e-5
        assert float(parts) == pytest.approx(float(sum(g.square().sum() for g in own)), rel=rel)
        assert float(whole) == pytest.approx(float(sum(own).square().sum()), rel=rel)


def test_the_noise_scale_of_a_linear_problem_is_found():
    """y = u x + noise at w = 0: S / |G|^2 = d + 1 + d sigma^2 / |u|^2, by the moments of normal x."""
    d, sigma, sizes = 6, 1.5, [4, 4, 4, 4]
    truth = d + 1 + d * sigma**2 / d
    config = TrainConfig(noise_scale=True, accumulation=4, optimizer="sgd", learning_rate=1e-12)
    module = nn.Linear(d, 1, bias=False)
    nn.init.zeros_(module.weight)
    engine, meter = make_engine(module, config, World()), NoiseScale(sizes, decay=0.9998)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        x = torch.randn(16, d, generator=generator)
        y = x.sum(1) + sigma * torch.randn(16, generator=generator)
        for number, part in enumerate(micro_batches(16, 16, accumulation=4)):
            loss = (engine(x[part]).squeeze(1) - y[part]).square().sum() / 16
            engine.backward(loss, last=number == 3)
        meter.add(*engine.update().squares)
    assert meter.value() == pytest.approx(truth, rel=0.1)


def test_a_training_tells_it_and_is_the_same_training(data, tmp_path):
    told, measured = trained(data, accumulation=3)
    plain, unmeasured = trained(data, accumulation=3, noise_scale=False)
    assert [e.validation_error for e in told.history] == [e.validation_error for e in plain.history]
    assert measured[-1].noise.value() > 0
    assert measured[-1].noise.samples == 20
    assert unmeasured[-1].noise is None


def test_a_ragged_batch_is_not_measured(data, monkeypatch):
    taken = []
    monkeypatch.setattr(NoiseScale, "add", lambda self, parts, whole: taken.append(float(whole)))
    job = job_of(data, accumulation=2, epochs=3)
    batches = make_loader(job).batches
    assert batches.batch_size == 20
    whole_steps, rest = divmod(len(job.problem.train_rows), 20)
    assert rest > 0
    fit(job, Watch(), resume=False, warn=print)
    assert len(taken) == 3 * whole_steps
    assert np.isfinite(taken).all()


@pytest.mark.parametrize("changes", [{}, {"accumulation": 4, "batch_size": 1}])
def test_a_batch_in_one_part_is_refused(data, changes):
    with pytest.raises(
        RecipeError, match=r"in one part \(1 rank, accumulation .* set accumulation"
    ):
        trained(data, **changes)


def test_an_engine_that_shows_no_micro_batch_is_refused(data, monkeypatch):
    def shared(module, config, world):
        engine = TorchEngine(module, config, world)
        engine.settings = {"zero_optimization": {"stage": 1}}
        return engine

    monkeypatch.setattr("dmi_hpc.train.make_engine", shared)
    with pytest.raises(RecipeError, match=r'the engine is DeepSpeed, .* set engine = "torch"'):
        trained(data, accumulation=2)


def test_it_is_shown_recorded_and_plotted(data, tmp_path):
    job = job_of(data, tmp_path / "checkpoints", accumulation=4, epochs=20)
    watch = TrainingWatch(job, tmp_path, Deadline(StopFlag(), None))
    with watch.shown():
        fit(job, watch, resume=False, warn=print)
        watch._read(watch._due_record)  # as a second later
    shown = watch._screen.reading.noise_scale
    assert shown > 0
    assert f"noise scale {shown:,.0f}" in pieces(watch._screen.reading)
    records = [r for r in read_json_lines(tmp_path / "metrics.jsonl") if r["kind"] == "step"]
    assert records[-1]["noise_scale"] == shown
    events = importlib.import_module("tensorboard.backend.event_processing.event_file_loader")
    [path] = (tmp_path / "tensorboard").iterdir()
    plotted = {
        value.tag: value.tensor.float_val[0]
        for event in events.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    assert plotted["step/noise_scale"] == pytest.approx(shown)
