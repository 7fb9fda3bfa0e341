"""Compositions enumerated once each, hulls as pymatgen's, candidates ranked; by a small network."""

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.analysis.phase_diagram import PDEntry, PhaseDiagram
from pymatgen.core import Composition, Element

from dmi_hpc.cli.predict import app as predict_app
from dmi_hpc.cli.screen import app as screen_app
from dmi_hpc.data.elements import ELEMENTS, element_fractions, parse_formula, reduced_formula
from dmi_hpc.data.importing.options import ImportOptions
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.errors import DataError, RecipeError
from dmi_hpc.export import export
from dmi_hpc.models.build import build
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec
from dmi_hpc.predict import Model, predict_inputs
from dmi_hpc.screening.enumerate import (
    count,
    count_stoichiometries,
    count_systems,
    stoichiometries,
    systems,
)
from dmi_hpc.screening.hull import hull_of
from dmi_hpc.screening.known import known_of, read_known
from dmi_hpc.screening.options import Candidates, Compositions, Screening, read_screening
from dmi_hpc.screening.rank import Best, Found
from dmi_hpc.screening.run import screen
from dmi_hpc.screening.stream import Network, blocks, number_of
from dmi_hpc.targets import TargetScale
from dmi_hpc.tasks import make_task

CPU = torch.device("cpu")
NETWORK = NetworkSpec(input_shape=(len(ELEMENTS),), layers=(Dense(units=16), Activation()))
OXIDES = Compositions(elements=("Na", "Fe", "Mn", "O"), components=(2, 3, 4), max_atoms=8)


def model_of(unit="eV/atom", seed=0):
    torch.manual_seed(seed)
    return Model(
        make_task({"name": "elemnet", "unit": unit}),
        TargetScale(transform="identity", mean=-0.5, std=2.0),
        build(NETWORK).eval(),
        64,
        NETWORK,
        "untrained",
        "",
        {},
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screening") / "network"
    export(model_of(), folder, "safetensors")
    return folder


# which compositions there are


@pytest.mark.parametrize(("components", "atoms"), [(2, 2), (2, 13), (3, 9), (4, 8), (5, 7)])
def test_stoichiometries_are_those_of_brute_force(components, atoms):
    every = itertools.product(range(1, atoms + 1), repeat=components)
    expected = [t for t in every if sum(t) <= atoms and math.gcd(*t) == 1]
    assert stoichiometries(components, atoms).tolist() == [list(t) for t in expected]
    assert count_stoichiometries(components, atoms) == len(expected)


def test_the_number_is_known_before():
    assert count(Compositions(components=(4,), max_atoms=10)) == 2_123_555 * 205
    assert count_systems(Compositions(components=(3,), required=("O",)), 3) == math.comb(85, 2)


def test_required_elements_are_in_every_system():
    wanted = Compositions(elements=("O", "Na", "Fe", "Mn"), required=("O",), components=(3,))
    named = [{ELEMENTS[i] for i in row} for row in systems(wanted, 3).tolist()]
    assert named == [{"O", "Na", "Mn"}, {"O", "Na", "Fe"}, {"O", "Mn", "Fe"}]


@pytest.mark.parametrize("rows", [7, 64, 10_000])
def test_blocks_hold_each_composition_once_with_its_fractions(rows):
    texts, fractions = [], []
    for block in blocks(OXIDES, CPU, rows):
        assert len(block) <= rows or block.shape[0] == 1
        texts += block.formulas().tolist()
        fractions.append(block.fractions().numpy())
    assert len(texts) == len(set(texts)) == count(OXIDES) == number_of(OXIDES, CPU)
    assert texts == [reduced_formula(parse_formula(text)) for text in texts]
    np.testing.assert_array_equal(
        np.concatenate(fractions), np.stack([element_fractions(text) for text in texts])
    )


def test_charges_balance_as_by_trying_all_states():
    wanted = Compositions(
        elements=("O", "Na", "Fe", "Mn", "C", "Cl"), components=(2, 3, 4), max_atoms=7
    )
    made = [text for block in blocks(wanted, CPU) for text in block.formulas()]

    def balanced(formula):
        amounts = parse_formula(formula)
        states = [Element(symbol).common_oxidation_states for symbol in amounts]
        sums = (
            sum(a * q for a, q in zip(amounts.values(), some, strict=True))
            for some in itertools.product(*states)
        )
        return any(total == 0 for total in sums)

    neutral = wanted.model_copy(update={"charge_neutral": True})
    kept = [text for block in blocks(neutral, CPU, 100) for text in block.formulas()]
    assert kept == [text for text in made if balanced(text)]
    assert 0 < len(kept) == number_of(neutral, CPU) < len(made)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"elements": ["Na", "Xx"]}, "found Xx; expected some of H Li"),
        ({"elements": ["Na", "Na"]}, "an element twice"),
        ({"components": [2, 2]}, "a number twice"),
        ({"elements": ["Na", "O"], "components": [3]}, "impossible of 2 elements"),
        ({"required": ["O", "S", "Se"], "components": [2]}, "3 of them required"),
        ({"components": [5], "max_atoms": 4}, "at most 4 atoms"),
        ({"elements": ["Na", "O"], "required": ["S"], "components": [2]}, "S is not one of"),
    ],
)
def test_impossible_wishes_are_named(tmp_path, keys, message):
    path = tmp_path / "screening.toml"
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    path.write_text("\n".join(["[compositions]", *lines]))
    with pytest.raises(RecipeError, match=message):
        read_screening(path)


