"""A user's table of compositions, from CSV to predictions."""

import itertools
import json

import pytest
from runner import dmi

pytestmark = pytest.mark.slow

METALS = ("Li", "Na", "K", "Mg", "Ca", "Sr", "Al", "Ga", "Ti", "Zr", "V", "Fe", "Ni", "Zn", "Y")
ANIONS = ("O", "S", "F", "Cl", "N")
RATIOS = ((1, 1), (1, 2), (2, 1), (2, 3))
RECIPE = """\
seed = 1
[task]
name = "elemnet"
dropout = false
forest_trees = 10
[data]
path = "oqmd"
[model]
source = "layers"
layers = [{ kind = "dense", units = 32 }, { kind = "activation" }]
[train]
epochs = 15
batch_size = 32
learning_rate = 1e-2
"""


def table():
    """300 formulas and a smooth function of their fractions."""
    lines = ["formula,target"]
    for (i, metal), (j, anion), (a, b) in itertools.product(
        enumerate(METALS), enumerate(ANIONS), RATIOS
    ):
        x = a / (a + b)
        lines.append(f"{metal}{a}{anion}{b},{-x * (1 - x) * (2 + 0.2 * i + 0.5 * j):.6f}")
    return "\n".join(lines) + "\n"


def test_import_train_evaluate_predict(tmp_path):
    (tmp_path / "table.csv").write_text(table())
    (tmp_path / "mini.toml").write_text(RECIPE)
    done = dmi("data", "import", "table.csv", "--out", "oqmd", cwd=tmp_path)
    assert "300 of 300 records kept" in done.stdout
    dmi("train", "mini.toml", "--out", "run", cwd=tmp_path)
    dmi("evaluate", "run", cwd=tmp_path)
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    mae = {method["name"]: method["mae"] for method in found["methods"]}
    assert set(mae) == {"network", "forest", "forest_descriptors"}
    assert mae["network"] < 0.3
    (tmp_path / "formulas.csv").write_text("formula\nNaCl\nMgO\nNaCl\nZrO2\n")
    lines = dmi("predict", "run", "formulas.csv", cwd=tmp_path).stdout.splitlines()
    assert [line.split(",")[0] for line in lines] == ["input", "NaCl", "MgO", "NaCl", "ZrO2"]
    assert lines[1] == lines[3]
    assert all(-3 < float(line.split(",")[1]) < 1 for line in lines[1:])
    (tmp_path / "formulas.csv").write_text("formula\nNaCl\n\nNotAFormula\n")
    bad = dmi("predict", "run", "formulas.csv", cwd=tmp_path, code=2)
    assert bad.stderr.startswith("error: ")
    assert "formulas.csv, line 4" in bad.stderr
    assert "NotAFormula" in bad.stderr
