"""Batches on their way to a device; a GPU is played by plain objects."""

import contextlib
import types
import weakref

import pytest
import torch

from dmi_hpc.data import device


def test_to_device_of_a_cpu_gives_the_tensors_themselves():
    batches = [(k, {"x": torch.ones(2)}) for k in range(3)]
    found = list(device.to_device(iter(batches), torch.device("cpu")))
    assert [key for key, _ in found] == [0, 1, 2]
    for (_, given_), (_, moved) in zip(batches, found, strict=True):
        assert moved["x"] is given_["x"]


class Move:
    """A copy under way from page-locked memory."""

    def __init__(self, gpu, pinned):
        self.key, self.done = pinned.key, False
        self.source = weakref.ref(pinned, lambda _: self.done or gpu.broken.append(self.key))


class Gpu:
    """Keeps the rules of CUDA that the copies rely on, not its arithmetic.

    A copy is done when its stream is waited for; if its source is given back before, it is broken.
    """

    def __init__(self, monkeypatch):
        self.running, self.current, self.waited_for, self.broken = [], "main", [], []
        for name in ("Stream", "Event", "stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, _):
        return types.SimpleNamespace(synchronize=self.synchronize)

    def synchronize(self):
        for move in self.running:
            move.done = True
        self.running.clear()

    @contextlib.contextmanager
    def stream(self, _):
        self.current = "copies"
        yield
        self.current = "main"

    def Event(self):
        event = types.SimpleNamespace(before=[])
        event.record = lambda _: event.before.extend(self.running)
        event.query = lambda: all(move.done for move in event.before)
        return event

    def current_stream(self, _):
        return types.SimpleNamespace(wait_event=self.waited_for.append)


class Pinned:
    """A page-locked tensor."""

    def __init__(self, gpu, key):
        self.gpu, self.key = gpu, key

    def to(self, _, non_blocking):
        assert non_blocking
        assert self.gpu.current == "copies"
        self.gpu.running.append(Move(self.gpu, self))
        streams = []
        return types.SimpleNamespace(key=self.key, streams=streams, record_stream=streams.append)


def copies(gpu, count):
    for key in range(count):
        gpu.made = key + 1
        yield key, {"x": Pinned(gpu, key)}


GPU = types.SimpleNamespace(type="cuda")


def test_copies_to_a_gpu_run_one_batch_ahead(monkeypatch):
    gpu, keys = Gpu(monkeypatch), []
    for key, tensors in device.to_device(copies(gpu, 5), GPU):
        keys.append(key)
        assert tensors["x"].key == key
        assert gpu.made == min(key + 2, 5)  # the next one is under way
        assert len(gpu.waited_for) == key + 1  # the step's stream waits for this copy
        assert gpu.waited_for[-1].before[-1].key == key
        assert len(tensors["x"].streams) == 1  # and its memory is recorded there
        assert gpu.broken == []  # nothing is done yet: no buffer may be read into again
    assert keys == [0, 1, 2, 3, 4]
    assert (gpu.running, gpu.broken) == ([], [])


def test_buffers_are_given_back_when_their_copies_are_done(monkeypatch):
    gpu = Gpu(monkeypatch)
    moves = []
    for key, _ in device.to_device(copies(gpu, 9), GPU):
        moves += [move for move in gpu.running if move not in moves]
        alive = [move.key for move in moves if move.source() is not None]
        if key == 3:
            assert alive == [0, 1, 2, 3, 4]
            gpu.synchronize()
        if key == 5:
            # 4 is the last that was asked about; of 5 and 6 the copies are under way
            assert alive == [5, 6]
    assert gpu.broken == []


@pytest.mark.parametrize("how", ["left", "failed"])
def test_no_copy_is_under_way_when_the_loop_has_ended(monkeypatch, how):
    gpu = Gpu(monkeypatch)

    def batches():
        yield from copies(gpu, 3)
        raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        for key, _ in device.to_device(batches(), GPU):
            if how == "left" and key == 1:
                break
    assert (gpu.running, gpu.broken) == ([], [])