def test_a_file_that_is_none_is_named(tmp_path):
    path = tmp_path / "screening.toml"
    path.write_text("compositions = [")
    with pytest.raises(DataError, match="not a readable screening file"):
        read_screening(path)


# hulls


def compounds(draw_amounts):
    return {
        "".join(f"{e}{n}" for e, n in zip(("Na", "Fe", "Mn", "O"), amounts, strict=True) if n): -e
        for *amounts, e in draw_amounts
        if sum(amounts) > max(amounts)
    }


AMOUNTS = st.tuples(*[st.integers(0, 5)] * 4, st.integers(-200, 3000).map(lambda n: n / 1000))


@settings(max_examples=30, deadline=None)
@given(st.lists(AMOUNTS, max_size=25).map(compounds))
def test_hulls_are_those_of_pymatgen(energies):
    symbols = ["O", "Na", "Mn", "Fe"]  # in order of Z
    hull = hull_of(tuple(ELEMENTS.index(e) for e in symbols), known_of(energies.items()))
    entries = [PDEntry(Composition(symbol), 0.0) for symbol in symbols]
    for formula, energy in energies.items():
        composition = Composition(formula)
        entries.append(PDEntry(composition, energy * composition.num_atoms))
    diagram = PhaseDiagram(entries)
    points = np.random.default_rng(0).dirichlet(np.ones(4), 20)
    for x, energy in zip(points, hull.energy(points), strict=True):
        composition = Composition(dict(zip(symbols, x, strict=True)))
        expected = diagram.get_hull_energy_per_atom(composition)
        assert energy == pytest.approx(expected, abs=1e-7)
        products = hull.products(x)
        assert sum(share for _, share in products) == pytest.approx(1)
        again = sum(
            share * energies.get(name, known_energy(name, energies)) for name, share in products
        )
        assert again == pytest.approx(expected, abs=1e-7)


def known_energy(reduced, energies):
    """Of a reduced formula: the lowest among those written; 0 of an element."""
    same = [e for f, e in energies.items() if reduced_formula(parse_formula(f)) == reduced]
    return min(same, default=0.0)


