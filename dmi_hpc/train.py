"""The training story, top to bottom: epochs of global batches through an engine, until the
validation error stops falling. Runs alone, over ranks, or as one trial of a search.

Everything that decides the next step is in ``Counters``, the weights, the optimiser and the random
states, so a checkpoint continues exactly: the order of samples is a pure function of their position.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from dmi_hpc import checkpoint, collectives
from dmi_hpc.average import Average
from dmi_hpc.config import TrainConfig
from dmi_hpc.data.access import order_of
from dmi_hpc.data.device import to_device
from dmi_hpc.data.loader import Batch, Loader
from dmi_hpc.engine import Engine, make_engine, statistics_untouched
from dmi_hpc.errors import Interrupted, TrialFailure, together
from dmi_hpc.evaluate import evaluate_rows
from dmi_hpc.files import write_json, writing
from dmi_hpc.job import Counters, Epoch, Job, Observer, Result
from dmi_hpc.meters import Step
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import cost
from dmi_hpc.saving import Saver, restore
from dmi_hpc.schedule import drops_after, learning_rate
from dmi_hpc.transfer import freeze, start_from, train_mode

__all__ = ["Counters", "Epoch", "Job", "Observer", "Result", "fit"]

# Ranks agree on a stop signal and on a finite loss every so many steps (one small all-reduce), or
# after so many seconds if that is sooner.
AGREE_EVERY, AGREE_S = 10, 1.0


def fit(job: Job, observer: Observer, *, resume: bool, warn: Callable[[str], None]) -> Result:
    """Train `job` until its epochs are done or validation stops improving.

    Raises Interrupted after a checkpoint if the observer asked to stop, TrialFailure("nan") if the
    loss or gradient is not finite, NetworkError if the network cannot be built.
    """
    found: Path | None = None
    with together(collectives.gather_objects):
        if resume and job.checkpoints is not None and job.world.is_first:
            found = checkpoint.latest(job.checkpoints, warn)
    found = collectives.gather_objects(found)[0]
    with _deterministic(job.config.reproducible):
        training = _Training(job, observer, found, warn)
        try:
            result = training.run()
        except BaseException:
            training.saver.abandon()
            raise
        finally:
            training.engine.close()
    return result


class _Training:
    def __init__(
        self, job: Job, observer: Observer, found: Path | None, warn: Callable[[str], None]
    ) -> None:
        """found: the checkpoint to continue from."""
        self.job, self.config, self.observer = job, job.config, observer
        self.engine = self._make_engine(warn, fresh=found is None)
        torch.manual_seed(job.seed + 1 + job.world.rank)  # other dropout masks on each rank
        self.loader = self._make_loader()
        self.average: Average | None = None
        if self.config.average is not None:
            with self.engine.whole() as module:
                self.average = Average(module, self.config.average)
        self.saver = Saver(job, lambda values: observer.on_event("checkpoint", values))
        self.steps_per_epoch = self.loader.steps()
        self.counters = Counters()
        self.history: list[Epoch] = []
        # of the epoch, and of the steps since the last agreement; on the device, unread: reading a
        # loss each step would make a GPU wait
        self._loss = torch.zeros((), dtype=torch.float64, device=job.device)
        self._recent: list[torch.Tensor] = []
        self._agreed_step, self._agreed_time = 0, 0.0
        self._why: str | None = None  # this rank was asked to stop
        self._interval, self._save_due = 1, False  # steps to the next agreement, what it said
        if found is not None:
            self.counters = restore(found, job, self.engine, self.average, self.loader, warn)
            self._loss.fill_(self.counters.loss_sum)

    def _make_engine(self, warn: Callable[[str], None], *, fresh: bool) -> Engine:
        job, config = self.job, self.config
        torch.manual_seed(job.seed)  # the same weights on every rank
        module = build(job.network).to(job.device)
        notes: list[str] = []
        with together(collectives.gather_objects):
            if config.start is not None and fresh:
                report = start_from(module, config.start, job.problem.scale, warn)
                notes.append(str(report))
            if config.freeze:
                notes.append(f"frozen: {', '.join(freeze(module, config.freeze))}")
        engine = make_engine(module, config, job.world)
        for note in (*notes, *engine.notes):
            self.observer.on_event("decision", {"message": note})
        with together(collectives.gather_objects):
            if engine.settings and job.checkpoints is not None and job.world.is_first:
                folder = job.checkpoints.parent
                with writing(folder):
                    write_json(folder / "deepspeed.json", engine.settings)
        return engine

    def _make_loader(self) -> Loader[tuple[tuple[int, int], dict[str, torch.Tensor]]]:
        job = self.job
        shards, rows = job.problem.shards, job.problem.train_rows
        order = order_of(
            shards,
            job.problem.fields,
            len(rows),
            batch_size=job.config.batch_size,
            seed=job.seed,
            shuffle=job.problem.shuffle,
        )
        return Loader(
            shards,
            rows,
            job.problem.fields,
            # a window of shuffling follows the node's memory: rank 0's is everybody's
            collectives.gather_objects(order)[0],
            batch_size=job.config.batch_size,
            prepare=self._prepare,
            rank=job.world.rank,
            size=job.world.size,
            threads=job.config.loader_threads,
            pin=job.device.type == "cuda",
        )

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
            # this epoch's checkpoint is under way; only now, for one step has one checkpoint
            if (stop or self._agree()) and self.counters.epoch < self.config.epochs:
                raise self._interrupted()
        self.saver.close()
        c = self.counters
        return Result(
            best_mae=c.best_mae,
            best_epoch=c.best_epoch,
            epochs=c.epoch,
            steps=c.step,
            reason=reason,
            parameters=cost(self.job.network).parameters,
            history=tuple(self.history),
        )

    def _interrupted(self) -> Interrupted:
        self.saver.close()
        why = next(filter(None, collectives.gather_objects(self._why)))
        at = f"epoch {self.counters.epoch}, step {self.counters.step}"
        return Interrupted(f"stopped at {at}: {why}")

    def _patience_spent(self) -> bool:
        c, patience = self.counters, self.config.patience
        return patience is not None and c.epoch - 1 - c.best_epoch >= patience

    def _train_epoch(self) -> bool:
        """True if the ranks were asked to stop during its last steps."""
        c, started = self.counters, time.perf_counter()
        before = c.epoch * self.steps_per_epoch
        first, waited = c.step - before, 0.0
        drops = drops_after(self.config, c.validation)
        train_mode(self.engine.module)
        self._agreed_step, self._agreed_time = c.step, started
        batches = self.loader.epoch(c.epoch, first * self.config.batch_size)
        arriving = to_device(batches, self.job.device)
        while True:
            asked = time.perf_counter()
            arrived = next(arriving, None)
            waited_s = time.perf_counter() - asked
            waited += waited_s
            if arrived is None:
                break
            (rows, real), tensors = arrived
            self._rate = learning_rate(self.config, (c.step + 1) / self.total_steps, drops)
            loss, norm, skipped = self._step(rows, real, tensors)
            c.step += 1
            collectives.at(f"epoch {c.epoch}, step {c.step}")
            self.observer.on_step(
                Step(
                    epoch=c.epoch,
                    step=c.step - before,
                    steps_per_epoch=self.steps_per_epoch,
                    loss=loss / max(1, real),
                    rows=rows,
                    waited_s=waited_s,
                    learning_rate=self._rate,
                    norm=norm,
                    skipped=skipped,
                )
            )
            last = c.step - before == self.steps_per_epoch
            if not last and c.step - self._agreed_step >= self._interval:
                stop = self._agree()
                if stop or self._save_due:
                    self._save({})
                if stop:
                    raise self._interrupted()
        stop = self._agree()
        self._seconds = time.perf_counter() - started
        self._data_wait = waited / self._seconds
        self._rows_seen = max(0, len(self.loader.rows) - first * self.config.batch_size)
        return stop

    def _step(
        self, rows: int, real: int, tensors: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
        """One update: (this rank's summed loss over its rows, global gradient norm, skipped).

        rows: of the global batch; real: of this rank's share, the others pad it at weight 0.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._rate * group["lr_scale"]
        share = len(tensors["targets"])
        parts = min(self.config.accumulation, share)  # the same on all ranks
        losses = []
        for part in range(parts):
            start, stop = share * part // parts, share * (part + 1) // parts
            # padding would count in batch statistics; a part without rows keeps one
            here = slice(start, max(start + 1, min(stop, real)))
            whole = here == slice(0, share)
            inputs, targets, weights = (
                each if whole else each[here]
                for each in (tensors["inputs"], tensors["targets"], tensors["weights"])
            )
            with statistics_untouched(self.engine.module, rows=here.stop - start):
                output = self.engine(inputs).squeeze(1)
            per_row = _loss(self.config, output, targets)
            loss = per_row.sum() if real == share else (per_row * weights).sum()
            # engines average over ranks: rows of a ragged last batch still weigh the same
            self.engine.backward(loss * (self.job.world.size / rows), last=part == parts - 1)
            losses.append(loss.detach())
        summed = losses[0] if parts == 1 else torch.stack(losses).sum()
        self.saver.copied()
        update = self.engine.update()
        if update.skipped:
            # ZeRO skips by itself; a step that may be skipped still counts, or `_fail` would miscount
            fatal = self.config.not_finite == "fail" and self.config.precision != "fp16"
            self._recent.append(torch.full_like(summed, math.nan if fatal else 0.0))
            self.counters.skipped += 1
            self.counters.skipped_rows += real
            return summed, update.norm, True
        self._loss += summed
        self._recent.append(summed if update.norm is None else summed + 0 * update.norm)
        if self.average is not None:
            self.average.update(self.engine.whole)
            self.counters.averaged += 1
        return summed, update.norm, False

    def _prepare(self, batch: Batch) -> tuple[tuple[int, int], dict[str, torch.Tensor]]:
        """((rows of the global batch, real rows of this share), what a step needs).

        Runs in the loader's threads.
        """
        task, problem = self.job.problem.task, self.job.problem
        inputs = task.inputs(batch.fields)
        if self.config.augment:
            inputs = task.augment(inputs, batch.bits())
        arrays = {
            "inputs": inputs,
            "targets": problem.scale.scale(problem.target(batch.fields)),
            "weights": batch.weights,
        }
        real = int(batch.weights.sum())
        return (batch.stop - batch.start, real), {
            name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()
        }

    def _agree(self) -> bool:
        """All ranks together: fail on a loss that is not finite; True if one was asked to stop."""
        c = self.counters
        sums = torch.stack(self._recent).double() if self._recent else self._loss.reshape(1)
        finite = torch.isfinite(sums).tolist()  # waits for the device
        steps, seconds = c.step - self._agreed_step, time.perf_counter() - self._agreed_time
        pace = _steps_between(steps, seconds) if self.job.world.is_first and steps else 0
        every = self.config.checkpoint_s
        due = every is not None and time.monotonic() - self.saver.saved_at > every
        why = self.observer.must_stop()
        self._why = why or self._why
        mine = (not all(finite), why is not None, pace, due and self.job.world.is_first)
        shared: list[float] = collectives.sum_(
            torch.tensor(mine, dtype=torch.float64, device=self.job.device)
        ).tolist()
        if shared[0] > 0:
            self._fail(finite)
        self._recent.clear()
        self._interval, self._save_due = int(shared[2]) or self._interval, shared[3] > 0
        self._agreed_step, self._agreed_time = c.step, time.perf_counter()
        return shared[1] > 0

    def _fail(self, finite: list[bool]) -> None:
        """All ranks together: name the first step whose loss or gradient was not finite."""
        c, mine = self.counters, None
        if not all(finite):
            step = c.step - len(finite) + finite.index(False)
            position = (step - c.epoch * self.steps_per_epoch) * self.config.batch_size
            rows = self.loader.rows_of(c.epoch, position)
            mine = step, position, rows[:8].tolist(), len(rows)
        found = [
            (*where, rank)
            for rank, where in enumerate(collectives.gather_objects(mine))
            if where is not None
        ]
        step, position, rows, count, rank = min(found)
        more = " ..." if count > len(rows) else ""
        raise TrialFailure(
            "nan",
            f"loss or gradient is not finite at epoch {c.epoch} step {step}, rank {rank}: batch at "
            f"position {position} of the epoch, rows {' '.join(map(str, rows))}{more} of the data set",
        )

    def _end_epoch(self) -> None:
        c, job = self.counters, self.job
        # batch-norm statistics differ by rank: all evaluate and save rank 0's
        collectives.from_first_(self.engine.module.buffers())
        with self._evaluated() as module:
            scores = evaluate_rows(
                job.problem,
                module,
                job.problem.shards.rows("validation"),
                self.config.batch_size,
                job.world,
                threads=self.config.loader_threads,
            )
        if not math.isfinite(scores.mae):
            raise TrialFailure("nan", f"validation error is {scores.mae} after epoch {c.epoch}")
        totals = collectives.sum_(
            torch.stack([self._loss, torch.full_like(self._loss, c.skipped_rows)])
        )
        counted = len(self.loader.rows) - float(totals[1])
        epoch = Epoch(
            epoch=c.epoch,
            step=c.step,
            samples=(c.epoch + 1) * len(self.loader.rows),
            train_loss=float(totals[0]) / max(1.0, counted),
            validation_mae=scores.mae,
            validation_rmse=scores.rmse,
            validation_r2=scores.r2,
            learning_rate=self._rate,
            seconds=self._seconds,
            samples_per_s=self._rows_seen / self._seconds,
            data_wait=self._data_wait,
        )
        if scores.mae < c.best_mae:
            c.best_mae, c.best_epoch, c.best_step = scores.mae, c.epoch, c.step
        c.epoch += 1
        c.validation.append(scores.mae)
        c.skipped_rows = 0
        self._loss.zero_()
        self.history.append(epoch)
        # told first: killed between the two, an epoch is told twice rather than never
        with together(collectives.gather_objects):
            self.observer.on_epoch(epoch)
        self._save({"validation_mae": scores.mae, "validation_rmse": scores.rmse})

    @contextmanager
    def _evaluated(self) -> Iterator[nn.Module]:
        """The network that is judged: with the running mean of the weights, if there is one."""
        with self.engine.whole() as module:
            if self.average is None:
                yield module
                return
            self.saver.copied()
            with self.average.applied(module):
                yield module

    def _save(self, metrics: dict[str, float]) -> None:
        self.counters.loss_sum = float(self._loss)
        self.saver.save(self.counters, self.engine, self.average, self.loader.order, metrics)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Kernels that give the same bits each time, or an error that names the one that cannot."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


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
