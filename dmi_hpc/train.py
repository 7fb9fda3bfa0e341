"""The training story, top to bottom: epochs of global batches through an engine, until the
validation error stops falling. Runs alone, over ranks, or as one trial of a search.

Everything that decides the next step is in ``Counters``, the weights, the optimiser and the random
states, so a checkpoint continues exactly: the order of samples is a pure function of their position.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from dmi_hpc import checkpoint, collectives
from dmi_hpc.config import TrainConfig
from dmi_hpc.data.access import order_of
from dmi_hpc.data.device import to_device
from dmi_hpc.data.loader import Batch, Loader
from dmi_hpc.data.manifest import require_identity
from dmi_hpc.data.sampler import Order
from dmi_hpc.engine import Engine, make_engine, statistics_untouched
from dmi_hpc.errors import Interrupted, TrialFailure, together
from dmi_hpc.evaluate import predict_rows, score
from dmi_hpc.files import writing
from dmi_hpc.models.build import build
from dmi_hpc.models.spec import NetworkSpec
from dmi_hpc.problem import Problem
from dmi_hpc.schedule import learning_rate
from dmi_hpc.world import World

# Ranks agree on a stop signal and on a finite loss every so many steps (one small all-reduce), or
# after so many seconds if that is sooner.
AGREE_EVERY, AGREE_S = 10, 1.0


@dataclass(frozen=True)
class Job:
    """One network to train on one problem."""

    problem: Problem
    network: NetworkSpec
    config: TrainConfig
    seed: int
    world: World = field(default_factory=World)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    checkpoints: Path | None = None  # a search trial keeps none


@dataclass(frozen=True)
class Epoch:
    """What one epoch brought; losses in scaled units, errors in the task's unit."""

    epoch: int
    step: int
    samples: int
    train_loss: float
    validation_mae: float
    validation_rmse: float
    validation_r2: float
    learning_rate: float
    seconds: float
    samples_per_s: float
    data_wait: float  # share of `seconds` that rank 0 waited for data


@dataclass
class Counters:
    """Progress of a training: with weights, optimiser and random states, all there is to resume."""

    epoch: int = 0  # the epoch in work
    step: int = 0  # steps done in all epochs
    loss_sum: float = 0.0  # this rank's, of the epoch in work, when it was saved
    best_mae: float = math.inf
    best_epoch: int = -1
    best_step: int = -1


@dataclass(frozen=True)
class Result:
    """How a training ended."""

    best_mae: float
    best_epoch: int
    epochs: int
    steps: int
    reason: str  # "all epochs" or "early stop"
    parameters: int
    history: tuple[Epoch, ...]


class Observer(Protocol):
    """Who watches a training: a terminal, a metrics file, a search."""

    def on_step(self, epoch: int, step: int, steps_per_epoch: int) -> None: ...
    def on_epoch(self, epoch: Epoch) -> None: ...
    def should_stop(self) -> bool:
        """True asks for a checkpoint now and an orderly end (a signal, a deadline)."""


def fit(job: Job, observer: Observer, *, resume: bool, warn: Callable[[str], None]) -> Result:
    """Train `job` until its epochs are done or validation stops improving.

    Raises Interrupted after a checkpoint if the observer asked to stop, TrialFailure("nan") if the
    loss is not finite, NetworkError if the network cannot be built.
    """
    training = _Training(job, observer)
    try:
        if resume:
            with together(collectives.gather_objects):
                training.resume(warn)
        return training.run()
    finally:
        training.engine.close()


