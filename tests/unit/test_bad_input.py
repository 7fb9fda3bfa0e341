"""What a newcomer gets wrong: each has a message that says what was found, expected, and to do."""

import json
import shutil

import numpy as np
import pytest
import torch
from runner import toy_data, toy_recipe

from dmi_hpc.cli import main
from dmi_hpc.data.manifest import BuildPlan, Field, SplitRule
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.data.writer import ShardWriter
from dmi_hpc.errors import EXIT_USER_ERROR, DataError, LaunchError
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.world import World, require_gpu

TOY = "toy_task:Toy"
ROWS = 40
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(ROWS, 8)).astype(np.float32), RNG.normal(size=ROWS)


def make_set(folder, task=TOY, **changed):
    """A set of the toy task's fields, some of them changed; None leaves one out."""
    arrays = {name: a for name, a in {"x": X, "y": Y, **changed}.items() if a is not None}
    fields = tuple(_field(name, array) for name, array in arrays.items())
    rule = SplitRule(seed=1, validation=0.2, test=0.2, key="row")
    plan = BuildPlan(task=task, rows_per_shard=64, fields=fields, split_rule=rule, seed=0)
    with ShardWriter(folder, plan) as writer:
        writer.append(arrays)
    return folder


def _field(name, array):
    values = array.values if isinstance(array, Ragged) else array
    kind = values.dtype
    return Field(
        name=name,
        dtype=f"S{kind.itemsize}" if kind.kind == "S" else kind.name,
        shape=values.shape[1:],
        unit="",
        description="",
        axis="entry" if isinstance(array, Ragged) else None,
    )


