"""The trainings that are compared: this project's, and the same written by hand or with others.

All train the same network on the same rows with the same fused Adam and the mean absolute error,
each on its share of the global batch. What a rival needs not do is left out of it: it holds its data
in memory, keeps no checkpoints, writes no log.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from dmi_hpc.deadline import Deadline
from dmi_hpc.meters import Step
from dmi_hpc.models.build import build
from dmi_hpc.train import Job, fit
from dmi_hpc.watch import StopFlag, TrainingWatch
from dmi_hpc.world import World
from training.problems import LEARNING_RATE, Setting
from training.turns import Tick, Training

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Ticking(TrainingWatch):
    """What `dmi train` shows and records, with a tick after each step."""

    def __init__(self, job: Job, folder: Path, tick: Tick) -> None:
        super().__init__(job, folder, Deadline(StopFlag(), None))
        self._tick = tick

    def on_step(self, step: Step) -> None:
        super().on_step(step)
        self._tick()


def ours(setting: Setting, world: World, **changes: Any) -> Training:
    """dmi_hpc.train.fit as `dmi train` calls it: shard set, loader, schedule, meters, records."""

    def training(tick: Tick) -> None:
        job = Job(
            setting.problem(),
            setting.network,
            setting.config(**changes),
            seed=1,
            world=world,
            device=torch.device(setting.device),
        )
        with (
            tempfile.TemporaryDirectory(prefix="dmi-bench-train-") as folder,
            Ticking(job, Path(folder), tick).shown() as watch,
        ):
            fit(job, watch, resume=False, warn=lambda _: None)

    return training


def in_memory(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    """All inputs and scaled targets, on the device."""
    problem = setting.problem()
    fields, target = problem.split("train")
    inputs = torch.from_numpy(problem.task.inputs(fields))
    targets = torch.from_numpy(problem.scale.scale(target))
    return inputs.to(setting.device), targets.to(setting.device)


def shuffled(setting: Setting, world: World) -> Batches:
    """This rank's share of every global batch, epoch after epoch, each in another order."""
    inputs, targets = in_memory(setting)
    generator = torch.Generator().manual_seed(1)  # the same order on every rank
    share = setting.batch // world.size
    while True:
        order = torch.randperm(len(targets), generator=generator).to(setting.device)
        for start in range(0, len(order) - setting.batch + 1, setting.batch):
            begin = start + world.rank * share
            rows = order[begin : begin + share]
            yield inputs[rows], targets[rows]


def network(setting: Setting) -> nn.Module:
    torch.manual_seed(1)
    return build(setting.network).to(setting.device)


def by_hand(
    setting: Setting, world: World, wrap: Callable[[nn.Module], Any] = lambda m: m
) -> Training:
    """The loop of a tutorial, with torch's fused Adam. wrap: DistributedDataParallel, torch.compile."""

    def training(tick: Tick) -> None:
        module = wrap(network(setting))
        optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, fused=True)
        dtype = DTYPES.get(setting.precision)
        for inputs, targets in shuffled(setting, world):
            with torch.autocast(setting.device, dtype, enabled=dtype is not None):
                output = module(inputs).squeeze(1)
            torch.autograd.backward(functional.l1_loss(output.float(), targets))
            optimizer.step()
            optimizer.zero_grad()
            tick()

    return training


def distributed(setting: Setting, world: World) -> Training:
    return by_hand(setting, world, nn.parallel.DistributedDataParallel)


def raw_deepspeed(setting: Setting, world: World, stage: int) -> Training:
    """DeepSpeed as its users start it: all but the stage at its defaults, and torch's fused Adam.

    Its own Adam would be compiled first, for minutes.
    """

    def training(tick: Tick) -> None:
        from dmi_hpc.engine.library import import_deepspeed

        module = network(setting)
        engine, _, _, _ = import_deepspeed().initialize(
            model=module,
            optimizer=torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, fused=True),
            config={
                "train_batch_size": setting.batch,
                "gradient_accumulation_steps": 1,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
            },
            dist_init_required=False,
        )
        for inputs, targets in shuffled(setting, world):
            loss = functional.l1_loss(engine(inputs).squeeze(1), targets)
            engine.backward(loss)
            engine.step()
            tick()

    return training


def lightning(setting: Setting, world: World, *, documented: bool = False) -> Training:
    """Trainer with nothing but the steps: no log, checkpoint, progress bar, summary or validation.

    Fused Adam and batches from memory, which its users have to think of; `documented`: as its
    documentation shows it, torch.optim.Adam as it is and a DataLoader of single rows.
    """

    def training(tick: Tick) -> None:
        import lightning

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.network = network(setting)

            def training_step(self, batch: Any) -> torch.Tensor:
                inputs, targets = batch
                return functional.l1_loss(self.network(inputs).squeeze(1), targets)

            def configure_optimizers(self) -> torch.optim.Optimizer:
                fused = None if documented else True
                return torch.optim.Adam(self.parameters(), lr=LEARNING_RATE, fused=fused)

            def on_train_batch_end(self, *_: Any) -> None:
                tick()

        batches: Any = _Endless(setting, world)
        if documented:
            rows = TensorDataset(*in_memory(setting))
            batches = DataLoader(rows, batch_size=setting.batch, shuffle=True)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), batches)

    return training


class _Endless:
    """What Lightning asks of its data: to be iterable."""

    def __init__(self, setting: Setting, world: World) -> None:
        self._setting, self._world = setting, world

    def __iter__(self) -> Batches:
        return shuffled(self._setting, self._world)