def test_a_system_without_compounds_has_the_elements():
    hull = hull_of((3, 7, 40), known_of([("NaCl", -2.0), ("Fe2Mn", 0.4)]))
    np.testing.assert_array_equal(hull.energy(np.array([[0.2, 0.3, 0.5]])), [0.0])
    assert [share for _, share in hull.products(np.array([0.2, 0.3, 0.5]))] == [0.5, 0.3, 0.2]


def test_of_one_composition_the_lowest_counts(tmp_path):
    path = tmp_path / "known.csv"
    path.write_text("formula,target\nNaCl,-1.0\n\nNa2Cl2,-2.0\nClNa,-1.5\n")
    known = read_known(Candidates(known=path))
    assert known.formulas == {"NaCl"}
    system = tuple(sorted(ELEMENTS.index(e) for e in ("Na", "Cl")))
    assert hull_of(system, known).energy(np.array([[0.5, 0.5]])) == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("formula,target\nNaCl,-1\nQq,2\n", r"line 3: 'Qq'"),
        ("formula,target\nNaCl,nan\n", r"line 2: .*finite"),
        ("formula,energy\nNaCl,-1\n", r"missing target, found formula, energy"),
    ],
)
def test_known_compounds_that_cannot_be_read_are_named(tmp_path, text, message):
    path = tmp_path / "known.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_known(Candidates(known=path))


# systems held out


def imported(tmp_path, **options):
    """(manifest, {split: formulas}) of a hundred oxides and others."""
    path = tmp_path / "compounds.csv"
    held = ["TiO2", "Ti3O5", "Na2O", "NaFeO2", "FeO", "Na2Fe", "Ti", "O2"]
    others = [f"Ba{i}TiO{i + 2}" for i in range(1, 40)] + [f"NaFe{i}Mn" for i in range(1, 40)]
    path.write_text("formula,target\n" + "".join(f"{f},-1.0\n" for f in held + others))
    out = tmp_path / "data"
    options = ImportOptions(validation=0.2, test=0.1, processes=1, **options)
    manifest, _ = import_files([path], out, options)
    with ShardSet.open(out) as shards:
        splits = {
            name: {bytes(f).decode() for f in shards.gather("formula", shards.rows(name))}
            for name in ("train", "validation", "test")
        }
    return manifest, splits


def test_compounds_of_a_system_held_out_are_for_testing_alone(tmp_path):
    (tmp_path / "a").mkdir()
    _, plain = imported(tmp_path)
    manifest, splits = imported(tmp_path / "a", hold_out=("Ti-O", "O-Fe-Na"))
    held = {"TiO2", "Ti3O5", "Na2O", "NaFeO2", "FeO", "Na2Fe"}
    assert held <= splits["test"] and not held <= plain["test"]
    for name in ("train", "validation"):  # all others, and the elements, are where they were
        assert splits[name] == plain[name] - held
    assert manifest.plan.provenance["options"]["hold_out"] == ["Ti-O", "O-Fe-Na"]


@pytest.mark.parametrize("system", ["Ti", "Ti-Ox", "", "Ti, O"])
def test_systems_that_are_none_are_named(system):
    with pytest.raises(ValueError, match=r"hold_out: found .* expected systems such as Na-Fe-O"):
        ImportOptions(hold_out=(system,))
    with pytest.raises(ValueError, match="cannot both decide the split"):
        ImportOptions(hold_out=("Ti-O",), split_column="split")


# the whole


KNOWN = [("Na2O", -1.4), ("Fe2O3", -1.7), ("MnO", -2.0), ("NaFeO2", -1.8), ("Fe2Mn", 0.1)]


