"""Checkpoints written while the training goes on.

A step must not change what is being written, so the tensors are copied first, into host memory kept
for it: those that change with updates only while the next step computes its gradients. A thread does
this and the rest: it computes nothing in Python; copying, hashing, writing and fsync leave the
interpreter to the training.
"""

from __future__ import annotations

import time
from collections.abc import Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmi_hpc import checkpoint

Key = tuple[object, ...]  # path to a tensor in nested containers


class Writer:
    """Checkpoints in `folder`, at most one write under way. Not thread-safe.

    An OSError of a write is raised by the next save(), wait() or close(), once; its checkpoint is
    absent. Takes as much host memory as one checkpoint has bytes, from the first to close().
    """

    def __init__(self, folder: Path, *, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._buffers = _Buffers()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copied: Future[None] | None = None
        self._written: Future[None] | None = None
        self.last: tuple[int, float] | None = None  # step and seconds of the newest that is whole

    def save(
        self,
        meta: checkpoint.Meta,
        weights: Mapping[str, torch.Tensor],
        state: Mapping[str, Any],
        *,
        best_step: int,
        steady: Container[str] = (),
    ) -> None:
        """Begin to write the checkpoint ``step-N``, then to prune; waits for the write before it.

        state: nested mappings and sequences of tensors and plain values. best_step: of the
        checkpoint to keep beside the newest; -1 if there is none. steady: names whose tensors,
        ``weights[name]`` and all below ``[name]`` in `state`, must not change before `copied` has
        returned: trainable parameters, which only updates change. All else is copied when this
        returns. Tensors on a GPU may be changed by work queued later on the current stream.
        """
        self.wait()
        copies = self._buffers.begin({"weights": weights, "state": state}, steady)
        copied = self._copied = self._pool.submit(self._buffers.finish)
        self._written = self._pool.submit(self._write, copied, meta, copies, best_step)

    def copied(self) -> None:
        """Return when the steady tensors may change: to be called before all that changes them, an
        update or weights exchanged for a validation."""
        copied, self._copied = self._copied, None
        if copied is not None:
            copied.result()

    def wait(self) -> None:
        """Return when no write is under way."""
        self.copied()
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Wait, and give the memory back. Can be called again."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._buffers = _Buffers()

    @property
    def busy(self) -> bool:
        """True while a write is under way."""
        return self._written is not None and not self._written.done()

    def _write(
        self,
        copied: Future[None],
        meta: checkpoint.Meta,
        copies: Mapping[str, Any],
        best_step: int,
    ) -> None:
        started = time.monotonic()
        copied.result()  # raises what went wrong
        checkpoint.save(self._folder, meta, copies["weights"], copies["state"])
        best = self._folder / f"step-{best_step:08d}" if best_step >= 0 else None
        checkpoint.prune(self._folder, self._keep, best)
        self.last = meta.step, time.monotonic() - started


class _Buffers:
    """Host copies of tensors, in the same memory every time: a first touch costs five times more."""

    def __init__(self) -> None:
        self._tensors: dict[Key, torch.Tensor] = {}
        self._later: list[tuple[torch.Tensor, torch.Tensor]] = []  # copies still to make, of what
        self._stream: torch.cuda.Stream | None = None  # that tensors of a GPU come by
        self._arrival: torch.cuda.Event | None = None

    def begin(self, tree: Mapping[str, Any], steady: Container[str]) -> dict[str, Any]:
        """`tree` with its tensors copied, but the steady ones on the CPU; these, and what is on its
        way from a GPU, are there after `finish`. Valid until the next call."""
        before, self._tensors, self._later = self._tensors, {}, []
        copies: dict[str, Any] = self._copied(tree, (), before, steady)
        self._arrival = self._stream.record_event() if self._stream is not None else None
        return copies

    def finish(self) -> None:
        """By any thread."""
        for copy, tensor in self._later:
            np.copyto(_bytes(copy), _bytes(tensor))  # torch would bring threads of its own
        self._later = []
        if self._arrival is not None:
            self._arrival.synchronize()

    def _copied(
        self, value: Any, key: Key, before: Mapping[Key, torch.Tensor], steady: Container[str]
    ) -> Any:
        match value:
            case torch.Tensor():
                copy = before.get(key)
                if copy is None or (copy.shape, copy.dtype) != (value.shape, value.dtype):
                    copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
                self._tensors[key] = copy
                if not value.is_cuda and any(name in steady for name in key):
                    self._later.append((copy, value.detach()))
                    return copy
                if value.is_cuda:
                    self._stream = torch.cuda.current_stream(value.device)
                return copy.copy_(value.detach(), non_blocking=value.is_cuda)
            case Mapping():
                return {k: self._copied(v, (*key, k), before, steady) for k, v in value.items()}
            case list() | tuple():
                items = [self._copied(v, (*key, i), before, steady) for i, v in enumerate(value)]
                return items if isinstance(value, list) else tuple(items)
            case _:
                return value


def _bytes(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return tensor.reshape(-1).view(torch.uint8).numpy()
