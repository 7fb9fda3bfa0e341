"""A training's state on disk: what is gathered from the ranks for a checkpoint, and its way back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dmi_hpc import checkpoint, collectives
from dmi_hpc.average import Average
from dmi_hpc.data.loader import Loader
from dmi_hpc.data.manifest import require_identity
from dmi_hpc.data.sampler import Order
from dmi_hpc.engine import Engine, EngineState
from dmi_hpc.errors import together
from dmi_hpc.files import writing
from dmi_hpc.job import Counters, Job
from dmi_hpc.writer import Writer

_RENAMED = {"best_mae": "best_error"}  # counters of earlier versions


class Saver:
    """Checkpoints of one training. Without a folder it saves nothing."""

    def __init__(self, job: Job, wrote: Callable[[dict[str, Any]], None]) -> None:
        """wrote: told by rank 0 of each checkpoint that is whole, when it has to do with the next."""
        self._job, self._wrote = job, wrote
        self.folder: Path | None = job.checkpoints
        self._writer: Writer | None = None
        if self.folder is not None and job.world.is_first:
            self._writer = Writer(self.folder, keep=job.config.keep_checkpoints)
        self.saved_at = time.monotonic()

    def copied(self) -> None:
        """Before anything changes weights or optimiser: what is being saved is as it was."""
        if self._writer is not None:
            self._writer.copied()

    def save(
        self,
        counters: Counters,
        engine: Engine,
        average: Average | None,
        order: Order,
        metrics: Mapping[str, float],
    ) -> None:
        """Collective: begin to write a checkpoint of this step by rank 0, beside the training.

        Each rank gives its random states and its share of the loss.
        """
        if self.folder is None:
            return
        ranks = collectives.gather_objects(
            {
                "random": checkpoint.random_states(self._job.device),
                "loss_sum": counters.loss_sum,
                "skipped_rows": counters.skipped_rows,
            }
        )
        state = engine.state()
        with together(collectives.gather_objects), writing(self.folder):
            if self._writer is not None:
                assert state is not None, "rank 0 has the state"
                meta = self._meta(counters, engine, metrics)
                self._begin(self._writer, meta, state, average, counters, order, ranks)
        self.saved_at = time.monotonic()

    def _meta(
        self, counters: Counters, engine: Engine, metrics: Mapping[str, float]
    ) -> checkpoint.Meta:
        job = self._job
        return checkpoint.Meta(
            step=counters.step,
            epoch=counters.epoch,
            network=job.network,
            scale=job.problem.scale,
            task=job.problem.task.recipe_options(),
            data=job.problem.shards.manifest.identity,
            metrics=metrics,
            recipe=job.recipe,
            ranks=job.world.size,
            engine="deepspeed" if engine.settings else "torch",
            zero_stage=engine.settings.get("zero_optimization", {}).get("stage", 0),
        )

    def _begin(
        self,
        writer: Writer,
        meta: checkpoint.Meta,
        state: EngineState,
        average: Average | None,
        counters: Counters,
        order: Order,
        ranks: list[Any],
    ) -> None:
        kept: dict[str, Any] = {
            "counters": asdict(counters),
            "optimizer": state.optimizer,
            "scaler": state.scaler,
            "order": asdict(order),
            "ranks": ranks,
        }
        weights = dict(state.weights)
        if average is not None:  # what is used is the mean; the training goes on with its own
            kept["weights"] = {name: state.weights[name] for name in average.weights()}
            weights.update(average.weights())
        writer.wait()
        self._tell()
        # all that carries the name of a trainable weight changes in an update only
        steady = state.optimizer.keys()
        writer.save(meta, weights, kept, best_step=counters.best_step, steady=steady)

    def close(self) -> None:
        """Wait until the last checkpoint is on disk. Raises what its writing has raised (DMIError)."""
        with together(collectives.gather_objects):
            if self._writer is not None:
                assert self.folder is not None, "a writer has a folder"
                with writing(self.folder), collectives.busy("a checkpoint"):
                    self._writer.close()
                self._tell()

    def _tell(self) -> None:
        if self._writer is not None and self._writer.last is not None:
            step, seconds = self._writer.last
            self._writer.last = None
            self._wrote({"step": step, "seconds": seconds})

    def abandon(self) -> None:
        """After an error, which is the one to show: let a write under way end."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


def restore(
    found: Path,
    job: Job,
    engine: Engine,
    average: Average | None,
    loader: Loader[Any],
    warn: Callable[[str], None],
) -> Counters:
    """Collective: continue exactly from the checkpoint `found`, which rank 0 reads for all."""
    state: dict[str, Any] | None = None
    weights: dict[str, torch.Tensor] = {}
    with together(collectives.gather_objects):
        if job.world.is_first:
            now = job.problem.shards.manifest.identity
            recorded = checkpoint.read_meta(found, verify=False).data
            require_identity(recorded, now, maker=f"{found}")
            state, weights = checkpoint.load_state(found), checkpoint.read_weights(found)
    small = None if state is None else {k: state[k] for k in ("counters", "order", "ranks")}
    shared = collectives.gather_objects(small)[0]
    known = {_RENAMED.get(name, name): value for name, value in shared["counters"].items()}
    counters = Counters(**known)
    if average is not None:
        with together(collectives.gather_objects):
            if job.world.is_first:
                mean = {name: weights[name] for name in average.weights() if name in weights}
                average.load(mean, counters.averaged)
        collectives.from_first_(average.weights().values())
        average.steps = counters.averaged
    held = None
    if state is not None:  # with a running mean, the training's own weights are kept apart
        own = {**weights, **state.get("weights", {})}
        held = EngineState(own, state["optimizer"], state["scaler"])
    engine.load(held)
    position = (counters.step - counters.epoch * loader.steps()) * job.config.batch_size
    loader.continue_with(Order(**shared["order"]), position)
    ranks, world = shared["ranks"], job.world
    if len(ranks) == world.size:
        mine = ranks[world.rank]
        checkpoint.set_random_states(mine["random"], job.device)
        counters.loss_sum, counters.skipped_rows = mine["loss_sum"], mine["skipped_rows"]
        return counters
    if world.is_first:
        warn(f"checkpoint of {len(ranks)} ranks continued on {world.size}: other dropout masks")
    counters.loss_sum = sum(r["loss_sum"] for r in ranks) if world.is_first else 0.0
    counters.skipped_rows = sum(r["skipped_rows"] for r in ranks) if world.is_first else 0
    return counters