class _Training:
    def __init__(self, job: Job, observer: Observer) -> None:
        self.job, self.config, self.observer = job, job.config, observer
        torch.manual_seed(job.seed)  # the same weights on every rank
        module = build(job.network).to(job.device)
        self.engine: Engine = make_engine(module, job.config, job.world)
        torch.manual_seed(job.seed + 1 + job.world.rank)  # but other dropout masks
        shards, rows = job.problem.shards, job.problem.train_rows
        self.loader = Loader(
            shards,
            rows,
            job.problem.fields,
            # a window of shuffling follows the node's memory: rank 0's is everybody's
            collectives.gather_objects(
                order_of(
                    shards,
                    job.problem.fields,
                    len(rows),
                    batch_size=job.config.batch_size,
                    seed=job.seed,
                    shuffle=job.problem.shuffle,
                )
            )[0],
            batch_size=job.config.batch_size,
            prepare=self._prepare,
            rank=job.world.rank,
            size=job.world.size,
            threads=job.config.loader_threads,
            pin=job.device.type == "cuda",
        )
        self.steps_per_epoch = self.loader.steps()
        self.counters = Counters()
        self.history: list[Epoch] = []
        # of the epoch; on the device: reading it each step would make a GPU wait
        self._loss = torch.zeros((), dtype=torch.float64, device=job.device)
        self._agreed_step, self._agreed_time = 0, 0.0
        self._interval = 1  # in steps, to the next agreement; the same on all ranks

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.config.epochs

    def run(self) -> Result:
        reason = "all epochs"
        while self.counters.epoch < self.config.epochs:
            if self._patience_spent():
                reason = "early stop"
                break
            stop = self._train_epoch()
            self._end_epoch()
            # this epoch's checkpoint is there; only now, for one step has one checkpoint
            if (stop or self._agree()) and self.counters.epoch < self.config.epochs:
                raise self._interrupted()
        c = self.counters
        return Result(
            best_mae=c.best_mae,
            best_epoch=c.best_epoch,
            epochs=c.epoch,
            steps=c.step,
            reason=reason,
            parameters=sum(p.numel() for p in self.engine.module.parameters()),
            history=tuple(self.history),
        )

    def _interrupted(self) -> Interrupted:
        return Interrupted(f"stopped at epoch {self.counters.epoch}, step {self.counters.step}")

    def _patience_spent(self) -> bool:
        c, patience = self.counters, self.config.patience
        return patience is not None and c.epoch - 1 - c.best_epoch >= patience

    def _train_epoch(self) -> bool:
        """True if the ranks were asked to stop during its last steps."""
        c, started = self.counters, time.perf_counter()
        before = c.epoch * self.steps_per_epoch
        first, waited = c.step - before, 0.0
        self.engine.module.train()
        self._agreed_step, self._agreed_time = c.step, started
        batches = self.loader.epoch(c.epoch, first * self.config.batch_size)
        arriving = to_device(batches, self.job.device)
        while True:
            asked = time.perf_counter()
            arrived = next(arriving, None)
            waited += time.perf_counter() - asked
            if arrived is None:
                break
            self._loss += self._step(*arrived)
            c.step += 1
            self.observer.on_step(c.epoch, c.step - before, self.steps_per_epoch)
            last = c.step - before == self.steps_per_epoch
            if not last and c.step - self._agreed_step >= self._interval and self._agree():
                self._save({})
                raise self._interrupted()
        stop = self._agree()
        self._seconds = time.perf_counter() - started
        self._data_wait = waited / self._seconds
        self._rows_seen = max(0, len(self.loader.rows) - first * self.config.batch_size)
        return stop

    def _step(self, rows: int, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """One update; returns this rank's summed loss over its rows, still on the device.

        rows: of the global batch.
        """
        inputs, targets, weights = (tensors[name] for name in ("inputs", "targets", "weights"))
        rate = learning_rate(self.config, (self.counters.step + 1) / self.total_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        with statistics_untouched(self.engine.module, rows=len(targets)):
            output = self.engine(inputs).squeeze(1)
        per_row = _loss(self.config, output, targets)
        summed = (per_row * weights).sum()
        # engines average over ranks: rows of a ragged last batch still weigh the same
        self.engine.update(summed * (self.job.world.size / rows))
        return summed.detach()

    def _prepare(self, batch: Batch) -> tuple[int, dict[str, torch.Tensor]]:
        """(rows of the global batch, what a step needs); runs in the loader's threads."""
        task, problem = self.job.problem.task, self.job.problem
        inputs = task.inputs(batch.fields)
        if self.config.augment:
            inputs = task.augment(inputs, batch.bits())
        arrays = {
            "inputs": inputs,
            "targets": problem.scale.scale(problem.target(batch.fields)),
            "weights": batch.weights,
        }
        # padding, always at the end, would count in batch statistics; a rank without rows keeps one
        real = max(1, int(batch.weights.sum()))
        return batch.stop - batch.start, {
            name: torch.from_numpy(np.ascontiguousarray(array[:real]))
            for name, array in arrays.items()
        }

    def _agree(self) -> bool:
        """All ranks together: fail on a loss that is not finite; True if one was asked to stop."""
        c, loss = self.counters, float(self._loss)  # waits for the device
        steps, seconds = c.step - self._agreed_step, time.perf_counter() - self._agreed_time
        pace = _steps_between(steps, seconds) if self.job.world.is_first and steps else 0
        shared = collectives.sum_(
            torch.tensor(
                [loss, float(self.observer.should_stop()), float(pace)],
                dtype=torch.float64,
                device=self.job.device,
            )
        )
        if not math.isfinite(float(shared[0])):
            raise TrialFailure(
                "nan", f"loss is {float(shared[0])} at epoch {c.epoch} step {c.step}"
            )
        self._interval = int(shared[2]) or self._interval
        self._agreed_step, self._agreed_time = c.step, time.perf_counter()
        return float(shared[1]) > 0

    def _end_epoch(self) -> None:
        c, job = self.counters, self.job
        # batch-norm statistics differ by rank: all evaluate and save rank 0's
        collectives.from_first_(self.engine.module.buffers())
        rows = np.asarray(job.problem.shards.rows("validation"))
        predicted, truth = predict_rows(
            job.problem, self.engine.module, rows, job.config.batch_size, job.world
        )
        scores = score(predicted, truth)
        if not math.isfinite(scores.mae):
            raise TrialFailure("nan", f"validation error is {scores.mae} after epoch {c.epoch}")
        loss = float(collectives.sum_(self._loss.clone()))
        epoch = Epoch(
            epoch=c.epoch,
            step=c.step,
            samples=c.epoch * len(self.loader.rows) + len(self.loader.rows),
            train_loss=loss / len(self.loader.rows),
            validation_mae=scores.mae,
            validation_rmse=scores.rmse,
            validation_r2=scores.r2,
            learning_rate=learning_rate(self.config, c.step / self.total_steps),
            seconds=self._seconds,
            samples_per_s=self._rows_seen / self._seconds,
            data_wait=self._data_wait,
        )
        if scores.mae < c.best_mae:
            c.best_mae, c.best_epoch, c.best_step = scores.mae, c.epoch, c.step
        c.epoch += 1
        self._loss.zero_()
        self.history.append(epoch)
        # told first: killed between the two, an epoch is told twice rather than never
        with together(collectives.gather_objects):
            self.observer.on_epoch(epoch)
        self._save({"validation_mae": scores.mae, "validation_rmse": scores.rmse})

    def _save(self, metrics: dict[str, float]) -> None:
        """Checkpoint at this step, by rank 0; every rank gives its random states and loss share."""
        job, folder = self.job, self.job.checkpoints
        if folder is None:
            return
        self.counters.loss_sum = float(self._loss)
        ranks = collectives.gather_objects(
            {"random": checkpoint.random_states(job.device), "loss_sum": self.counters.loss_sum}
        )
        with together(collectives.gather_objects), writing(folder):
            if job.world.is_first:
                self._write(folder, ranks, metrics)

    def _write(self, folder: Path, ranks: list[Any], metrics: dict[str, float]) -> None:
        job = self.job
        meta = checkpoint.Meta(
            step=self.counters.step,
            epoch=self.counters.epoch,
            network=job.network,
            scale=job.problem.scale,
            task=job.problem.task.recipe_options(),
            data=job.problem.shards.manifest.identity,
            metrics=metrics,
        )
        state: dict[str, Any] = {
            "counters": asdict(self.counters),
            "optimizer": self.engine.optimizer.state_dict(),
            "order": asdict(self.loader.order),
            "ranks": ranks,
        }
        checkpoint.save(folder, meta, self.engine.module.state_dict(), state)
        best = folder / f"step-{self.counters.best_step:08d}"
        checkpoint.prune(folder, job.config.keep_checkpoints, best)

    def resume(self, warn: Callable[[str], None]) -> None:
        """Continue from the newest whole checkpoint, if there is one."""
        folder = self.job.checkpoints
        found = checkpoint.latest(folder, warn) if folder is not None else None
        if found is None:
            return
        now = self.job.problem.shards.manifest.identity
        recorded = checkpoint.read_meta(found, verify=False).data
        require_identity(recorded, now, maker=f"{found}")
        state = checkpoint.load_state(found)
        checkpoint.load_weights(found, self.engine.module)
        self.engine.optimizer.load_state_dict(state["optimizer"])
        self.counters = Counters(**state["counters"])
        c, batch_size = self.counters, self.config.batch_size
        position = (c.step - c.epoch * self.steps_per_epoch) * batch_size
        self.loader.continue_with(Order(**state["order"]), position)
        ranks, world = state["ranks"], self.job.world
        if len(ranks) == world.size:
            checkpoint.set_random_states(ranks[world.rank]["random"], self.job.device)
            self.counters.loss_sum = ranks[world.rank]["loss_sum"]
        else:
            warn(f"checkpoint of {len(ranks)} ranks continued on {world.size}: other dropout masks")
            total = sum(rank["loss_sum"] for rank in ranks)
            self.counters.loss_sum = total if world.is_first else 0.0
        self._loss.fill_(self.counters.loss_sum)


def _steps_between(steps: int, seconds: float) -> int:
    """Steps to the next agreement, if `steps` have taken `seconds`."""
    return max(1, min(AGREE_EVERY, int(AGREE_S * steps / max(seconds, 1e-9))))


def _loss(config: TrainConfig, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Loss of each row, scaled units."""
    match config.loss:
        case "mse":
            return functional.mse_loss(output, target, reduction="none")
        case "mae":
            return functional.l1_loss(output, target, reduction="none")
        case "huber":
            return functional.huber_loss(output, target, reduction="none")
