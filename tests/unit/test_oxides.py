"""Garnets and perovskites: columns of sites, codes of orderings, preparation of the published files."""

import json
import lzma
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest

from dmi_hpc.config import parse
from dmi_hpc.data.importing.options import ImportOptions
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.errors import DataError, RecipeError
from dmi_hpc.models.spec import Dense
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.oxides import OxidesOptions, code_columns, site_columns, sites_of

ROOT = Path(__file__).parents[2]
NAME = "dmi_hpc.tasks.oxides:Oxides"
MIXED = {"mixed": "A", "orderings": 10}


def task(**options):
    return make_task({"name": NAME, **options})


def test_sites_have_the_radius_at_their_coordination():
    found = site_columns({"A": "Ca2+", "B": "Ti4+"}, sites_of("perovskite", None))
    assert found == {
        "radius_A": 1.34,
        "electronegativity_A": 1.0,
        "radius_B": 0.605,
        "electronegativity_B": 1.54,
    }
    assert sites_of("garnet", "C") == {"C1": 8, "C2": 8, "A": 6, "D": 4}


def test_ions_that_share_a_site_are_averaged():
    alone = [site_columns({"A": ion}, {"A": 12})["radius_A"] for ion in ("Ca2+", "Ba2+")]
    both = site_columns({"A": "Ca2+|Ba2+"}, {"A": 12})
    assert both["radius_A"] == pytest.approx(np.mean(alone))


def test_codes_are_binary_numbers_with_as_many_bits_as_published():
    assert list(code_columns(5, 10).values()) == [0, 1, 0, 1]
    assert [len(code_columns(0, n)) for n in (20, 7, 18, 10)] == [5, 3, 5, 4]
    assert len({tuple(code_columns(n, 20).values()) for n in range(20)}) == 20


@pytest.mark.parametrize(
    ("options", "inputs", "hidden"),
    [
        ({"system": "garnet"}, 6, [24]),
        ({"system": "perovskite"}, 4, [12]),
        ({"hidden": [24], **MIXED}, 10, [24]),
        ({"system": "garnet", "mixed": "C", "orderings": 20, "hidden": [22, 8]}, 13, [22, 8]),
    ],
)
def test_networks_have_the_published_sizes(options, inputs, hidden):
    network = task(**options).published_network()
    assert network.input_shape == (inputs,)
    assert [layer.units for layer in network.layers if isinstance(layer, Dense)] == hidden
    assert network.standardize


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mixed": "D", "orderings": 10}, "expected one of A, B, found 'D'"),
        ({"mixed": "A"}, "give both, or none"),
        ({"orderings": 10}, "give both, or none"),
        ({"system": "spinel"}, "system"),
    ],
)
def test_options_that_make_no_sense_are_named(options, reason):
    with pytest.raises(RecipeError, match=reason):
        parse(OxidesOptions, options, where="task")


def wanted(tmp_path, text):
    path = tmp_path / "wanted.csv"
    path.write_text(text)
    return path


def test_ions_are_predicted_in_every_ordering(tmp_path):
    labels, fields = task().read_inputs(wanted(tmp_path, "A,B\nCa2+,Ti4+\nBa2+,Zr4+\n"))
    assert labels == ["A=Ca2+ B=Ti4+", "A=Ba2+ B=Zr4+"]
    assert fields["radius_A"].tolist() == [1.34, 1.61]
    made = task(**MIXED)
    labels, fields = made.read_inputs(wanted(tmp_path, "A1,A2,B\nCa2+,Ba2+,Ti4+\n"))
    assert (len(labels), set(labels)) == (10, {"A1=Ca2+ A2=Ba2+ B=Ti4+"})
    assert set(fields["radius_A1"]) == {1.34}
    _, turned = made.read_inputs(wanted(tmp_path, "A1,A2,B\nBa2+,Ca2+,Ti4+\n"))
    np.testing.assert_array_equal(made.inputs(fields), made.inputs(turned))
    codes = made.inputs(fields)[:, 6:]
    assert (codes @ [8, 4, 2, 1]).tolist() == list(range(10))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("A\nCa2+\n", "B is missing"),
        ("A,B\nCa2+,Ti4+\nCa,Ti4+\n", r"line 3: 'Ca': expected an ion such as Ca2\+"),
        ("A,B\nSn2+,Ti4+\n", r"line 2: Sn2\+: no ionic radius"),
        ("A,B\n", "no compounds"),
    ],
)
def test_files_that_cannot_be_predicted(tmp_path, text, reason):
    with pytest.raises(DataError, match=reason):
        task().read_inputs(wanted(tmp_path, text))


