"""Statistics of element properties, and the tables they come from."""

import numpy as np
import pytest

from dmi_hpc.data.descriptors import STATISTICS, descriptors, read_elements
from dmi_hpc.data.elements import ELEMENTS, element_fractions, parse_formula
from dmi_hpc.data.ions import electronegativity, shannon_radius
from dmi_hpc.errors import DataError

TABLE = "element,Z,radius\nH,1,0.5\nC,6,\nO,8,0.7\nFe,26,1.3\nHe,2,\nDummy,0,0\n"


def table(tmp_path, text=TABLE):
    path = tmp_path / "elements.csv"
    path.write_text(text)
    return read_elements(path)


def of(elements, *formulas, statistics=STATISTICS):
    fractions = np.stack([element_fractions(formula) for formula in formulas])
    atoms = np.array([sum(parse_formula(formula).values()) for formula in formulas])
    made = descriptors(elements, fractions, atoms, statistics)
    return made.reshape(len(formulas), len(statistics), len(elements.properties))


def test_statistics_of_a_compound_are_those_by_hand(tmp_path):
    found = of(table(tmp_path), "Fe2O3")[0, :, 0]
    mean = 0.4 * 26 + 0.6 * 8
    expected = {
        "avg": mean,
        "dev": 0.4 * (26 - mean) + 0.6 * (mean - 8),
        "range": 18,
        "max": 26,
        "min": 8,
        "mode": 8,
        "sum": 2 * 26 + 3 * 8,
        "var": 81,
    }
    assert dict(zip(STATISTICS, found, strict=True)) == pytest.approx(expected, rel=1e-6)


def test_rows_do_not_depend_on_what_stands_beside_them(tmp_path):
    elements = table(tmp_path)
    together = of(elements, "H2O", "Fe", "FeO2H")
    for row, formula in enumerate(("H2O", "Fe", "FeO2H")):
        np.testing.assert_allclose(together[row], of(elements, formula)[0], rtol=1e-12)


def test_mode_of_equally_frequent_elements_is_the_least(tmp_path):
    assert of(table(tmp_path), "FeO", statistics=("mode",)).ravel().tolist() == [8, 0.7]


def test_only_the_sum_depends_on_how_a_formula_is_written(tmp_path):
    once, twice = of(table(tmp_path), "Fe2O3", "Fe4O6")
    changed = [name for name, a, b in zip(STATISTICS, once, twice, strict=True) if (a != b).any()]
    assert changed == ["sum"]


def test_an_element_alone_has_no_spread(tmp_path):
    found = of(table(tmp_path), "Fe", statistics=("dev", "range", "var"))
    np.testing.assert_array_equal(found, 0)


def test_what_the_table_does_not_know_is_named(tmp_path):
    elements = table(tmp_path)
    with pytest.raises(DataError, match=r"OCu: element Cu has no row in .*elements\.csv"):
        of(elements, "H2O", "CuO")
    with pytest.raises(DataError, match=r"CO2: C has no 'radius' in .*missing = \"median\""):
        of(elements, "CO2")


def test_gaps_are_filled_by_the_median_over_the_elements_of_the_table(tmp_path):
    filled = table(tmp_path).filled()
    assert filled.values[ELEMENTS.index("C"), 1] == 0.7
    assert np.isnan(filled.values[ELEMENTS.index("Cu")]).all()
    with pytest.raises(DataError, match="no row"):
        of(filled, "Cu")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("symbol,Z\nH,1\n", "expected a column 'element'"),
        ("element\nH\n", "columns of properties"),
        ("element,Z\nH,one\n", "'Z': expected numbers"),
        ("element,Z\nH,1\nH,2\n", "H stands there more than once"),
        ("element,Z\nDummy,1\n", "no row of an element"),
        ("element,Z\nH,inf\n", "found infinity"),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, reason):
    with pytest.raises(DataError, match=reason):
        table(tmp_path, text)


def test_a_property_that_no_element_has_cannot_be_filled(tmp_path):
    with pytest.raises(DataError, match="no element has the property 'radius'"):
        table(tmp_path, "element,Z,radius\nH,1,\nO,8,\n").filled()


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="not a readable table"):
        read_elements(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("ion", "coordination", "expected"),
    [("Ca2+", 12, 1.34), ("Ti4+", 6, 0.605), ("Si4+", 4, 0.26), ("Fe3+", 6, 0.645)],
)
def test_radii_are_shannons(ion, coordination, expected):
    assert shannon_radius(ion, coordination) == expected


def test_a_radius_that_shannon_has_not_lies_beyond_those_he_has():
    assert shannon_radius("Mg2+", 8) == 0.89
    assert shannon_radius("Mg2+", 12) == pytest.approx(0.89 + 0.1744, abs=1e-3)


def test_ions_that_cannot_be_used():
    assert electronegativity("O2-") == 3.44
    for wrong in ("Xx2+", "Ca", "calcium"):
        with pytest.raises(DataError, match=r"expected an ion such as Ca2\+"):
            shannon_radius(wrong, 6)
    with pytest.raises(DataError, match="no ionic radius"):
        shannon_radius("Sn2+", 8)
    with pytest.raises(DataError, match="no electronegativity"):
        electronegativity("He+")