def by_hand(model, known, wanted):
    """{formula: (energy, above the hull)} of all compositions, one after another, by pymatgen."""
    entries = [PDEntry(Composition(e), 0.0) for e in wanted.elements]
    entries += [PDEntry(Composition(f), e * Composition(f).num_atoms) for f, e in known]
    diagram = PhaseDiagram(entries)
    found = {}
    for block in blocks(wanted, CPU):
        for text in block.formulas():
            energy = float(model.predict({"fractions": element_fractions(text)[None]})[0])
            found[text] = (energy, energy - diagram.get_hull_energy_per_atom(Composition(text)))
    return found


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_screening_is_what_one_by_one_gives(processes):
    model, known = model_of(), known_of(KNOWN)
    expected = by_hand(model, KNOWN, OXIDES)
    candidates = Candidates(within=0.4, new=False)
    what = Screening(compositions=OXIDES, candidates=candidates, processes=processes)
    told = []
    result = screen(model, what, known, told.append)
    rows = result.rows
    near = {text: pair for text, pair in expected.items() if pair[1] <= 0.4}
    assert result.predicted == told[-1] == len(expected)
    assert 0 < result.within == len(rows["formula"]) == len(near) < len(expected)
    names = [reduced_formula(parse_formula(text)) for text in rows["formula"]]
    assert set(names) == set(near)
    for name, energy, above in zip(
        names, rows["formation_energy"], rows["above_known_hull"], strict=True
    ):
        assert (energy, above) == pytest.approx(near[name], abs=1e-5)
    assert rows["above_known_hull"] == sorted(rows["above_known_hull"])
    flagged = {name for name, yes in zip(names, rows["known"], strict=True) if yes}
    assert flagged == known.formulas & set(near)


def test_candidates_are_compared_with_each_other():
    model, known = model_of(), known_of(KNOWN)
    what = Screening(compositions=OXIDES, candidates=Candidates(within=9.0))
    rows = screen(model, what, known).rows
    assert not known.formulas & set(map(str, rows["formula"])) and not any(rows["known"])
    entries = [PDEntry(Composition(e), 0.0) for e in OXIDES.elements]
    found = zip(rows["formula"], rows["formation_energy"], strict=True)
    for formula, energy in [*KNOWN, *found]:
        entries.append(PDEntry(Composition(formula), energy * Composition(formula).num_atoms))
    diagram = PhaseDiagram(entries)
    expected = [diagram.get_e_above_hull(entry) for entry in entries[len(OXIDES.elements) + 5 :]]
    np.testing.assert_allclose(rows["above_hull"], expected, atol=1e-6)
    assert 0 < sum(value < 1e-9 for value in rows["above_hull"]) < len(expected)


def test_the_best_of_all_and_of_each_system_are_kept():
    model, known = model_of(), known_of(KNOWN)

    def kept(**keys):
        candidates = Candidates(within=9.0, **keys)
        return screen(model, Screening(compositions=OXIDES, candidates=candidates), known).rows

    everything = kept()
    best = kept(most=17)
    assert best["formula"] == everything["formula"][:17]
    few = kept(per_system=2)
    by_system = {}
    for formula, system in zip(everything["formula"], everything["system"], strict=True):
        by_system.setdefault(system, []).append(formula)
    assert set(few["formula"]) == {f for some in by_system.values() for f in some[:2]}


@pytest.mark.parametrize("seed", range(5))
def test_what_is_kept_does_not_depend_on_the_blocks(seed):
    rng = np.random.default_rng(seed)
    order = np.lexsort((found := np.sort(rng.integers(0, 5, (500, 3)), axis=1)).T[::-1])
    above = rng.permutation(500) / 100
    found = Found(found[order], rng.integers(1, 9, (500, 3)), -above, above)
    kept = []
    for step in (500, 7):
        best = Best(most=20, per_system=3)
        for start in range(0, 500, step):
            best.add(found.take(np.arange(start, min(start + step, 500))))
        (part,) = best.parts()
        kept.append(sorted(part.above.tolist()))
    assert len(kept[0]) == 20 and kept[0] == kept[1]