A_IONS, B_IONS = ("Ca2+", "Sr2+", "Ba2+", "Pb2+", "Mg2+"), ("Ti4+", "Zr4+", "Hf4+", "Sn4+")


def published(folder):
    """Files as those of the paper: unmixed compounds, and two mixed ones of ten orderings."""
    rows, entries = [], []

    def add(a, b, a_amt, b_amt, energy, ways=1):
        entries.append({"energy": -100 - len(entries), "entry_id": 1000 - len(entries)})
        rows.append((a, b, a_amt, b_amt, entries[-1]["energy"], energy, ways, "|" in a + b))

    for i, a in enumerate(A_IONS):
        for j, b in enumerate(B_IONS):
            add(a, b, "4", "4", 0.1 * i - 0.05 * j)
            add(a, b, "4", "4", 0.1 * i - 0.05 * j + 0.001)
    add("Nd3+", "Sc3+", "4", "4", -0.02, ways=2)  # computed once: which ion is on A?
    add("Sm3+", "Rh3+", "4", "4", 0.3, ways=2)
    add("Sm3+", "Rh3+", "4", "4", -0.06, ways=2)
    for a in ("Ca2+|Sr2+", "Ba2+|Pb2+", "Ca2+|Pb2+"):
        for ordering in range(10):
            add(a, "Ti4+", "4|4", "8", 0.01 * ordering)
    columns = ["A", "B", "A_amt", "B_amt", "energy_eV", "Ef_eV_per_atom", "n_cand", "mixed"]
    pandas.DataFrame(rows, columns=columns).to_csv(folder / "assigned.csv", index=False)
    with lzma.open(folder / "entries.json.xz", "wt") as file:
        json.dump(entries, file)


def prepared(folder, kind, source, *options):
    script = ROOT / "recipes" / "prepare" / "oxides.py"
    out = folder / "out.csv"
    out.unlink(missing_ok=True)
    command = [sys.executable, script, kind, folder / source, out, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return pandas.read_csv(out)


def test_unmixed_perovskites_have_their_lowest_energy_and_a_known_arrangement(tmp_path):
    published(tmp_path)
    table = prepared(tmp_path, "perovskites", "assigned.csv")
    assert len(table) == len(A_IONS) * len(B_IONS) + 1
    energies = dict(zip(table["compound"], table["formation_energy"], strict=True))
    assert energies["A=Sm3+ B=Rh3+"] == -0.06
    assert "A=Nd3+ B=Sc3+" not in energies
    assert set(table["split"]) == {"train", "validation", "test"}


def test_orderings_of_a_compound_share_a_split_and_count_by_their_entries(tmp_path):
    published(tmp_path)
    options = ("--entries", tmp_path / "entries.json.xz", "--mixed", "A")
    table = prepared(tmp_path, "mixed", "assigned.csv", *options)
    assert (table.groupby("compound")["split"].nunique() == 1).all()
    assert (table.groupby("compound").size() == 10).all()
    one = table[table["compound"] == "A=Ca2+|Sr2+ B=Ti4+"]
    # the numbers of the entries fall from row to row of the file
    assert one["formation_energy"].tolist() == pytest.approx([0.01 * n for n in range(9, -1, -1)])
    code = one[["code_0", "code_1", "code_2", "code_3"]] @ [8, 4, 2, 1]
    assert code.tolist() == list(range(10))
    assert set(table[table["A1"] == table["A2"]]["split"]) == {"train"}
    mean = prepared(tmp_path, "mixed", "assigned.csv", *options, "--sites", "mean")
    found = mean.set_index("compound")["formation_energy"]
    assert found["A=Ca2+|Sr2+ B=Ti4+"] == 0
    assert set(mean["compound"]) == set(table["compound"])


def test_baselines_learn_the_prepared_table(tmp_path):
    published(tmp_path)
    prepared(tmp_path, "perovskites", "assigned.csv")
    options = ImportOptions(kind="table", split_column="split")
    import_files([tmp_path / "out.csv"], tmp_path / "set", options)
    made = task(trees=20)
    problem = Problem.open(made, tmp_path / "set")
    (train, target), (test, truth) = problem.split("train"), problem.split("test")
    for baseline in made.baselines():
        found = baseline.predict(train, target, test)
        assert found.shape == truth.shape
        assert np.abs(baseline.predict(train, target, train) - target).mean() < target.std()
