"""What a checkpoint's folder holds, which ones are used, which are passed over."""

import json

import pytest
import torch
from checkpoint_victims import meta_of, weights_of
from safetensors.torch import load_file, save_file

from dmi_hpc import checkpoint
from dmi_hpc.errors import CheckpointError, FormatVersionError

STATE = {
    "optimizer": {"0.weight": {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}},
    "counters": {"epoch": 1, "best_error": float("inf")},
    "ranks": [{"random": {"cpu": torch.get_rng_state()}, "loss_sum": 0.5}],
}


def saved(folder, step, mae=None, **more):
    return checkpoint.save(folder, meta_of(step, mae, **more), weights_of(step), STATE)


def damage(path):
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_all_that_was_saved_comes_back(tmp_path):
    path = saved(tmp_path, 7, 0.25, recipe="abc", ranks=4, engine="deepspeed", zero_stage=2)
    meta = checkpoint.read_meta(path)
    assert (meta.version, meta.step, meta.metrics) == (2, 7, {"validation_error": 0.25})
    assert (meta.recipe, meta.ranks, meta.engine, meta.zero_stage) == ("abc", 4, "deepspeed", 2)
    assert meta.software["torch"] == torch.__version__
    assert {"dmi-hpc", "deepspeed"} <= set(meta.software)
    state = checkpoint.load_state(path)
    assert state["counters"] == STATE["counters"]
    assert torch.equal(state["ranks"][0]["random"]["cpu"], STATE["ranks"][0]["random"]["cpu"])
    assert torch.equal(state["optimizer"]["0.weight"]["exp_avg"], torch.ones(2, 3))
    assert {p.name for p in path.iterdir()} == {
        "weights.safetensors",
        "state.pt",
        "checkpoint.json",
    }
    assert torch.equal(load_file(path / checkpoint.WEIGHTS)["0.bias"], torch.full((2,), -7.0))


def test_the_weights_file_is_what_safetensors_itself_writes(tmp_path):
    """Every dtype, a scalar, no rows, a transposed view."""
    tensors = {
        f"{dtype}"[6:]: torch.arange(6).reshape(2, 3).to(dtype) for dtype in checkpoint._DTYPES
    }
    tensors |= {"scalar": torch.tensor(1.5), "none": torch.empty(0, 3)}
    tensors["view"] = torch.arange(6.0).reshape(2, 3).T
    tensors["grad"] = torch.ones(2, requires_grad=True)
    path = checkpoint.save(tmp_path, meta_of(1), tensors, {}) / checkpoint.WEIGHTS
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, tmp_path / "theirs")
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()


def test_large_tensors_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 64)
    tensors = {"large": torch.randn(100, 7, generator=torch.Generator().manual_seed(0))}
    path = checkpoint.save(tmp_path, meta_of(1), tensors, {"large": tensors["large"]})
    checkpoint.read_meta(path)
    assert torch.equal(load_file(path / checkpoint.WEIGHTS)["large"], tensors["large"])
    assert torch.equal(checkpoint.load_state(path)["large"], tensors["large"])


@pytest.mark.parametrize("name", [checkpoint.WEIGHTS, checkpoint.STATE, checkpoint.META])
@pytest.mark.parametrize("harm", ["changed", "short", "empty", "missing"])
def test_a_damaged_one_is_named_and_the_one_before_it_is_used(tmp_path, name, harm):
    for step in (1, 2):
        saved(tmp_path, step, mae=1 / step)
    path = tmp_path / "step-00000002" / name
    match harm:
        case "changed":
            content = path.read_bytes()
            path.write_bytes(content.replace(b'"step"', b'"stop"'))
            if path.read_bytes() == content:
                damage(path)
        case "short":
            path.write_bytes(path.read_bytes()[:-3])
        case "empty":
            path.write_bytes(b"")
        case "missing":
            path.unlink()
    told = []
    assert checkpoint.latest(tmp_path, told.append) == tmp_path / "step-00000001"
    assert len(told) == 1
    assert str(path.parent) in told[0]
    assert "using the checkpoint before it" in told[0]
    assert checkpoint.best(tmp_path, told.append)[0] == tmp_path / "step-00000001"


def test_without_its_digests_a_checkpoint_is_not_whole(tmp_path):
    path = saved(tmp_path, 1)
    raw = json.loads((path / checkpoint.META).read_text())
    (path / checkpoint.META).write_text(json.dumps({**raw, "files": {}}))
    with pytest.raises(CheckpointError, match="expected none"):
        checkpoint.read_meta(path)


@pytest.mark.parametrize("content", ["[]", "null", "3", "{", "\udcff"])
def test_what_is_no_description_is_no_checkpoint(tmp_path, content):
    path = saved(tmp_path, 1)
    (path / checkpoint.META).write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        checkpoint.read_meta(path)


def test_one_within_an_epoch_is_the_newest_but_not_the_best(tmp_path):
    for step, mae in ((10, 0.5), (20, 0.7), (25, None)):
        saved(tmp_path, step, mae)
    assert checkpoint.latest(tmp_path, print) == tmp_path / "step-00000025"
    assert checkpoint.best(tmp_path, print)[0] == tmp_path / "step-00000010"
    checkpoint.prune(tmp_path, 1, tmp_path / "step-00000010")
    assert [p.name for p in checkpoint.all_in(tmp_path)] == ["step-00000010", "step-00000025"]
    assert len(list(tmp_path.iterdir())) == 2


def test_none_of_a_finished_epoch_is_an_error_for_the_user(tmp_path):
    saved(tmp_path, 25)
    with pytest.raises(CheckpointError, match="no whole checkpoint of a finished epoch"):
        checkpoint.best(tmp_path, print)


@pytest.mark.parametrize(
    ("before", "again"),
    [
        ({"mae": 0.5}, False),  # the same: what cannot be made again is not touched
        ({"mae": None}, True),  # it would not count as a finished epoch
        ({"mae": 0.5, "version": 1}, True),  # it could not be continued from
    ],
)
def test_the_same_step_is_written_again_only_if_that_adds_something(tmp_path, before, again):
    path = saved(tmp_path, 5, **before)
    inode = path.stat().st_ino
    saved(tmp_path, 5, mae=0.5)
    assert (path.stat().st_ino != inode) == again
    assert checkpoint.read_meta(path).metrics == {"validation_error": 0.5}
    checkpoint.load_state(path)


def test_format_1_is_read_for_prediction_and_refused_for_training(tmp_path):
    path = saved(tmp_path, 3, mae=0.5)
    file = path / checkpoint.META
    raw = json.loads(file.read_text())
    new = ("recipe", "software", "ranks", "engine", "zero_stage")
    file.write_text(json.dumps({k: v for k, v in raw.items() if k not in new} | {"version": 1}))
    module = torch.nn.Sequential(torch.nn.Linear(3, 2))
    found, meta = checkpoint.best(tmp_path, print)
    checkpoint.load_weights(found, module)
    assert (meta.version, meta.software) == (1, {})
    assert torch.equal(module[0].bias.detach(), torch.full((2,), -3.0))
    with pytest.raises(CheckpointError, match=r"checkpoint format 1.*train\.start\.path"):
        checkpoint.load_state(path)


def test_newer_formats_are_refused(tmp_path):
    path = saved(tmp_path, 1, version=3)
    with pytest.raises(FormatVersionError, match="format 3, this DMI-HPC reads up to 2"):
        checkpoint.read_meta(path)


def test_weights_of_another_network_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not fit the network"):
        checkpoint.load_weights(saved(tmp_path, 1), torch.nn.Linear(3, 3))
