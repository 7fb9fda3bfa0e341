"""Batches on their way to a device, one copy ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

K = TypeVar("K")


def to_device(
    batches: Iterator[tuple[K, dict[str, Tensor]]], device: torch.device
) -> Iterator[tuple[K, dict[str, Tensor]]]:
    """(key, tensors) with the tensors on `device`.

    On a GPU the next batch is copied on a stream of its own while this one is worked on. Page-locked
    buffers stay held until their copy is done: not before are they read into again.
    """
    if device.type == "cpu":
        yield from batches
        return
    if device.type != "cuda":
        for key, tensors in batches:
            yield key, {name: tensor.to(device) for name, tensor in tensors.items()}
        return
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    waiting: deque[tuple[K, dict[str, Tensor], dict[str, Tensor], Any]] = deque()
    copying: deque[tuple[dict[str, Tensor], Any]] = deque()
    try:
        for key, tensors in batches:
            with torch.cuda.stream(stream):
                moved = {n: tensor.to(device, non_blocking=True) for n, tensor in tensors.items()}
                done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(stream)
            waiting.append((key, moved, tensors, done))
            if len(waiting) > 1:
                yield _ready(waiting, copying, device)
        while waiting:
            yield _ready(waiting, copying, device)
    finally:
        stream.synchronize()  # also if the loop was left: buffers must not be free before


def _ready(
    waiting: deque[tuple[K, dict[str, Tensor], dict[str, Tensor], Any]],
    copying: deque[tuple[dict[str, Tensor], Any]],
    device: torch.device,
) -> tuple[K, dict[str, Tensor]]:
    key, moved, source, done = waiting.popleft()
    current = torch.cuda.current_stream(device)
    current.wait_event(done)
    for tensor in moved.values():
        tensor.record_stream(current)  # its memory was allotted on the other stream
    copying.append((source, done))
    while copying and copying[0][1].query():
        copying.popleft()
    return key, moved
