import lzma
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmi_hpc.config import parse
from dmi_hpc.data.composition import ELEMENTS, element_fractions
from dmi_hpc.data.elements import parse_formula, reduced_formula
from dmi_hpc.data.importing.options import ImportOptions
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.errors import DataError, RecipeError


def run(tmp_path, text, name="table.csv", **options):
    """Without splits, so that rows stay in the order of the file (shards group them by split)."""
    path = tmp_path / name
    path.write_text(text)
    options = {"validation": 0, "test": 0, **options}
    return import_files([path], tmp_path / "set", ImportOptions(**options))


def read(tmp_path, *names):
    with ShardSet.open(tmp_path / "set") as shards:
        return [shards.gather(name, shards.rows("all")).tolist() for name in names]


def fractions(formula):
    found = element_fractions(formula)
    return {ELEMENTS[i]: pytest.approx(float(found[i])) for i in np.flatnonzero(found)}


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("Fe2O3", {"Fe": 0.4, "O": 0.6}),
        ("Fe2 O3", {"Fe": 0.4, "O": 0.6}),
        ("(NH4)2SO4", {"N": 2 / 15, "H": 8 / 15, "S": 1 / 15, "O": 4 / 15}),
        ("Ca3[Al(OH)6]2", {"Ca": 3 / 29, "Al": 2 / 29, "O": 12 / 29, "H": 12 / 29}),
        ("Li0.5CoO2", {"Li": 1 / 7, "Co": 2 / 7, "O": 4 / 7}),
        ("NaN", {"Na": 0.5, "N": 0.5}),
        ("D2O", {"H": 2 / 3, "O": 1 / 3}),
        ("Pu", {"Pu": 1.0}),
        ("CO", {"C": 0.5, "O": 0.5}),
        ("Co", {"Co": 1.0}),
    ],
)
def test_fractions_of_formulas(formula, expected):
    assert fractions(formula) == expected
    found = element_fractions(formula)
    assert found.shape == (86,)
    assert found.dtype == np.float32
    assert found.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("formula", "reason"),
    [
        ("Xx2", "element Xx is not one of the 86"),
        ("He2O", "element He is not one of the 86"),
        ("PuCm", "element Cm is not one of the 86"),
        ("", "not a formula"),
        ("fe2o3", "not a formula"),
        ("Fe2(O3", "not a formula"),
        ("Fe2O3)", "not a formula"),
        ("La1-xSrxMnO3", "not a formula"),
        ("NaCl-2", "not a formula"),
        ("Fe0", "no finite amount"),
        ("Fe1e999", "no finite amount"),
        ("None", "not a formula"),
        ("12", "not a formula"),
    ],
)
def test_formulas_that_cannot_be_used(formula, reason):
    with pytest.raises(DataError, match=reason):
        element_fractions(formula)


def test_elements_are_the_published_ones():
    from pymatgen.core import Element

    numbers = [Element(symbol).Z for symbol in ELEMENTS]
    assert numbers == sorted(set(range(1, 95)) - {2, 10, 18, 84, 85, 86, 87, 88})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for symbol in ELEMENTS:
            assert reduced_formula(parse_formula(f"{symbol}2")) == symbol


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Fe2O3", "O3Fe2"),
        ("Fe2O3", "Fe4O6"),
        ("Fe2O3.5", "Fe4O7"),
        ("Li0.1CoO2", "(Li0.05Co0.5O)2"),
        ("CaO2H2", "Ca(OH)2"),
        ("H2O", "D2O"),
    ],
)
def test_the_same_composition_has_one_key(one, other):
    assert reduced_formula(parse_formula(one)) == reduced_formula(parse_formula(other))


@given(
    st.dictionaries(st.sampled_from(ELEMENTS), st.integers(1, 40), min_size=1, max_size=5),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=100)
def test_key_and_fractions_ignore_order_and_multiples(amounts, factor, random):
    items = list(amounts.items())
    one = "".join(f"{e}{n}" for e, n in items)
    random.shuffle(items)
    other = "".join(f"{e}{n * factor}" for e, n in items)
    assert reduced_formula(parse_formula(one)) == reduced_formula(parse_formula(other))
    assert np.allclose(element_fractions(one), element_fractions(other), atol=1e-7)
    assert element_fractions(reduced_formula(parse_formula(other))) == pytest.approx(
        element_fractions(one), abs=1e-7
    )


TABLE = """formula,target
Fe2O3,-1.5
Xx2,0.1

NaN,2
Fe4O6,-1.7
NaCl,nan
KCl,
"Mg
O",1
CaO,1,2
Al
O3Fe2,-1.3
"""


def test_bad_lines_are_reported_by_the_line_of_the_file(tmp_path):
    manifest, report = run(tmp_path, TABLE, bad="skip")
    reasons = {int(bad.where.rpartition(":")[2]): bad.reason for bad in report.bad}
    assert list(reasons) == sorted(reasons)
    assert set(reasons) == {3, 7, 8, 11, 12}
    assert "element Xx" in reasons[3]
    assert "finite value, found 'nan'" in reasons[7]
    assert "finite value, found ''" in reasons[8]
    assert "expected 2 cells, found 3" in reasons[11]
    assert "expected 2 cells, found 1" in reasons[12]
    assert (report.read, report.kept, manifest.rows) == (10, 5, 5)
    formula, line, value = read(tmp_path, "formula", "line", "value")
    assert formula == [b"Fe2O3", b"NaN", b"Fe4O6", b"Mg\nO", b"O3Fe2"]
    assert line == [2, 5, 6, 9, 13]
    assert value == [-1.5, 2.0, -1.7, 1.0, -1.3]


