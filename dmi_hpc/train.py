"""The training story, top to bottom: epochs of global batches through an engine, until the
validation error stops falling. Runs alone, over ranks, or as one trial of a search.

Everything that decides the next step is in ``Counters``, the weights, the optimiser and the random
states, so a checkpoint continues exactly: the order of samples is a pure function of their position.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import nn

from dmi_hpc import checkpoint, collectives
from dmi_hpc.agreement import Agreement, Decision
from dmi_hpc.average import Average
from dmi_hpc.batches import make_loader, micro_batch_sizes, micro_batches, training_inputs
from dmi_hpc.data.device import to_device
from dmi_hpc.engine import Engine, make_engine, statistics_untouched
from dmi_hpc.errors import Interrupted, RecipeError, TrialFailure, counted, together
from dmi_hpc.evaluate import evaluate_rows
from dmi_hpc.files import write_json, writing
from dmi_hpc.job import Counters, Epoch, Job, Observer, Result
from dmi_hpc.losses import row_losses
from dmi_hpc.meters import NoiseScale, Step
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import cost
from dmi_hpc.models.graphs import inputs_of
from dmi_hpc.models.vectors import set_standardization
from dmi_hpc.saving import Saver, restore
from dmi_hpc.schedule import drops_after, learning_rate
from dmi_hpc.transfer import freeze, start_from, train_mode

__all__ = ["Counters", "Epoch", "Job", "Observer", "Result", "fit"]


def fit(job: Job, observer: Observer, *, resume: bool, warn: Callable[[str], None]) -> Result:
    """Train `job` until its epochs are done or validation stops improving.

    Raises Interrupted after a checkpoint if the observer asked to stop, TrialFailure("nan") if the
    loss or gradient is not finite, a DMIError if the job cannot be had as it is given.
    """
    found: Path | None = None
    with together(collectives.gather_objects):
        if resume and job.checkpoints is not None and job.world.is_first:
            found = checkpoint.latest(job.checkpoints, warn)
    found = collectives.gather_objects(found)[0]
    with _deterministic(job.config.reproducible):
        module, notes = _network(job, warn, fresh=found is None)
        with closing(make_engine(module, job.config, job.world)) as engine:
            _tell(engine, notes, job, observer)
            training = _Training(job, observer, engine)
            try:
                if found is not None:
                    training.restore(found, warn)
                return training.run()
            except BaseException:
                training.saver.abandon()
                raise


def _network(job: Job, warn: Callable[[str], None], *, fresh: bool) -> tuple[nn.Module, list[str]]:
    """The network to train, and what was taken over and frozen of it, a sentence each."""
    config, notes = job.config, list[str]()
    torch.manual_seed(job.seed)  # the same weights on every rank
    module = build(job.network).to(job.device)
    if job.network.standardize and fresh:
        with together(collectives.gather_objects):
            if job.world.is_first:
                set_standardization(module, training_inputs(job.problem))
        collectives.from_first_(module.buffers())
    with together(collectives.gather_objects):
        if config.start is not None and fresh:
            report = start_from(module, config.start, job.problem.scale, warn)
            notes.append(str(report))
        if config.freeze:
            notes.append(f"frozen: {', '.join(freeze(module, config.freeze))}")
    return module, notes


def _tell(engine: Engine, notes: Sequence[str], job: Job, observer: Observer) -> None:
    """Say what was decided, and keep the configuration that DeepSpeed got."""
    for note in (*notes, *engine.notes):
        observer.on_event("decision", {"message": note})
    with together(collectives.gather_objects):
        if engine.settings and job.checkpoints is not None and job.world.is_first:
            folder = job.checkpoints.parent
            with writing(folder):
                write_json(folder / "deepspeed.json", engine.settings)


class _Training:
    def __init__(self, job: Job, observer: Observer, engine: Engine) -> None:
        self.job, self.config, self.observer, self.engine = job, job.config, observer, engine
        torch.manual_seed(job.seed + 1 + job.world.rank)  # other dropout masks on each rank
        self.loader = make_loader(job)
        self.average: Average | None = None
        if self.config.average is not None:
            with self.engine.whole() as module:
                self.average = Average(module, self.config.average)
        self.noise = _noise_scale(job, engine)
        self.saver = Saver(job, lambda values: observer.on_event("checkpoint", values))
        self.agreement = Agreement(self.loader, job.world, job.device, observer.must_stop)
        self.steps_per_epoch = self.loader.steps()
        self.counters = Counters()
        self.history: list[Epoch] = []
        # of the epoch; on the device, unread: reading a loss each step would make a GPU wait
        self._loss = torch.zeros((), dtype=torch.float64, device=job.device)

    def restore(self, found: Path, warn: Callable[[str], None]) -> None:
        """Continue from the checkpoint `found`."""
        self.counters = restore(found, self.job, self.engine, self.average, self.loader, warn)
        self._loss.fill_(self.counters.loss_sum)

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
            metrics = self._end_epoch()
            decided, more = self._agree(), self.counters.epoch < self.config.epochs
            stop = (stop or decided.stop) and more
            if self.job.saves_epochs or stop or (decided.save and more):
                self._save(metrics)
            if stop:
                raise self._interrupted()
        self.saver.close()
        c = self.counters
        return Result(
            best_error=c.best_error,
            best_epoch=c.best_epoch,
            epochs=c.epoch,
            steps=c.step,
            reason=reason,
            parameters=cost(self.job.network).parameters,
            history=tuple(self.history),
        )

    def _interrupted(self) -> Interrupted:
        self.saver.close()
        at = f"epoch {self.counters.epoch}, step {self.counters.step}"
        return Interrupted(f"stopped at {at}: {self.agreement.why()}")

    def _agree(self) -> Decision:
        every = self.config.checkpoint_s
        due = every is not None and time.monotonic() - self.saver.saved_at > every
        return self.agreement.reach(self.counters.step, save=due)

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
        self.agreement.begin(c.step)
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
                    noise=self.noise,
                )
            )
            last = c.step - before == self.steps_per_epoch
            if not last and self.agreement.is_due(c.step):
                decided = self._agree()
                if decided.stop or decided.save:
                    self._save({})
                if decided.stop:
                    raise self._interrupted()
        stop = self._agree().stop
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
        share, given = len(tensors["targets"]), inputs_of(tensors)
        parts = micro_batches(share, real, self.config.accumulation)
        losses = []
        for number, part in enumerate(parts, 1):
            whole = part == slice(0, share)
            inputs = given if whole else given[part]
            targets, weights = (
                each if whole else each[part] for each in (tensors["targets"], tensors["weights"])
            )
            with statistics_untouched(self.engine.module, rows=part.stop - part.start):
                output = self.engine(inputs)
            per_row = row_losses(self.config, self.job.problem.scale, output, targets, inputs)
            loss = per_row.sum() if real == share else (per_row * weights).sum()
            # engines average over ranks: rows of a ragged last batch still weigh the same
            self.engine.backward(loss * (self.job.world.size / rows), last=number == len(parts))
            losses.append(loss.detach())
        summed = losses[0] if len(parts) == 1 else torch.stack(losses).sum()
        self.saver.copied()
        update = self.engine.update()
        if update.skipped:
            # ZeRO skips by itself; each step adds one, for a failing one is found by counting
            fatal = self.config.not_finite == "fail" and self.config.precision != "fp16"
            self.agreement.add(torch.full_like(summed, math.nan if fatal else 0.0))
            self.counters.skipped += 1
            self.counters.skipped_rows += real
            return summed, update.norm, True
        self._loss += summed
        self.agreement.add(summed if update.norm is None else summed + 0 * update.norm)
        if self.noise is not None and update.squares is not None and rows == self.noise.samples:
            self.noise.add(*update.squares)
        if self.average is not None:
            self.average.update(self.engine.whole)
            self.counters.averaged += 1
        return summed, update.norm, False

    def _end_epoch(self) -> dict[str, float]:
        """Judge the network and tell the observer; returns what its checkpoint is to say."""
        c, job = self.counters, self.job
        # batch-norm statistics differ by rank: all evaluate and save rank 0's
        collectives.from_first_(self.engine.module.buffers())
        with self._evaluated() as module:
            scores = evaluate_rows(
                job.problem,
                module,
                job.problem.shards.rows("validation"),
                # no more rows at once than a step computes: memory may not hold them
                -(-self.config.batch_size // self.config.accumulation),
                job.world,
                threads=self.config.loader_threads,
            )
        if not math.isfinite(scores.error):
            raise TrialFailure("nan", f"validation error is {scores.error} after epoch {c.epoch}")
        totals = collectives.sum_(
            torch.stack([self._loss, torch.full_like(self._loss, c.skipped_rows)])
        )
        counted = len(self.loader.rows) - float(totals[1])
        epoch = Epoch(
            epoch=c.epoch,
            step=c.step,
            samples=(c.epoch + 1) * len(self.loader.rows),
            train_loss=float(totals[0]) / max(1.0, counted),
            validation_error=scores.error,
            validation_rmse=scores.rmse,
            validation_r2=scores.r2,
            learning_rate=self._rate,
            seconds=self._seconds,
            samples_per_s=self._rows_seen / self._seconds,
            data_wait=self._data_wait,
            validation_mae=scores.mae if scores.mae != scores.error else None,
            validation_auc=scores.auc,
            validation_accuracy=scores.accuracy,
            validation_force_mae=scores.force_mae,
        )
        if scores.error < c.best_error:
            c.best_error, c.best_epoch, c.best_step = scores.error, c.epoch, c.step
        c.epoch += 1
        c.validation.append(scores.error)
        c.skipped_rows = 0
        self._loss.zero_()
        self.history.append(epoch)
        # told first: killed between the two, an epoch is told twice rather than never
        with together(collectives.gather_objects):
            self.observer.on_epoch(epoch)
        return {"validation_error": scores.error, "validation_rmse": scores.rmse}

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
    if not wanted or before:
        yield  # the switch alone imports torch's compiler: a second of every start
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _noise_scale(job: Job, engine: Engine) -> NoiseScale | None:
    """The meter that the recipe asks for. RecipeError where there is nothing to take it from."""
    config, ranks = job.config, job.world.size
    if not config.noise_scale:
        return None
    rows = min(config.batch_size, len(job.problem.train_rows))
    sizes = micro_batch_sizes(rows, ranks, config.accumulation)
    if engine.settings:
        raise RecipeError(
            "train.noise_scale is true, but the engine is DeepSpeed, which does not show the gradients "
            'of micro-batches: set engine = "torch", or noise_scale = false'
        )
    if len(sizes) < 2:
        raise RecipeError(
            "train.noise_scale is true, but a batch is computed in one part "
            f"({counted(ranks, 'rank')}, accumulation {config.accumulation}, "
            f"{counted(rows, 'row')}): expected at least 2, whose gradients are compared; set "
            "accumulation = 2, or start more ranks, or set noise_scale = false"
        )
    return NoiseScale(sizes)
