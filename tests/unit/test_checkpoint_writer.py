"""Writing beside the training: what is written, what is waited for, where errors come out."""

import errno
import threading

import pytest
import torch
from checkpoint_victims import meta_of, weights_of
from toy_disk import read_only, room, small_disk

from dmi_hpc import checkpoint
from dmi_hpc import writer as writer_module
from dmi_hpc.errors import RunError
from dmi_hpc.files import writing
from dmi_hpc.writer import Writer

LARGE = 50_000  # numbers of the state; 200 kB


@pytest.fixture
def writer(tmp_path):
    made = Writer(tmp_path / "checkpoints", keep=2)
    yield made
    made.close()


@pytest.fixture
def gate(monkeypatch):
    """Writes wait at it."""
    opened, real = threading.Event(), checkpoint.save

    def slow(*arguments):
        assert opened.wait(20)
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    yield opened
    opened.set()


def state_of(value):
    return {
        "optimizer": {"0.weight": {"exp_avg": torch.full((LARGE,), float(value))}},
        "order": (1, [2, "three"], None),
    }


def save(writer, step, mae=None, best_step=-1):
    writer.save(meta_of(step, mae), weights_of(step), state_of(step), best_step=best_step)


def names(folder):
    return [path.name for path in sorted(folder.iterdir())]


def test_steps_do_not_change_what_is_being_written(writer, gate, tmp_path):
    weights, state = weights_of(1), state_of(1)
    writer.save(meta_of(1), weights, state, best_step=-1)
    assert writer.busy
    assert not (tmp_path / "checkpoints").exists()
    for tensor in (*weights.values(), state["optimizer"]["0.weight"]["exp_avg"]):
        tensor.zero_()
    gate.set()
    writer.wait()
    assert not writer.busy
    path = tmp_path / "checkpoints" / "step-00000001"
    checkpoint.read_meta(path)
    found = checkpoint.load_state(path)
    assert found["optimizer"]["0.weight"]["exp_avg"].min() == 1
    assert found["order"] == (1, [2, "three"], None)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2))
    checkpoint.load_weights(path, module)
    assert module[0].weight.detach().min() == 1


def test_steady_tensors_are_copied_before_copied_returns(writer, monkeypatch, tmp_path):
    """And only those: buffers change with the forward pass."""
    opened, real = threading.Event(), writer_module._bytes

    def slow(tensor):
        assert opened.wait(20)
        return real(tensor)

    monkeypatch.setattr(writer_module, "_bytes", slow)
    weights, state, view = weights_of(1), state_of(1), torch.arange(6.0).reshape(2, 3).T
    state["average"] = {"0.weight": view, "steps": torch.tensor(3)}
    writer.save(meta_of(1), weights, state, best_step=-1, steady={"0.weight"})
    weights["0.bias"].zero_()
    state["average"]["steps"].zero_()
    updating = threading.Thread(target=writer.copied)
    updating.start()
    updating.join(0.2)
    assert updating.is_alive()
    opened.set()
    updating.join(20)
    weights["0.weight"].zero_()
    state["optimizer"]["0.weight"]["exp_avg"].zero_()
    writer.wait()
    path = tmp_path / "checkpoints" / "step-00000001"
    module, found = torch.nn.Sequential(torch.nn.Linear(3, 2)), checkpoint.load_state(path)
    checkpoint.load_weights(path, module)
    assert all(torch.equal(v, weights_of(1)[k]) for k, v in module.state_dict().items())
    assert found["optimizer"]["0.weight"]["exp_avg"].min() == 1
    assert torch.equal(found["average"]["0.weight"], torch.arange(6.0).reshape(2, 3).T)
    assert found["average"]["steps"] == 3


def test_what_was_not_copied_is_not_written(writer, monkeypatch, tmp_path):
    def fails(tensor):
        raise RuntimeError("device lost")

    monkeypatch.setattr(writer_module, "_bytes", fails)
    writer.save(meta_of(1), weights_of(1), state_of(1), best_step=-1, steady={"0.weight"})
    with pytest.raises(RuntimeError, match="device lost"):
        writer.copied()
    with pytest.raises(RuntimeError, match="device lost"):
        writer.wait()
    assert not (tmp_path / "checkpoints").exists()


def test_a_second_save_waits_for_the_first(writer, gate, tmp_path):
    save(writer, 1)
    second = threading.Thread(target=save, args=(writer, 2))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.set()
    second.join(20)
    writer.wait()
    for step in (1, 2):
        path = tmp_path / "checkpoints" / f"step-{step:08d}"
        state = checkpoint.load_state(path)["optimizer"]["0.weight"]["exp_avg"]
        assert (float(state.min()), float(state.max())) == (step, step)


def test_the_memory_of_the_copies_is_used_again_and_fits_other_shapes(writer, monkeypatch):
    made, real = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: made.append(a) or real(*a, **k))
    for step in (1, 2, 3):
        save(writer, step)
    writer.wait()
    assert len(made) == 3
    writer.save(meta_of(4), {"0.weight": torch.zeros(5)}, state_of(4), best_step=-1)
    writer.wait()
    assert len(made) == 4


def test_old_ones_go_and_the_best_stays(writer, tmp_path):
    for step, mae in ((1, 0.1), (2, 0.5), (3, None), (4, None)):
        save(writer, step, mae, best_step=1)
    writer.close()
    assert names(tmp_path / "checkpoints") == [f"step-0000000{step}" for step in (1, 3, 4)]


@pytest.mark.parametrize("size", [0, 40, 160, 1_000, 100_000, 200_500])
def test_a_full_disk_comes_out_at_the_next_call_and_leaves_the_old_one_whole(
    writer, tmp_path, size
):
    folder = tmp_path / "checkpoints"
    save(writer, 1)
    writer.wait()
    with room(size):
        save(writer, 2)
        with pytest.raises(OSError, match=r"No space left") as caught:
            save(writer, 3)
    assert caught.value.errno == errno.ENOSPC
    assert names(folder) == ["step-00000001"]
    checkpoint.read_meta(folder / "step-00000001")
    save(writer, 4)  # told once; there is room again
    writer.close()
    assert names(folder) == ["step-00000001", "step-00000004"]


def test_a_disk_that_is_really_full(tmp_path):
    with small_disk(tmp_path / "disk", 512 * 1024) as folder:
        writer = Writer(folder, keep=5)
        save(writer, 1)
        save(writer, 2)
        save(writer, 3)
        with pytest.raises(RunError, match=r"no space left .*with --resume"), writing(folder):
            writer.close()
        assert names(folder) == ["step-00000001", "step-00000002"]
        assert checkpoint.latest(folder, print) == folder / "step-00000002"
        writer.close()  # told once


def test_a_folder_that_cannot_be_written_to(writer, tmp_path):
    folder = tmp_path / "checkpoints"
    save(writer, 1)
    writer.wait()
    with read_only(folder):
        save(writer, 2)
        with pytest.raises(RunError, match=r"checkpoints: cannot write: "), writing(folder):
            writer.wait()
        assert checkpoint.latest(folder, print) == folder / "step-00000001"


def test_a_closed_writer_refuses(writer):
    writer.close()
    with pytest.raises(RuntimeError, match="after shutdown"):
        save(writer, 1)
