"""What a person sees of a training, and what is kept of it: terminal, plain lines, records, MLflow."""

import dataclasses
import errno
import importlib
import io
import json
import math
import re
import sys
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from dmi_hpc import watch
from dmi_hpc.config import TrainConfig
from dmi_hpc.deadline import Deadline
from dmi_hpc.errors import DMIError, Interrupted, RunError
from dmi_hpc.files import read_json_lines
from dmi_hpc.meters import Step
from dmi_hpc.models.spec import Dense, NetworkSpec
from dmi_hpc.report.collect import read_run
from dmi_hpc.train import Epoch
from dmi_hpc.watch import StopFlag, TrainingWatch
from dmi_hpc.world import World


class Clock:
    """A `time` whose counter only moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(watch, "time", made)
    return made


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def a_watch(folder: Path, epochs: int = 4, rank: int = 0) -> TrainingWatch:
    folder.mkdir(parents=True, exist_ok=True)
    job = SimpleNamespace(
        config=TrainConfig(epochs=epochs),
        world=World(rank, 2),
        device=torch.device("cpu"),
        network=NetworkSpec(input_shape=(4,), layers=(Dense(units=3),)),
        problem=SimpleNamespace(task=SimpleNamespace(measure=("MAE", "GPa"))),
    )
    return TrainingWatch(job, folder, Deadline(StopFlag(), None))


def a_step(step: int, epoch: int = 0, steps_per_epoch: int = 10, **changes: object) -> Step:
    given = {"loss": torch.tensor(0.5), "rows": 32, "waited_s": 0.1, "learning_rate": 1e-3}
    return Step(epoch=epoch, step=step, steps_per_epoch=steps_per_epoch, **{**given, **changes})


def an_epoch(epoch: int, mae: float = 0.25) -> Epoch:
    zeros = {field.name: 0.0 for field in dataclasses.fields(Epoch)}
    told = {"epoch": epoch, "step": 10 * (epoch + 1), "validation_error": mae, "train_loss": 0.125}
    return Epoch(**{**zeros, "samples_per_s": 320.0, "data_wait": 0.1, **told})


def of_kind(folder: Path, kind: str) -> list[dict]:
    return [line for line in read_json_lines(folder / "metrics.jsonl") if line["kind"] == kind]


# plain lines


def test_a_short_training_says_ten_lines(tmp_path, clock, capsys):
    told = a_watch(tmp_path, epochs=100)
    with told.shown():
        for epoch in range(100):
            for step in range(1, 11):
                clock.now += 0.001
                told.on_step(a_step(step, epoch))
            told.on_epoch(an_epoch(epoch, mae=1 / (epoch + 1)))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == (
        "epoch 10/100  validation MAE 0.1 GPa (best 0.1)  training loss 0.125  320 samples/s  "
        "data wait 10%"
    )


def test_a_long_epoch_shows_signs_of_life_but_no_flood(tmp_path, clock, capsys):
    told = a_watch(tmp_path, epochs=2)
    with told.shown():
        for step in range(1, 8 * 3600 + 1):  # a second each
            clock.now += 1.0
            told.on_step(a_step(step, steps_per_epoch=8 * 3600))
            if step == 60:
                early = capsys.readouterr().err.splitlines()
        told.on_epoch(an_epoch(0))
    assert len(early) == 2
    assert early[0].startswith("epoch 1/2  step 30/28,800  loss 0.5  32 samples/s  data wait 10%")
    later = capsys.readouterr().err.splitlines()
    assert 50 < len(later) < 120
    assert later[-1].startswith("epoch 1/2  validation MAE 0.25 GPa")


def test_a_terminal_shows_the_last_state_and_no_plain_lines(tmp_path, monkeypatch):
    out = Console(
        file=io.StringIO(),
        width=160,
        force_terminal=True,
        force_interactive=True,
        color_system=None,
    )
    monkeypatch.setattr(watch, "console", lambda: out)
    told = a_watch(tmp_path, epochs=2)
    with told.shown():
        told.on_event("engine", {"message": "stage 0"})
        for epoch in range(2):
            for step in range(1, 11):
                told.on_step(a_step(step, epoch, skipped=step == 10))
            told.on_epoch(an_epoch(epoch))
    *_, bar, numbers, scores = re.sub(
        r"\x1b\[[?\d;]*[A-Za-z]", "", out.file.getvalue()
    ).splitlines()
    assert re.fullmatch(r"epoch 2/2  ━+  step 10/10  0:00:00  0:00:00 left", bar.strip())
    assert numbers.startswith("loss 0.5  ")
    assert numbers.rstrip().endswith("2 steps skipped")
    assert scores.startswith("validation MAE 0.25 GPa (best 0.25)  training loss 0.125")
    assert out.file.getvalue().count("stage 0") == 1
    assert sum(event.get("steps", 0) for event in of_kind(tmp_path, "event")) == 2


class ClosedTerminal(io.StringIO):
    """One that has hung up."""

    def write(self, text):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_closed_terminal_does_not_end_a_training(tmp_path, monkeypatch, terminal):
    out = Console(file=io.StringIO(), force_terminal=terminal, force_interactive=terminal)
    monkeypatch.setattr(watch, "console", lambda: out)
    monkeypatch.setattr(watch, "_REFRESH_PER_S", 0.01)  # rich's thread stays out of it
    told = a_watch(tmp_path)
    with pytest.raises(Interrupted), told.shown():
        out.file = ClosedTerminal()
        told.on_step(a_step(1))
        told.on_event("engine", {"message": "unheard"})
        for epoch in range(4):
            told.on_epoch(an_epoch(epoch))
        raise Interrupted("the hang-up")
    assert len(of_kind(tmp_path, "epoch")) == 4


def test_ranks_above_zero_neither_say_nor_write(tmp_path, capsys):
    told = a_watch(tmp_path / "train", rank=1)
    with told.shown():
        told.on_step(a_step(1))
        told.on_event("engine", {"message": "stage 0"})
        told.on_epoch(an_epoch(0))
    assert capsys.readouterr().err == ""
    assert list((tmp_path / "train").iterdir()) == []


def test_the_best_score_is_remembered_by_a_resumed_training(tmp_path, capsys):
    for epoch, mae in ((0, 0.1), (1, 0.2)):
        told = a_watch(tmp_path)
        with told.shown():
            told.on_epoch(an_epoch(epoch, mae))
    assert "validation MAE 0.2 GPa (best 0.1)" in capsys.readouterr().err


# records


def test_steps_are_recorded_in_seconds_first_and_seldom_later(tmp_path, clock):
    told = a_watch(tmp_path)
    with told.shown():
        for step in range(1, 4001):
            clock.now += 0.5
            loss = torch.tensor(float(step % 2))
            told.on_step(a_step(step, steps_per_epoch=4000, loss=loss, norm=torch.tensor(2.0)))
    records = of_kind(tmp_path, "step")
    assert [record["step"] for record in records[:4]] == [1, 3, 5, 7]
    assert records[-1]["step"] - records[-2]["step"] == 20
    last = records[-1]
    assert last["loss"] == pytest.approx(0.5)
    assert last["samples_per_s"] == pytest.approx(64.0)
    assert last["data_wait"] == pytest.approx(0.2)
    assert last["gradient_norm"] == 2.0
    assert 0 < last["mfu"] < 1
    assert last["noise_scale"] is None


def test_events_are_recorded_and_messages_said(tmp_path, clock, capsys):
    told = a_watch(tmp_path)
    with told.shown():
        told.on_event("engine", {"message": "ZeRO stage 0 [fits]"})
        told.on_event("loss_scale", {"step": 3, "scale": math.inf})
        told.on_step(a_step(1, skipped=True, norm=torch.tensor(math.inf)))
        clock.now += 2
        told.on_step(a_step(2, skipped=True))
    assert capsys.readouterr().err == "ZeRO stage 0 [fits]\n"
    events = of_kind(tmp_path, "event")
    assert [event["event"] for event in events] == [
        "peak",
        "engine",
        "loss_scale",
        "first_step",
        "skipped",
        "skipped",
    ]
    assert 0 < events[3]["since_start_s"] < 3600
    assert (events[2]["scale"], events[-1]["step"], events[-1]["steps"]) == (None, 2, 1)
    assert of_kind(tmp_path, "step")[0]["gradient_norm"] is None
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # neither NaN nor Infinity


def test_the_report_reads_epochs_past_other_kinds_and_a_torn_line(tmp_path):
    (tmp_path / "run.json").write_text('{"name": "x", "task": "elemnet", "recipe": {}}')
    told = a_watch(tmp_path / "train")
    with told.shown():
        told.on_step(a_step(1))
        with (tmp_path / "train" / "metrics.jsonl").open("a") as torn:
            torn.write('{"kind":"step","ep')
        told.on_epoch(an_epoch(0))
    training = read_run(tmp_path).training
    assert training is not None
    assert [epoch.validation_error for epoch in training.epochs] == [0.25]


def test_a_record_that_cannot_be_written_ends_a_training_only_at_the_epoch(tmp_path, capsys):
    told = a_watch(tmp_path)
    with told.shown():
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").mkdir()
        told.on_step(a_step(1))
        told.on_event("checkpoint", {"step": 1, "seconds": 0.5})
        with pytest.raises(RunError, match="cannot write"):
            told.on_epoch(an_epoch(0))
    assert capsys.readouterr().err.count("records of single steps are not written") == 1


def test_tensorboard_shows_steps_and_epochs(tmp_path):
    told = a_watch(tmp_path)
    with told.shown():
        told.on_step(a_step(1, norm=torch.tensor(2.0)))
        told.on_epoch(an_epoch(0))
    events = importlib.import_module("tensorboard.backend.event_processing.event_file_loader")
    [path] = (tmp_path / "tensorboard").iterdir()
    shown = {
        value.tag: (event.step, value.tensor.float_val[0])
        for event in events.EventFileLoader(str(path)).Load()
        for value in event.summary.value
    }
    assert shown["step/loss"] == (1, 0.5)
    assert shown["step/gradient_norm"] == (1, 2.0)
    assert shown["validation_error"] == (10, 0.25)
    assert shown["data_wait"] == (10, pytest.approx(0.1))


# MLflow


class MlflowError(Exception):
    pass


class FakeMlflow(types.ModuleType):
    """As much of MLflow as is used: it notes what it is asked."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.exceptions = SimpleNamespace(MlflowException=MlflowError)
        self.calls: list[tuple] = []
        self.broken: set[str] = set()

    def _note(self, name: str, *given: object) -> None:
        self.calls.append((name, *given))
        if name in self.broken:
            raise MlflowError("no answer")

    def start_run(self, run_id=None, run_name=None):
        self._note("start_run", run_id, run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "abc"))

    def log_params(self, params):
        self._note("log_params", params["epochs"])

    def log_metrics(self, metrics, step=None, synchronous=None):
        self._note("log_metrics", metrics, step, synchronous)

    def flush_async_logging(self):
        self._note("flush_async_logging")

    def end_run(self, status):
        self._note("end_run", status)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    return fake


