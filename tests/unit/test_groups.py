"""Rows that are several computations of one thing: their lowest value is what counts."""

import csv
import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from runner import dmi

from dmi_hpc.groups import Groups
from dmi_hpc.tasks.oxides import code_columns, site_columns

IONS = ("Ca2+", "Sr2+", "Ba2+", "Pb2+")


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.floats(-9, 9)), min_size=1))
def test_groups_come_in_the_order_of_their_first_row_with_their_least_value(rows):
    names, values = zip(*rows, strict=True)
    groups = Groups(names)
    expected = {name: min(v for n, v in rows if n == name) for name in dict.fromkeys(names)}
    assert [names[row] for row in groups.first] == list(expected)
    assert groups.least(np.array(values)).tolist() == list(expected.values())


def test_scores_and_predictions_are_of_the_lowest_ordering(tmp_path):
    rng, sites = np.random.default_rng(0), {"A1": 12, "A2": 12, "B": 6}
    pairs = [(a, b, m) for a in IONS for b in IONS if a != b for m in ("Ti4+", "Zr4+")]
    with (tmp_path / "mixed.csv").open("w", newline="") as stream:
        writer = None
        for number, ions in enumerate(pairs):
            numbers = site_columns(dict(zip(sites, ions, strict=True)), sites)
            split = ("train", "train", "validation", "test")[number % 4]
            for ordering in range(3):
                row = {
                    "compound": "-".join(ions),
                    **numbers,
                    **code_columns(ordering, 3),
                    "formation_energy": rng.normal(),
                    "split": split,
                }
                writer = writer or csv.DictWriter(stream, row)
                if stream.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
    recipe = tmp_path / "mixed.toml"
    recipe.write_text(
        '[task]\nname = "oxides"\nmixed = "A"\norderings = 3\ntrees = 5\n[data]\npath = "set"\n'
        "[train]\nepochs = 2\nthreads = 1\n[launch]\nranks = 1\n"
    )
    dmi("data", "import", "mixed.csv", "--as", "table", "--out", "set", cwd=tmp_path)
    dmi("launch", "all", recipe, "--out", "run", cwd=tmp_path)
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["rows"] == 6
    with (tmp_path / "run" / "predictions.csv").open(newline="") as stream:
        found = {line["label"]: line for line in csv.DictReader(stream)}
    with (tmp_path / "mixed.csv").open(newline="") as stream:
        rows = [line for line in csv.DictReader(stream) if line["split"] == "test"]
    for compound, line in found.items():
        energies = [float(r["formation_energy"]) for r in rows if r["compound"] == compound]
        assert float(line["truth"]) == min(energies)
    (tmp_path / "ions.csv").write_text("A1,A2,B\nCa2+,Sr2+,Ti4+\nBa2+,Pb2+,Zr4+\n")
    told = dmi("predict", "run", "ions.csv", cwd=tmp_path).stdout.splitlines()
    assert len(told) == 3
