"""Studies: points and recipes, arithmetic over seeds, and real processes that are stopped and killed."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from runner import TOY, dmi, environment

from dmi_hpc.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, RecipeError
from dmi_hpc.predict import load
from dmi_hpc.study.plan import Point, members, points, varied
from dmi_hpc.study.results import (
    PointResult,
    Trained,
    markdown,
    over_data,
    results_row,
    summary,
)


def test_values_are_those_of_toml_or_text():
    found = varied(["train.epochs=5,10", "train.learning_rate=1e-3", "data.path=a/b,c"])
    assert found == {
        "train.epochs": (5, 10),
        "train.learning_rate": (0.001,),
        "data.path": ("a/b", "c"),
    }


@pytest.mark.parametrize("text", ["train.epochs", "=5", "train.epochs="])
def test_what_is_no_key_with_values_is_refused(text):
    with pytest.raises(RecipeError, match="expected KEY=VALUE"):
        varied([text])


def test_points_are_all_combinations_with_names_for_folders():
    found = points({"train.epochs": (1, 2), "data.path": ("sets/fold0", "sets/fold1")})
    assert [p.name for p in found] == [
        *("epochs=1+path=fold0", "epochs=1+path=fold1"),
        *("epochs=2+path=fold0", "epochs=2+path=fold1"),
    ]
    assert [p.name for p in points({})] == ["all"]
    assert Point({"task.name": "a:B c/d"}).name == "name=d"


def test_points_of_one_name_are_refused():
    with pytest.raises(RecipeError, match="two points would be called path=set"):
        points({"data.path": ("a/set", "b/set")})


def recipe(folder):
    path = folder / "toy.toml"
    path.write_text(TOY.format(seed=1, task="", data="", train="epochs = 3", search=""))
    return path


def test_each_member_is_the_recipe_with_other_keys_and_another_seed(tmp_path):
    chosen = points({"train.epochs": (7,), "data.train_rows": (40,)})
    one, two = members(recipe(tmp_path), chosen, [3, 4], tmp_path)
    assert (one.recipe.seed, two.recipe.seed) == (3, 4)
    assert (one.recipe.train.epochs, one.recipe.data.train_rows) == (7, 40)
    assert one.recipe.train.batch_size == 20
    assert one.folder == tmp_path / "epochs=7+train_rows=40" / "seed-3"
    assert one.recipe.name == "toy"


@pytest.mark.parametrize(
    ("key", "said"),
    [("train.epoch", "unknown key 'train.epoch'"), ("seed.x", "seed is no table of the recipe")],
)
def test_keys_that_no_recipe_has_are_refused(tmp_path, key, said):
    with pytest.raises(RecipeError, match=re.escape(said)):
        members(recipe(tmp_path), points({key: (1,)}), [0], tmp_path)


def trained(seed, predicted, transform="identity", **scores):
    truth = np.array([1.0, 2.0, 4.0]) if transform != "logit" else np.array([0.0, 1.0, 1.0])
    network = {"name": "network", "label": "Network", "seconds": 1.0, "r2": None, **scores}
    baseline = {"name": "mean", "label": "Mean", "seconds": 0.1, "mae": 3.0, "auc": 0.5}
    evaluation = {
        "quantity": "y",
        "unit": "m",
        "transform": transform,
        "rows": 3,
        "data": "abc",
        "methods": [network, baseline] if seed == 0 else [network],
        "published": [{"label": "Paper", "mae": 0.5, "mae_percent": None, "source": "there"}],
    }
    rows = ("5", "6", "7")
    return Trained(
        seed,
        evaluation,
        {"parameters": 10, "device": "cpu"},
        60.0,
        9,
        rows,
        truth,
        np.array(predicted),
    )


def test_means_and_deviations_over_seeds_and_the_ensemble():
    both = [trained(0, [1.0, 2.0, 5.0], mae=1.0), trained(1, [3.0, 2.0, 5.0], mae=3.0)]
    found = summary(PointResult(Point({}), both, {2: "nan: loss"}))
    assert (found["mean"], found["deviation"]) == ({"mae": 2.0}, {"mae": pytest.approx(2**0.5)})
    assert found["ensemble"]["mae"] == pytest.approx(2 / 3)
    assert [b["name"] for b in found["baselines"]] == ["mean"]
    assert found["failed"] == {"2": "nan: loss"}


def test_the_ensemble_of_a_log_target_is_geometric_and_of_classes_in_logits():
    both = [
        trained(0, [1.0, 1.0, 4.0], "log", mae=1.0),
        trained(1, [1.0, 4.0, 4.0], "log", mae=1.0),
    ]
    assert summary(PointResult(Point({}), both))["ensemble"]["mae"] == pytest.approx(0.0)
    both = [
        trained(seed, values, "logit", auc=0.75)
        for seed, values in enumerate(([0.4, 0.3, 0.9], [0.1, 0.6, 0.9]))
    ]
    assert summary(PointResult(Point({}), both))["ensemble"]["auc"] == 1.0
    one = summary(PointResult(Point({}), both[:1]))
    assert (one["ensemble"], one["deviation"]) == (None, {"auc": None})


def test_the_page_says_it_all():
    results = [
        PointResult(
            Point({"data.path": f"sets/fold{k}"}), [trained(0, [1.0, 2.0, 5.0], mae=k + 1.0)]
        )
        for k in (0, 1)
    ]
    results[1] = replace(results[1], failed={4: "nan: loss"})
    text = markdown("toy", "dmi study toy.toml", {"machine": "one"}, [summary(r) for r in results])
    assert "| path=fold0 | 1 | 9 | 3 | 1.0000 | 3.0000 | 10 | 60 |" in text
    assert "failed: path=fold1, seed 4: nan: loss" in text
    assert "over the 2 data sets: MAE 1.5000 ± 0.7071" in text
    assert "published: Paper, mae 0.5 (there)" in text
    assert "machine: one" in text


def at(changes, seeds, mae):
    values = [1.0, 2.0, 5.0]
    return summary(PointResult(Point(changes), [trained(s, values, mae=mae) for s in seeds]))


def test_only_data_sets_are_averaged_over_and_other_keys_apart():
    sizes = [
        at({"data.train_rows": n, "data.path": f"fold{k}"}, (0, 1), n + k)
        for n in (10, 20)
        for k in (0, 2)
    ]
    few, many = over_data([*sizes, {"point": {"data.path": "x"}, "failed": {"0": "nan"}}])
    assert (few["point"], few["data_sets"], many["point"]) == ("train_rows=10", 2, "train_rows=20")
    assert few["mean"]["mae"] == {"mean": 11.0, "deviation": pytest.approx(2**0.5)}
    assert few["ensemble"]["mae"] == {"mean": pytest.approx(1 / 3), "deviation": 0.0}
    assert over_data([at({"data.train_rows": n}, (0,), n) for n in (10, 20)]) == []


def test_columns_are_those_of_all_points_though_one_has_no_baselines():
    table = markdown("toy", "dmi", {}, [at({"a": 1}, (1,), 1.0), at({"a": 2}, (0,), 2.0)])
    head, _, one, two = [line for line in table.splitlines() if line.startswith("|")]
    assert "| Mean MAE | weights |" in head
    assert one.endswith("| 1.0000 | - | 10 | 60 |")
    assert two.endswith("| 2.0000 | 3.0000 | 10 | 60 |")


def test_a_row_for_a_list_of_results():
    text = results_row("toy", "dmi study toy.toml", {"machine": "one"}, at({}, (0, 1), 1.0))
    assert text == (
        "| toy | 9 + 3 rows, abc | `dmi study toy.toml` | MAE 1.0000 ± 0.0000 m (2) | 0.3333 | "
        "Mean 3.0000 | Paper 0.5 | 60 s, one |"
    )


@pytest.fixture
def place(tmp_path):
    """A recipe with data."""
    path = recipe(tmp_path)
    dmi("data", "build", path, "--out", tmp_path / "made", cwd=tmp_path)
    path.write_text(path.read_text().replace("[data]", '[data]\npath = "made/data"'))
    return tmp_path


def results(place):
    return json.loads((place / "study" / "results.json").read_text())


@pytest.mark.slow
def test_seeds_and_points_become_runs_results_and_ensembles(place):
    command = (
        "study",
        "toy.toml",
        "--seeds",
        "0,1",
        "--vary",
        "train.epochs=1,2",
        "--out",
        "study",
    )
    dmi(*command, "--workers", "2", "--ensemble", cwd=place)
    first, second = results(place)["points"]
    assert (first["point"], second["point"]) == ({"train.epochs": 1}, {"train.epochs": 2})
    for name, point in (("epochs=1", first), ("epochs=2", second)):
        maes = [
            json.loads(
                (place / "study" / "runs" / name / f"seed-{seed}" / "evaluation.json").read_text()
            )
            for seed in (0, 1)
        ]
        assert [len(e["methods"]) for e in maes] == [2, 1]
        network = [e["methods"][0]["mae"] for e in maes]
        assert point["mean"]["mae"] == pytest.approx(np.mean(network))
        assert load(place / "study" / "ensembles" / name).checkpoint == "mean of 2 networks"
    before = (place / "study" / "results.json").stat().st_mtime_ns
    dmi(*command, cwd=place)  # nothing is trained again
    assert (place / "study" / "results.json").stat().st_mtime_ns > before
    runs = list((place / "study" / "runs").rglob("status.json"))
    assert all(path.stat().st_mtime_ns < before for path in runs)


@pytest.mark.slow
def test_a_training_that_fails_is_told_and_the_others_go_on(place):
    vary = "train.learning_rate=1e-2,1e30"
    told = dmi(
        *("study", "toy.toml", "--seeds", "0", "--vary", vary, "--out", "study"), cwd=place, code=1
    )
    fine, failed = results(place)["points"]
    assert fine["mean"]["mae"] > 0
    assert "nan" in failed["failed"]["0"]
    assert "failed: learning_rate=1e+30, seed 0: nan" in told.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_study_that_was_stopped_or_killed_goes_on(place, number):
    command = [
        "study",
        "toy.toml",
        "--seeds",
        "0,1",
        "--out",
        "study",
        "--vary",
        "train.epochs=60",
    ]
    started = subprocess.Popen(
        [sys.executable, "-P", "-m", "dmi_hpc", *command],
        cwd=place,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        runs, end = place / "study" / "runs", time.monotonic() + 100
        while not list(runs.rglob("step-*/checkpoint.json")):
            assert started.poll() is None, "it ended by itself"
            assert time.monotonic() < end
            time.sleep(0.05)
        started.send_signal(number)
        code = started.wait(60)
    finally:
        started.kill()
    assert code == (EXIT_INTERRUPTED if number == signal.SIGTERM else -signal.SIGKILL)
    assert not (place / "study" / "results.json").exists()
    dmi(*command, cwd=place)
    assert len(results(place)["points"][0]["seeds"]) == 2


@pytest.mark.slow
def test_a_study_whose_time_ends_says_so_and_goes_on(place):
    text = (place / "toy.toml").read_text()
    slow = text.replace('Toy"', 'Toy"\nfault = "slow"').replace("epochs = 3", "epochs = 40")
    limited = slow.replace("[train]", "[train]\ntime_limit_s = 10.2")  # 10 s are kept for the end
    (place / "toy.toml").write_text(limited)
    command = ("study", "toy.toml", "--seeds", "0,1", "--out", "study")
    dmi(*command, cwd=place, code=EXIT_INTERRUPTED)
    assert len(list((place / "study" / "runs").rglob("run.json"))) == 1  # nothing new was begun
    (place / "toy.toml").write_text(slow)
    dmi(*command, cwd=place)
    assert len(results(place)["points"][0]["seeds"]) == 2


@pytest.mark.parametrize(
    ("data", "said"),
    [("", "data.path: missing"), ('path = "nowhere"', "nowhere/manifest.json: no such file")],
)
def test_without_a_data_set_nothing_is_trained(tmp_path, data, said):
    path = tmp_path / "toy.toml"
    path.write_text(TOY.format(seed=1, task="", data=data, train="epochs = 3", search=""))
    told = dmi("study", path, cwd=tmp_path, code=EXIT_USER_ERROR)
    assert said in told.stderr
    assert not (tmp_path / "studies").exists()