def test_a_network_of_something_else_is_refused():
    what = Screening(compositions=OXIDES)
    with pytest.raises(DataError, match=r"formation energies in eV/atom alone; found .* in GPa"):
        screen(model_of(unit="GPa"), what, known_of([]))
    other = make_task({"name": "toy_task:Toy"})
    model = Model(other, TargetScale(transform="identity", mean=0, std=1), *[None] * 6)
    with pytest.raises(DataError, match="made for networks that read 'fractions' alone"):
        Network(model)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_less_precision_is_close(precision):
    model = model_of()
    block = next(blocks(OXIDES, CPU))
    exact, other = Network(model)(block.fractions()), Network(model, precision)(block.fractions())
    assert other.dtype == torch.float32
    np.testing.assert_allclose(other, exact, atol=0.02)
    assert torch.get_float32_matmul_precision() == "highest"


def test_nothing_near_the_hull_is_an_empty_list():
    what = Screening(compositions=OXIDES, candidates=Candidates(within=-99.0))
    result = screen(model_of(), what, known_of(KNOWN))
    assert (result.within, result.predicted) == (0, count(OXIDES))
    assert all(values == [] for values in result.rows.values())


# commands


SCREENING = """
[compositions]
elements = ["Na", "Fe", "Mn", "O"]
required = ["O"]
components = [2, 3]
max_atoms = 8

[candidates]
known = "{known}"
within = 9.0
"""


@pytest.fixture
def screening(tmp_path):
    known = tmp_path / "known.csv"
    known.write_text("formula,target\n" + "".join(f"{f},{e}\n" for f, e in KNOWN))
    path = tmp_path / "screening.toml"
    path.write_text(SCREENING.format(known=known))
    return path


def test_the_command_writes_a_ranked_list(exported, screening, tmp_path, capsys):
    out = tmp_path / "screened"
    for _ in range(2):  # an earlier one is replaced
        screen_app([str(exported), str(screening), "--out", str(out)], standalone_mode=False)
    total = count(read_screening(screening).compositions)
    assert f"{total:,} compositions on cpu; 5 known compounds" in capsys.readouterr().out
    with (out / "candidates.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    summary = json.loads((out / "screening.json").read_text())
    assert summary["predicted"] == total and summary["kept"] == len(rows) == total - 4
    above = [float(row["above_known_hull (eV/atom)"]) for row in rows]
    assert above == sorted(above)
    assert {row["system"] for row in rows} >= {"Fe-O", "Fe-Na-O"}


def test_a_folder_of_something_else_is_left_alone(exported, screening, tmp_path):
    with pytest.raises(DataError, match=r"no earlier screening"):
        screen_app([str(exported), str(screening), "--out", str(tmp_path)], standalone_mode=False)
    assert screening.exists()


def test_predict_streams_all_compositions(exported, screening, tmp_path):
    out = tmp_path / "all.csv"
    predict_app([str(exported), str(screening), "--out", str(out)], standalone_mode=False)
    with out.open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == count(read_screening(screening).compositions)
    model = model_of()
    fractions = np.stack([element_fractions(row["input"]) for row in rows])
    found = [float(row["formation_enthalpy (eV/atom)"]) for row in rows]
    np.testing.assert_allclose(found, model.predict({"fractions": fractions}), rtol=1e-5)
    screening.write_text(screening.read_text().replace("= 8", "= 8\ncharge_neutral = true"))
    neutral = predict_inputs(model, screening)
    assert neutral.rows == sum(len(block["input"]) for block in neutral.blocks) < len(rows)


def test_the_page_names_every_key(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "screening.md").read_text()
    path = tmp_path / "screening.toml"
    path.write_text(text.split("```toml file=screening.toml\n")[1].split("```")[0])
    read_screening(path)
    for table, config in (("compositions.", Compositions), ("candidates.", Candidates)):
        assert all(f"`{table}{name}`" in text for name in config.model_fields)
    assert all(f"`{name}`" in text for name in ("precision", "processes"))
    assert f"{count(Compositions(components=(4,), max_atoms=10)):,}" in text
