"""Heat capacity: import with temperatures, features by the user's table, training, prediction."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest

from dmi_hpc.config import parse
from dmi_hpc.data.composition import read_formulas
from dmi_hpc.data.importing.options import FieldSpec, ImportOptions
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.errors import DataError, RecipeError
from dmi_hpc.models.layers import UnitLength
from dmi_hpc.models.spec import shapes
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.heat_capacity import HeatCapacity, HeatCapacityOptions

ROOT = Path(__file__).parents[2]
NAME = "dmi_hpc.tasks.heat_capacity:HeatCapacity"
T = FieldSpec(name="T", unit="K")
ELEMENTS = "element,Z,radius\nH,1,0.5\nO,8,0.7\nMg,12,1.4\nFe,26,1.3\n"


def elements(tmp_path, text=ELEMENTS):
    path = tmp_path / "elements.csv"
    path.write_text(text)
    return path


def task(tmp_path, **options):
    return make_task({"name": NAME, "properties": str(elements(tmp_path)), **options})


def imported(tmp_path, text, **options):
    path = tmp_path / "cp.csv"
    path.write_text(text)
    options = {"value": "Cp", "fields": (T,), "validation": 0, "test": 0, **options}
    return import_files([path], tmp_path / "set", ImportOptions(**options))


def read(tmp_path, *names):
    with ShardSet.open(tmp_path / "set") as shards:
        return [shards.gather(name, shards.rows("all")).tolist() for name in names]


def test_columns_beside_the_value_are_imported_with_the_atoms(tmp_path):
    manifest, _ = imported(tmp_path, "formula,T,Cp\nFe2O3,300,104\nFe4O6,400.5,240\nMgO,0,1\n")
    assert manifest.field("T").unit == "K"
    assert read(tmp_path, "T", "atoms", "value") == [[300, 400.5, 0], [5, 10, 2], [104, 240, 1]]


def test_a_line_without_a_number_beside_the_value_is_bad(tmp_path):
    text = "formula,T,Cp\nFe2O3,300,104\nFe2O3,warm,104\nXx,300,1\nMgO,inf,1\n"
    _, report = imported(tmp_path, text, bad="skip")
    assert [str(bad).partition("csv:")[2] for bad in report.bad] == [
        "3: 'Fe2O3': T: expected a number, found 'warm'",
        "4: 'Xx': element Xx is not one of the 86 of ElemNet",
        "5: 'MgO': T: expected finite values, found inf",
    ]
    assert read(tmp_path, "T") == [[300]]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fields": (FieldSpec(name="pressure"),)}, "expected a column 'pressure'"),
        ({"fields": (FieldSpec(name="atoms", source="T"),)}, "every import of compositions has"),
        ({"fields": (FieldSpec(name="T", axis="x"),)}, "no ragged fields"),
        ({"duplicates": "mean"}, "lines that may differ in T"),
    ],
)
def test_columns_that_cannot_be_had(tmp_path, options, reason):
    with pytest.raises(DataError, match=reason):
        imported(tmp_path, "formula,T,Cp\nFe2O3,300,104\n", **options)


def test_duplicates_lowest_keeps_the_whole_line(tmp_path):
    text = "formula,T,Cp\nFe2O3,900,104\nFe4O6,300,9\n"
    imported(tmp_path, text, duplicates="lowest")
    assert read(tmp_path, "T", "atoms", "value") == [[300], [10], [9]]


def test_features_are_the_temperature_then_each_statistic(tmp_path):
    made = task(tmp_path, statistics=["avg", "sum"])
    labels, fields = made.read_inputs(csv(tmp_path, "formula,T\nFe2O3,300\n"))
    assert labels == ["Fe2O3, 300 K"]
    expected = [300, 15.2, 0.4 * 1.3 + 0.6 * 0.7, 76, 2 * 1.3 + 3 * 0.7]
    np.testing.assert_allclose(made.inputs(fields), [expected], rtol=1e-6)
    assert made.input_shape == (5,)
    longer = task(tmp_path, statistics=["avg", "sum"], extended=True)
    found = longer.inputs(fields)[0]
    assert (found.shape, longer.input_shape) == ((9,), (9,))
    np.testing.assert_allclose(found[1:5], [np.log(5), np.log(400), 1 / 400, 0.5], rtol=1e-6)


def csv(tmp_path, text):
    path = tmp_path / "wanted.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("formula\nFe\n", "expected a column 'T'"),
        ("formula,T\nFe,300\nMgO,x\n", "line 3: 'MgO': expected a finite value, found 'x'"),
        ("formula,T\nFeO,300\nQq,300\n", "line 3: 'Qq': element Qq"),
        ("formula,T\nFe,300,1\n", "expected 2 cells, found 3"),
        ("formula,T\n", "no formulas in it"),
    ],
)
def test_files_that_cannot_be_predicted(tmp_path, text, reason):
    with pytest.raises(DataError, match=reason):
        task(tmp_path).read_inputs(csv(tmp_path, text))


def test_sodium_nitride_is_no_missing_value(tmp_path):
    labels, fields = read_formulas(csv(tmp_path, "formula\nNaN\n"))
    assert (labels, fields["atoms"].tolist()) == (["NaN"], [2])


def test_a_compound_beyond_the_table_is_named(tmp_path):
    made = task(tmp_path)
    _, fields = made.read_inputs(csv(tmp_path, "formula,T\nFeO,300\nH2S,300\n"))
    with pytest.raises(DataError, match="H2S: element S has no row in"):
        made.network_inputs(fields)


def test_a_gap_in_the_table_is_an_error_unless_it_is_to_be_filled(tmp_path):
    text = ELEMENTS.replace("H,1,0.5", "H,1,")
    path = elements(tmp_path, text)
    made = make_task({"name": NAME, "properties": str(path)})
    _, fields = made.read_inputs(csv(tmp_path, "formula,T\nH2O,300\n"))
    with pytest.raises(DataError, match="H has no 'radius'"):
        made.inputs(fields)
    filled = make_task({"name": NAME, "properties": str(path), "missing": "median"})
    assert np.isfinite(filled.inputs(fields)).all()


def test_a_trained_task_takes_no_other_table(tmp_path):
    kept = task(tmp_path).recipe_options()
    assert make_task(kept).input_shape == (15,)
    elements(tmp_path, ELEMENTS.replace("1.3", "1.4"))
    with pytest.raises(DataError, match="trained with a table of"):
        _ = make_task(kept).elements
    elements(tmp_path).unlink()
    with pytest.raises(DataError, match=r"elements\.csv: not a readable table"):
        _ = make_task(kept).input_shape


def test_published_network_is_that_of_the_paper(tmp_path):
    text = "element," + ",".join(f"p{i}" for i in range(44)) + "\nH" + ",1" * 44 + "\n"
    path = elements(tmp_path, text)
    made = HeatCapacity(NAME, HeatCapacityOptions(properties=path))
    network = made.published_network()
    assert network.input_shape == (309,)
    assert network.standardize
    assert isinstance(network.layers[0], UnitLength)
    assert [shape for shape in shapes(network) if shape != (309,)] == [(64,), (64,), (32,), (32,)]
    notebook = HeatCapacityOptions(
        properties=path, statistics=("sum", "avg", "range", "var"), hidden=(16,), dropout=0.1
    )
    assert HeatCapacity(NAME, notebook).input_shape == (177,)


def test_options_that_make_no_sense_are_named():
    with pytest.raises(RecipeError, match="statistics"):
        parse(HeatCapacityOptions, {"properties": "x", "statistics": ["median"]}, where="task")


def law(tmp_path, compounds=12):
    """3R an atom, levelling off at low temperatures."""
    lines = ["formula,T,Cp"]
    for i in range(compounds):
        for t in (200, 500, 900):
            lines.append(
                f"Mg{i % 4 + 1}Fe{i // 4 + 1}O,{t},{24.9 * (i % 4 + i // 4 + 3) * t / (t + 100)}"
            )
    return "\n".join(lines)


def test_baselines_learn_and_predict(tmp_path):
    manifest, _ = imported(tmp_path, law(tmp_path), validation=0.2, test=0.3, seed=3)
    made = task(tmp_path, trees=20)
    problem = Problem.open(made, tmp_path / "set")
    assert min(manifest.split_rows.values()) > 0
    (train, target), (test, truth) = problem.split("train"), problem.split("test")
    for baseline in made.baselines():
        found = baseline.predict(train, target, test)
        assert np.abs(found - truth).mean() < np.abs(target.mean() - truth).mean(), baseline.name


def prepared(tmp_path, train, test, *options):
    script = ROOT / "recipes" / "prepare" / "heat_capacity.py"
    command = [sys.executable, script, train, test, tmp_path / "out.csv", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_preparation_keeps_compositions_apart(tmp_path):
    (tmp_path / "train.csv").write_text(law(tmp_path))
    (tmp_path / "val.csv").write_text("formula,T,Cp\nH2O,300,33\n")
    done = prepared(tmp_path, tmp_path / "train.csv", tmp_path / "val.csv", "--folds", "3")
    assert done.returncode == 0, done.stderr
    table = pandas.read_csv(tmp_path / "out.csv")
    assert table["split"].value_counts().to_dict() == {"train": 24, "validation": 12, "test": 1}
    assert (table.groupby("formula")["split"].nunique() == 1).all()
    again = prepared(tmp_path, tmp_path / "train.csv", tmp_path / "train.csv")
    assert "compositions that are in" in again.stderr


def real_data():
    default = ROOT.parent / "shared" / "data"
    folder = Path(os.environ.get("DMI_TEST_DATA", default)) / "cbfv_heat_capacity"
    if not folder.is_dir():
        pytest.skip(f"real data not at hand: {folder}")
    return folder


def test_features_of_the_published_data(tmp_path):
    folder = real_data()
    done = prepared(tmp_path, folder / "cp_train.csv", folder / "cp_val.csv")
    assert done.returncode == 0, done.stderr
    options = ImportOptions(value="Cp", fields=(T,), split_column="split", processes=1)
    manifest, _ = import_files([tmp_path / "out.csv"], tmp_path / "set", options)
    assert (manifest.rows, manifest.split_rows["test"]) == (4194, 980)
    table = folder / "element_properties_oliynyk.csv.xz"
    made = make_task({"name": NAME, "properties": str(table), "missing": "median"})
    problem = Problem.open(made, tmp_path / "set")
    fields, _ = problem.split("train")
    assert made.inputs(fields).shape == (len(problem.train_rows), 309)
    assert np.isfinite(made.inputs(fields)).all()