def test_bad_lines_are_an_error_unless_skipped(tmp_path):
    with pytest.raises(DataError, match=r"5 records(.|\n)*table\.csv:3: 'Xx2': element Xx"):
        run(tmp_path, TABLE)
    assert not (tmp_path / "set").exists()


def test_duplicates_by_line(tmp_path):
    _, report = run(tmp_path, TABLE, bad="skip")
    assert report.duplicates == []  # kept lines need no memory, and none is used to look for them
    with pytest.raises(DataError, match=r"table\.csv:2, .*table\.csv:6, .*table\.csv:13"):
        run(tmp_path, TABLE, bad="skip", duplicates="error")


@pytest.mark.parametrize(("how", "value", "line"), [("mean", -1.5, 2), ("lowest", -1.7, 6)])
def test_duplicates_become_one(tmp_path, how, value, line):
    _, report = run(tmp_path, TABLE, bad="skip", duplicates=how)
    values, lines = read(tmp_path, "value", "line")
    assert (values[0], lines[0]) == (pytest.approx(value), line)
    (group,) = report.duplicates
    path = tmp_path / "table.csv"
    assert group == f"O3Fe2: {path}:2, {path}:6, {path}:13"
    assert (report.read, report.kept, report.merged, report.skipped) == (10, 3, 2, 5)


def test_a_missing_column_lists_the_columns(tmp_path):
    with pytest.raises(DataError, match="'target', found columns: formula, delta_e"):
        run(tmp_path, "formula,delta_e\nFe,1\n")
    run(tmp_path, "formula,delta_e\nFe,1\n", value="delta_e")


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("empty.csv", b"", "found columns: none"),
        ("only.csv", b"formula,target\n", "no usable record in 0"),
        ("binary.csv", b"\xff\xfe\x00", "not a readable table"),
        ("torn.csv.xz", lzma.compress(b"formula,target\nFe,1\n")[:-8], "not a readable table"),
        ("no.csv.xz", b"formula,target\nFe,1\n", "not a readable table"),
        ("absent.csv", None, "not a readable table.*No such file"),
    ],
)
def test_files_that_are_no_tables(tmp_path, name, raw, message):
    path = tmp_path / name
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        import_files([path], tmp_path / "set", ImportOptions())


def test_compressed_and_spreadsheet_files(tmp_path):
    one, two = tmp_path / "one.csv.xz", tmp_path / "two.csv"
    one.write_bytes(lzma.compress(b"formula,target\nFe,1\n"))
    two.write_bytes("\ufeffformula,target\r\nFeO,2\r\n".encode())
    import_files([one, two], tmp_path / "set", ImportOptions())
    assert read(tmp_path, "value", "file", "line") == [[1.0, 2.0], [0, 1], [2, 2]]


def test_shares_leave_rows_for_training():
    with pytest.raises(RecipeError, match=r"validation \+ test is 1.2, expected less than 1"):
        parse(ImportOptions, {"validation": 0.6, "test": 0.6}, where="dmi data import")


def test_an_edited_table_is_not_taken_for_the_old_one(tmp_path):
    run(tmp_path, "formula,target\nFe,1\n")
    run(tmp_path, "formula,target\nFe,1\n")
    with pytest.raises(DataError, match=r"holds another data set .*provenance.*--replace"):
        run(tmp_path, "formula,target\nFe,2\n")
    assert read(tmp_path, "value") == [[1.0]]
    run(tmp_path, "formula,target\nFe,2\n", replace=True)
    assert read(tmp_path, "value") == [[2.0]]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=60))
@settings(deadline=None, max_examples=25)
def test_no_composition_is_in_two_splits(tmp_path_factory, amounts):
    folder = tmp_path_factory.mktemp("leak")
    lines = [f"Ti{a}O{b},{k}" for k, (a, b) in enumerate(amounts)]
    lines.append("NaCl,0")  # for training, by its key
    run(folder, "\n".join(["formula,target", *lines]), validation=0.3, test=0.3)
    inputs, splits = read(folder, "fractions", "split")
    assert len(inputs) == len(lines)
    found = {}
    for row, split in zip(inputs, splits, strict=True):
        assert found.setdefault(tuple(row), split) == split


def real_data():
    default = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("DMI_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data not at hand: {folder}")
    return folder


def test_oqmd(tmp_path):
    path = real_data() / "elemnet" / "oqmd_formation_enthalpy_val.csv.xz"
    options = ImportOptions(duplicates="error", processes=1)
    manifest, report = import_files([path], tmp_path / "set", options)
    assert (manifest.rows, report.bad, report.duplicates) == (51_255, [], [])
    assert manifest.split_rows["test"] / manifest.rows == pytest.approx(0.1, abs=0.005)
    assert manifest.statistics["value"].std == pytest.approx(0.92, abs=0.02)


def test_published_splits_are_kept(tmp_path):
    text = "formula,target,part\nFe,1,train\nFeO,2,val\nFe,3,test\nFe2O3,4,nowhere\n"
    manifest, report = run(tmp_path, text, split_column="part", bad="skip")
    assert dict(manifest.split_rows) == {"train": 1, "validation": 1, "test": 1}
    assert manifest.plan.split_rule.key == "given by 'part'"
    assert [str(bad).partition("csv:")[2] for bad in report.bad] == [
        "5: 'Fe2O3': part: expected train, validation or test, found 'nowhere'"
    ]
    with pytest.raises(DataError, match="several splits"):
        run(tmp_path, text, split_column="part", duplicates="mean")


def test_a_formula_as_long_as_a_page_is_a_bad_line(tmp_path):
    manifest, report = run(tmp_path, f"formula,target\nFe,1\n{'Fe' * 300},1\n", bad="skip")
    assert manifest.field("formula").dtype == "S2"
    assert "longer than 256 bytes" in report.bad[0].reason