@contextmanager
def tracked(folder: Path, rank: int = 0) -> Iterator[TrainingWatch]:
    told = a_watch(folder / "train", rank=rank)
    with told.shown():
        told.on_step(a_step(1))
        yield told


def test_mlflow_gets_parameters_and_curves_without_being_waited_for(tmp_path, mlflow):
    with tracked(tmp_path / "alloy") as told:
        told.on_epoch(an_epoch(0))
    names = [call[0] for call in mlflow.calls]
    assert names[:2] == ["start_run", "log_params"]
    assert names[-2:] == ["flush_async_logging", "end_run"]
    assert mlflow.calls[0][1:] == (None, "alloy")
    assert mlflow.calls[-1][1] == "FINISHED"
    curves = [call for call in mlflow.calls if call[0] == "log_metrics"]
    assert [(step, waits) for _, _, step, waits in curves] == [(1, False), (10, False)]
    assert curves[0][1] == {"step/loss": 0.5, "step/learning_rate": 1e-3}


def test_a_resumed_training_continues_its_run_of_mlflow(tmp_path, mlflow):
    with pytest.raises(Interrupted), tracked(tmp_path):
        raise Interrupted("signal")
    assert mlflow.calls[-1] == ("end_run", "KILLED")
    mlflow.calls.clear()
    with tracked(tmp_path):
        pass
    assert mlflow.calls[0][:2] == ("start_run", "abc")
    assert "log_params" not in [call[0] for call in mlflow.calls]


def test_a_server_that_fails_on_the_way_ends_nothing(tmp_path, mlflow, capsys):
    mlflow.broken = {"log_metrics", "flush_async_logging"}
    with tracked(tmp_path) as told:
        told.on_epoch(an_epoch(0))
    assert capsys.readouterr().err.count("MLflow: no answer") == 3
    assert mlflow.calls[-1] == ("end_run", "FINISHED")


def test_mlflow_that_cannot_be_had_is_an_error_at_the_start(tmp_path, mlflow, monkeypatch):
    mlflow.broken = {"start_run"}
    with pytest.raises(DMIError, match="MLFLOW_TRACKING_URI is set, but no run could be opened"):
        tracked(tmp_path).__enter__()
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(DMIError, match="mlflow cannot be imported"):
        tracked(tmp_path).__enter__()
    with tracked(tmp_path, rank=1):
        pass  # rank 0's affair alone