def said(monkeypatch, capsys, *arguments):
    """What `dmi ARGUMENTS` says on its way out with the exit code of a user's error."""
    monkeypatch.setattr("sys.argv", ["dmi", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    error = capsys.readouterr().err
    assert end.value.code == EXIT_USER_ERROR, error
    assert error.startswith("error: ")
    assert "Traceback" not in error
    return error


TEXT = np.array([b"abc"] * ROWS, dtype="S3")
VARYING = Ragged.from_rows([Y[: 1 + i % 3] for i in range(ROWS)])


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        (
            {"y": None, "z": Y},
            r"needs fields y; found split, x, z, as made for task 'toy_task:Toy'",
        ),
        (
            {"y": RNG.normal(size=(ROWS, 3))},
            r"field y, .*found float64, shape \(3,\), expected one",
        ),
        ({"y": Y[:, None]}, r"field y, .* found float64, shape \(1,\), expected one number a row"),
        ({"y": TEXT}, r"field y, .* found text S3, expected one number a row"),
        (
            {"y": VARYING},
            r"field y, .* found float64, of varying length, expected one number a row",
        ),
        ({"y": np.ones(ROWS)}, r"field y: the target is constant \(1\) over the training rows"),
        (
            {"x": X[:, :5]},
            r"expected .*\(rows, 8\), found \(1, 5\) float32 from x \(1, 5\) float",
        ),
        ({"x": X[:, 0]}, r"expected .*\(rows, 8\), found \(1,\) float32 from x"),
        ({"x": TEXT}, r"expected \(rows, 8\), found \(1,\) text from x"),
        ({"x": VARYING}, r"expected .*\(rows, 8\), found Ragged from x Ragged"),
        (
            {"x": np.ones((ROWS, 8), dtype=np.int32)},
            r"expected float32, found int32 from x\. Store x",
        ),
        (
            {"x": X.astype(np.float64)},
            r"expected float32, found float64 from x\. Store x as float32",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_set_that_does_not_fit_the_task_names_field_found_and_expected(tmp_path, changed, found):
    data = make_set(tmp_path / "data", **changed)
    with pytest.raises(DataError, match=found) as error:
        Problem.open(make_task({"name": TOY}), data)
    assert str(error.value).startswith(f"{data}: ")


def test_whole_numbers_may_be_a_target(tmp_path):
    data = make_set(tmp_path / "data", y=np.arange(ROWS, dtype=np.int32))
    problem = Problem.open(make_task({"name": TOY}), data)
    numbers = problem.shards.gather("y", problem.train_rows)
    assert problem.scale.mean == pytest.approx(numbers.mean())
    assert problem.target({"y": numbers}).dtype == np.float64


def test_a_set_made_with_other_options_of_the_task_is_named(tmp_path):
    volumes = RNG.integers(0, 2, (ROWS, 5, 5, 5)).astype(np.uint8)
    data = make_set(tmp_path / "data", "homogenization", x=None, y=None, phase=volumes, C1111=Y + 9)
    Problem.open(make_task({"name": "homogenization", "voxels": 5}), data)
    with pytest.raises(DataError, match=r"\(rows, 1, 7, 7, 7\), found .* from phase .*options"):
        Problem.open(make_task({"name": "homogenization", "voxels": 7}), data)


def test_a_set_of_another_task_says_whose_it_is(tmp_path):
    data = make_set(tmp_path / "data")
    with pytest.raises(DataError, match=r"fractions, value; found split, x, y.* 'toy_task:Toy'"):
        Problem.open(make_task({"name": "elemnet"}), data)


def test_text_where_a_built_in_task_computes_is_no_traceback(tmp_path):
    data = make_set(tmp_path / "data", "elemnet", x=None, y=None, fractions=TEXT, value=Y)
    with pytest.raises(
        DataError, match=r"`inputs` fails with ValueError: .*given fractions \(1,\) text"
    ):
        Problem.open(make_task({"name": "elemnet"}), data)


def test_a_bug_of_the_users_task_keeps_its_type(tmp_path):
    data = make_set(tmp_path / "data")
    with pytest.raises(ZeroDivisionError, match="own bug"):
        Problem.open(make_task({"name": TOY, "fault": "exception"}), data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'loss = "rmse"',
            "key 'train.loss': Input should be 'mse', 'mae' or 'huber'; found 'rmse'",
        ),
        (
            'optimizer = "adamax"',
            "should be 'adam', 'adamw', 'sgd', 'lamb' or 'lars'; found 'adamax'",
        ),
        (
            'schedule = "poly"',
            "'constant', 'cosine', 'one_cycle', 'step' or 'plateau'; found 'poly'",
        ),
        ('precision = "fp8"', "should be 'fp32', 'bf16' or 'fp16'; found 'fp8'"),
        ('metric = "mape"', "unknown key 'train.metric'. Valid names here: accumulation,"),
        (
            "accumulation = 0",
            "key 'train.accumulation': Input should be greater than or equal to 1",
        ),
    ],
)
def test_an_unknown_name_lists_what_there_is(tmp_path, monkeypatch, capsys, line, message):
    recipe = toy_recipe(tmp_path / "toy.toml", train=line)
    told = said(monkeypatch, capsys, "train", recipe, "--out", tmp_path / "run")
    assert f"{recipe}: " in told
    assert message in told
    assert not (tmp_path / "run").exists()


def test_a_missing_gpu_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(LaunchError, match=r"rank 1: .* asks for a GPU .* built for CPUs only"):
        require_gpu(World(1, 2), {})
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(LaunchError, match=r"CUDA_VISIBLE_DEVICES is '7': name a GPU"):
        require_gpu(World(), {"CUDA_VISIBLE_DEVICES": "7"})
    with pytest.raises(LaunchError, match=r'torch finds none: .* train.device = "auto"'):
        require_gpu(World(), {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_gpu(World(), {})


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_data(tmp_path_factory.mktemp("toy") / "data")


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/none", "/proc/self/fd"])
def test_a_run_folder_that_cannot_be_made_is_named(toy, tmp_path, monkeypatch, capsys, where):
    """Modes do not bind root, but a file as parent and what the kernel makes do."""
    (tmp_path / "file").write_text("precious")
    recipe = toy_recipe(tmp_path / "toy.toml", toy)
    told = said(monkeypatch, capsys, "train", recipe, "--out", tmp_path / where)
    assert "cannot write" in told or "holds no run; choose another --out" in told
    assert (tmp_path / "file").read_text() == "precious"


def test_data_that_are_nowhere_or_no_shard_set_are_named(tmp_path, monkeypatch, capsys):
    def told(path):
        recipe = toy_recipe(tmp_path / "toy.toml", path)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return said(monkeypatch, capsys, "train", recipe, "--out", tmp_path / "run")

    assert f"{tmp_path / 'none'}: no data set" in told(tmp_path / "none")
    (tmp_path / "table.csv").write_text("formula,value\n")
    assert f"{tmp_path / 'table.csv'}: no data set" in told(tmp_path / "table.csv")
    (tmp_path / "other").mkdir()
    assert f"{tmp_path / 'other'}: no data set" in told(tmp_path / "other")
    (tmp_path / "other" / "manifest.json").write_text('{"name": "an extension of a browser"}')
    assert 'expected "format": "dmi-shards"; this is no shard set' in told(tmp_path / "other")


@pytest.fixture(scope="module")
def trained(toy, tmp_path_factory):
    """A finished run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = toy_recipe(folder / "toy.toml", toy, train="epochs = 1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dmi", "train", str(recipe), "--out", str(folder / "run")])
        patch.setattr(torch, "set_num_threads", lambda count: None)
        with pytest.raises(SystemExit) as end:
            main()
    assert not end.value.code
    return folder / "run"


def test_no_run_and_unknown_splits_are_named(trained, tmp_path, monkeypatch, capsys):
    told = said(monkeypatch, capsys, "evaluate", tmp_path)
    assert f"{tmp_path}: no run here (no run.json). Start one with: dmi train RECIPE" in told
    told = said(monkeypatch, capsys, "evaluate", trained, "--split", "tset")
    assert "--split: found 'tset', expected train, validation, test" in told
    told = said(monkeypatch, capsys, "predict", tmp_path, trained)
    assert "expected a run folder (run.json), a checkpoint" in told


def test_a_network_of_another_set_is_not_predicted_with(trained, tmp_path, monkeypatch, capsys):
    data = make_set(tmp_path / "data", x=X[:, :5])
    told = said(monkeypatch, capsys, "predict", trained, data)
    assert "expected (rows, 8), found (40, 5) float32 from x (40, 5) float32" in told


def test_the_checkpoint_of_another_network_is_refused(trained, tmp_path, monkeypatch, capsys):
    """Its folder has come into the run by a copy; the plan of the run is its own."""
    run = shutil.copytree(trained, tmp_path / "run")
    (meta,) = run.glob("train/checkpoints/*/checkpoint.json")
    content = json.loads(meta.read_text())
    content["network"]["layers"][0]["units"] = 17
    meta.write_text(json.dumps(content))
    told = said(monkeypatch, capsys, "evaluate", run)
    assert str(meta.parent) in told
