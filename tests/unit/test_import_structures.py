import gzip
import json
import os
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import given, settings
from hypothesis import strategies as st
from pymatgen.core import Lattice, Structure

from dmi_hpc.cli.data_import import import_
from dmi_hpc.data.importing.crystals import Crystal, neighbours_of
from dmi_hpc.data.importing.options import FieldSpec, ImportOptions, field_of_text
from dmi_hpc.data.importing.run import REPORT, import_files
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.errors import DataError

ROCK_SALT = Structure.from_spacegroup(
    "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3]
)
WURTZITE = Structure.from_spacegroup(
    "P6_3mc", Lattice.hexagonal(3.25, 5.2), ["Zn", "O"], [[1 / 3, 2 / 3, 0], [1 / 3, 2 / 3, 0.382]]
)  # fmt: skip


def run(source, target, **options):
    options = {"validation": 0, "test": 0, **options}
    return import_files([source], target / "set", ImportOptions(**options))


def rows(tmp_path, name):
    with ShardSet.open(tmp_path / "set") as shards:
        return shards.gather(name, shards.rows("all"))


def cifs(folder):
    folder.mkdir()
    (folder / "salt.cif").write_text(ROCK_SALT.to(fmt="cif"))
    with gzip.open(folder / "wurtzite.cif.gz", "wt") as stream:
        stream.write(WURTZITE.to(fmt="cif"))
    return folder


def test_cif_folder_with_the_table_of_cgcnn(tmp_path):
    folder = cifs(tmp_path / "in")
    (folder / "id_prop.csv").write_text("salt,8.5\nwurtzite,3.4\nlost,1\n")
    manifest, report = run(folder, tmp_path)
    assert report.notes == [f"{folder / 'id_prop.csv'}: 1 row without a file of that name (lost)"]
    assert rows(tmp_path, "name").tolist() == [b"salt", b"wurtzite"]
    assert rows(tmp_path, "formula").tolist() == [b"NaCl", b"OZn"]
    assert rows(tmp_path, "target").tolist() == [8.5, 3.4]
    numbers, positions = rows(tmp_path, "atomic_number"), rows(tmp_path, "position")
    assert numbers.lengths.tolist() == [8, 4]
    assert sorted(numbers[1].tolist()) == [8, 8, 30, 30]
    cell = rows(tmp_path, "cell")[1]
    found = Structure(cell, numbers[1], positions[1], coords_are_cartesian=True)
    assert found.matches(WURTZITE)
    assert rows(tmp_path, "pbc").tolist() == [[1, 1, 1]] * 2
    assert manifest.plan.split_rule.key.startswith("reduced formula")
    assert manifest.field("position").unit == "angstrom"
    (folder / "id_prop.csv").write_text("salt,8.5\n")
    with pytest.raises(DataError, match=r"wurtzite\.cif\.gz: not in .*id_prop\.csv"):
        run(folder, tmp_path, replace=True)


def test_unusable_structures_are_bad_records_with_a_reason(tmp_path):
    folder = cifs(tmp_path / "in")
    half = Structure(Lattice.cubic(3), [{"Fe": 0.5, "Ni": 0.5}], [[0, 0, 0]])
    (folder / "alloy.cif").write_text(half.to(fmt="cif"))
    (folder / "empty.cif").write_text("")
    (folder / "torn.cif").write_text(ROCK_SALT.to(fmt="cif")[:300])
    (folder / "POSCAR_new").write_text(ROCK_SALT.to(fmt="poscar"))
    lines = ROCK_SALT.to(fmt="poscar").splitlines()
    (folder / "POSCAR_vasp4").write_text(
        "\n".join([*lines[:5], *(w.rstrip("NaCl ") for w in lines[6:])])
    )
    (folder / "bad.vasp").write_text("nonsense\n")
    _, report = run(folder, tmp_path, bad="skip")
    found = {Path(bad.where).name: bad.reason for bad in report.bad}
    assert found.keys() == {"alloy.cif", "empty.cif", "torn.cif", "POSCAR_vasp4", "bad.vasp"}
    assert "disordered" in found["alloy.cif"]
    assert "names no elements" in found["POSCAR_vasp4"]
    for name in ("empty.cif", "torn.cif", "bad.vasp"):
        assert "not a readable" in found[name]
    assert rows(tmp_path, "name").tolist() == [b"POSCAR_new", b"salt", b"wurtzite"]
    with pytest.raises(DataError, match=r"5 records(.|\n)*alloy\.cif: disordered"):
        run(folder, tmp_path, replace=True)


def frames():
    rng = np.random.default_rng(0)
    found = []
    for i in range(5):
        places = np.diag([0.0, 1.5, 3.0]) + rng.uniform(0, 0.5, (3, 3))
        atoms = ase.Atoms("SiO2" if i % 2 else "H2O", positions=places)
        if i % 2:
            atoms.set_cell(np.eye(3) * 5 + rng.normal(size=(3, 3)) / 9)
            atoms.pbc = (True, True, False)
        atoms.info |= {"kind": f"β{i}", "temperature": 300 + i}
        atoms.arrays["q"] = rng.normal(size=3)
        atoms.calc = SinglePointCalculator(atoms, energy=-1.5 - i, forces=rng.normal(size=(3, 3)))
        found.append(atoms)
    return found


def test_extended_xyz(tmp_path):
    path = tmp_path / "md.extxyz"
    ase.io.write(path, frames(), format="extxyz")
    manifest, _ = run(path, tmp_path)
    assert {f.name: (f.dtype, f.shape, f.axis) for f in manifest.fields[6:-1]} == {
        "q": ("float64", (), "atom"),
        "forces": ("float64", (3,), "atom"),
        "kind": ("S3", (), None),
        "temperature": ("int64", (), None),
        "energy": ("float64", (), None),
    }
    expected = frames()
    assert rows(tmp_path, "name").tolist() == [f"md:{i}".encode() for i in range(5)]
    assert rows(tmp_path, "energy").tolist() == [-1.5 - i for i in range(5)]
    assert rows(tmp_path, "kind")[3].decode() == "β3"
    for i, forces in enumerate(rows(tmp_path, "forces")):
        assert np.allclose(forces, expected[i].get_forces(), atol=1e-7)
        assert np.allclose(rows(tmp_path, "position")[i], expected[i].positions, atol=1e-7)
        assert np.allclose(rows(tmp_path, "cell")[i], expected[i].cell.array, atol=1e-7)
    assert rows(tmp_path, "pbc").tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]]


def test_properties_that_not_all_have(tmp_path):
    path = tmp_path / "md.xyz"
    ase.io.write(path, frames(), format="extxyz")
    text = path.read_text().replace("temperature=302", "").replace("kind=β1", "")
    path.write_text(text)
    manifest, report = run(path, tmp_path)
    assert "kind" not in [f.name for f in manifest.fields]
    assert "property 'temperature' is left out: in 4 of 5 structures" in report.notes
    fields = (FieldSpec(name="T", source="temperature", dtype="float32", unit="K"),)
    _, report = run(path, tmp_path, fields=fields, bad="skip", replace=True)
    assert [b.reason for b in report.bad] == ["temperature: no value"]
    assert report.bad[0].where == f"{path}:11 (frame 2)"
    assert rows(tmp_path, "T").tolist() == [300, 301, 303, 304]
    with pytest.raises(DataError, match=r"no structure has a property 'gap'; found .*energy"):
        run(path, tmp_path, fields=(FieldSpec(name="gap"),))


def test_torn_xyz_files_name_line_and_frame(tmp_path):
    path = tmp_path / "md.extxyz"
    ase.io.write(path, frames(), format="extxyz")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:7], "Xx 0 nonsense\n", *lines[8:13]]))
    _, report = run(path, tmp_path, bad="skip")
    assert [bad.where.partition("extxyz:")[2] for bad in report.bad] == [
        "6 (frame 1)",
        "11 (frame 2)",
    ]
    assert "ends after 1 of 3 atoms" in report.bad[-1].reason
    path.write_text("".join(lines[:5]) + "\nthree\n")
    _, report = run(path, tmp_path, bad="skip", replace=True)
    assert [str(b).partition("extxyz:")[2] for b in report.bad] == [
        "7 (frame 1): expected the number of atoms, found 'three'"
    ]
    path.write_text("")
    with pytest.raises(DataError, match="no usable record in 0"):
        run(path, tmp_path)


JARVIS = {
    "lattice_mat": np.eye(3).tolist(),
    "coords": [[0, 0, 0]],
    "elements": ["Cu"],
    "cartesian": False,
}


@pytest.mark.parametrize("shape", ["list", "keys", "pandas", "lines", "one"])
def test_json_of_several_shapes(tmp_path, shape):
    salt, zno = ROCK_SALT.as_dict(), WURTZITE.as_dict()
    records = [
        {"structure": salt, "gap": 5.0, "id": "a"},
        {"structure": zno, "gap": 3, "id": "b"},
        {"atoms": JARVIS, "gap": 0.0, "id": "c"},
    ]
    path = tmp_path / "data.json"
    if shape == "list":
        path.write_text(json.dumps(records))
    elif shape == "keys":
        path.write_text(json.dumps({record["id"]: record for record in records}))
    elif shape == "pandas":
        table = [[r.get("structure", JARVIS), r["gap"]] for r in records]
        path.write_text(
            json.dumps({"index": list("abc"), "columns": ["structure", "gap"], "data": table})
        )
    elif shape == "lines":
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    else:
        path.write_text(json.dumps(salt))
        run(path, tmp_path)
        assert rows(tmp_path, "formula").tolist() == [b"NaCl"]
        return
    run(path, tmp_path)
    assert rows(tmp_path, "name").tolist() == [b"a", b"b", b"c"]
    assert rows(tmp_path, "formula").tolist() == [b"NaCl", b"OZn", b"Cu"]
    assert rows(tmp_path, "gap").tolist() == [5, 3, 0]


def test_bad_json(tmp_path):
    path = tmp_path / "data.json"
    flat = {**JARVIS, "lattice_mat": [[1, 0, 0], [2, 0, 0], [0, 0, 1]]}
    content = [{"atoms": JARVIS, "e": 1.0}, {"e": 1}, {"atoms": flat, "e": 1.0}, 7,
               {"atoms": {**JARVIS, "elements": ["Xx"]}, "e": 1.0}, {"atoms": JARVIS, "e": "high"},
               {"atoms": JARVIS, "e": float("nan")}]  # fmt: skip
    path.write_text(json.dumps(content))
    fields = (FieldSpec(name="e", dtype="float64"),)
    _, report = run(path, tmp_path, bad="skip", fields=fields)
    reasons = {bad.where.partition("data.json")[2]: bad.reason for bad in report.bad}
    assert reasons["[1]"] == "expected one structure in the object, found 0"
    assert "without volume" in reasons["[2]"]
    assert reasons["[3]"] == "expected an object, found int"
    assert reasons["[4]"] == "atoms of no known element"
    assert reasons["[5]"] == "e: expected numbers (), found 'high'"
    assert reasons["[6]"] == "e: expected finite values, found nan"
    path.write_text("[{]")
    with pytest.raises(DataError, match=r"data\.json: not valid JSON"):
        run(path, tmp_path)


def test_compositions_do_not_leak_unless_asked(tmp_path):
    path = tmp_path / "md.extxyz"
    ase.io.write(path, [a for _ in range(12) for a in frames()], format="extxyz")
    run(path, tmp_path, validation=0.4, test=0.3, seed=1)
    pairs = set(
        zip(rows(tmp_path, "formula").tolist(), rows(tmp_path, "split").tolist(), strict=True)
    )
    assert len(pairs) == 2
    manifest, _ = run(path, tmp_path, group="row number", validation=0.4, test=0.3, replace=True)
    assert min(manifest.split_rows.values()) > 5
    assert manifest.plan.split_rule.key == "row number"
    _, report = run(path, tmp_path, group="temperature", validation=0.01, test=0.3, replace=True)
    assert any("no row is for validation" in note for note in report.notes)
    kinds = set(
        zip(rows(tmp_path, "temperature").tolist(), rows(tmp_path, "split").tolist(), strict=True)
    )
    assert len(kinds) == 5


def test_neighbours_of_rock_salt(tmp_path):
    path = tmp_path / "POSCAR"
    path.write_text(ROCK_SALT.to(fmt="poscar"))
    manifest, _ = run(path, tmp_path, cutoff=8, max_neighbours=6)
    pairs, distances = rows(tmp_path, "edge_index")[0], rows(tmp_path, "distance")[0]
    numbers = rows(tmp_path, "atomic_number")[0]
    assert manifest.field("edge_index").refers == "atom"
    assert np.bincount(pairs[:, 0]).tolist() == [6] * 8
    assert np.allclose(distances, 2.82)
    assert (numbers[pairs[:, 0]] != numbers[pairs[:, 1]]).all()  # each Na has 6 Cl around it
    images, positions = rows(tmp_path, "edge_image")[0], rows(tmp_path, "position")[0]
    vectors = positions[pairs[:, 1]] + images @ rows(tmp_path, "cell")[0] - positions[pairs[:, 0]]
    assert np.allclose(np.linalg.norm(vectors, axis=1), distances, atol=1e-6)


@given(
    st.integers(1, 5),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1.0, 2.5, 4.0]),
)
@settings(deadline=None, max_examples=80)
def test_neighbours_are_those_of_brute_force(atoms, periodic, seed, cutoff):
    rng = np.random.default_rng(seed)
    cell = np.eye(3) * rng.uniform(1.5, 4, 3) + rng.uniform(-0.4, 0.4, (3, 3))
    periodic = np.array(periodic, dtype=np.uint8)
    if seed % 2:
        cell[periodic == 0] = 0  # as a file without those vectors has it
    positions = rng.uniform(-6, 6, (atoms, 3))
    crystal = Crystal(np.full(atoms, 14), positions, cell, periodic)
    found = neighbours_of(crystal, cutoff, None)
    expected = set()
    reach = [range(-14, 15) if p else (0,) for p in periodic]
    grid = np.stack(np.meshgrid(*reach, indexing="ij"), -1).reshape(-1, 3)
    shifts = grid @ cell
    for i in range(atoms):
        for j in range(atoms):
            d = np.linalg.norm(positions[j] + shifts - positions[i], axis=1)
            assert not (np.abs(d - cutoff) < 1e-7).any()
            for k in np.flatnonzero((d < cutoff) & (d > 1e-8)):
                expected.add((i, j, *grid[k].tolist()))
    got = [(*p, *m) for p, m in zip(found.pairs.tolist(), found.images.tolist(), strict=True)]
    assert set(got) == expected
    assert len(got) == len(expected)
    same = found.pairs[1:, 0] == found.pairs[:-1, 0]
    assert (np.diff(found.distances)[same] >= -1e-5).all()
    nearest = neighbours_of(crystal, cutoff, 3)
    kept = np.concatenate([np.flatnonzero(found.pairs[:, 0] == i)[:3] for i in range(atoms)])
    np.testing.assert_array_equal(nearest.pairs, found.pairs[kept])
    np.testing.assert_array_equal(nearest.images, found.images[kept])
    assert np.bincount(nearest.pairs[:, 0], minlength=atoms).tolist() == [
        min(3, n) for n in np.bincount(found.pairs[:, 0], minlength=atoms)
    ]


def test_phonon_peaks_of_matbench(tmp_path):
    default = Path(__file__).parents[2].parent / "shared" / "data"
    path = Path(os.environ.get("DMI_TEST_DATA", default)) / "cgcnn" / "matbench_phonons.json.gz"
    if not path.exists():
        pytest.skip(f"real data not at hand: {path}")
    fields = (FieldSpec(name="peak", source="last phdos peak", dtype="float32", unit="1/cm"),)
    options = ImportOptions(
        fields=fields, cutoff=8, max_neighbours=12, floats="float32", processes=1
    )
    manifest, report = import_files([path], tmp_path / "set", options)
    assert (manifest.rows, report.bad) == (1265, [])
    assert manifest.field("position").dtype == "float32"
    edges, atoms = rows(tmp_path, "edge_index"), rows(tmp_path, "atomic_number")
    assert (edges.lengths == 12 * atoms.lengths).all()
    assert rows(tmp_path, "distance").values.max() <= 8


def lines_of(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def atoms(cell, elements, coords):
    return {"lattice_mat": (np.eye(3) * cell).tolist(), "elements": elements, "coords": coords}


@pytest.mark.parametrize("options", [{"cutoff": 8.0, "max_neighbours": 2}, {}])
def test_atoms_on_top_of_each_other_are_bad_records(tmp_path, options):
    good = atoms(4, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    same = atoms(4, ["Na", "Cl"], [[0, 0, 0], [0, 0, 0]])
    across = atoms(4, ["Na", "Na"], [[0.01, 0, 0], [0.99, 0, 0]])  # through the face of the cell
    thin = atoms([9, 9, 0.4], ["Na"], [[0, 0, 0]])
    path = lines_of(tmp_path / "in.jsonl", *({"atoms": a} for a in (good, same, across, thin)))
    _, report = run(path, tmp_path, bad="skip", **options)
    assert [bad.where for bad in report.bad] == [f"{path}:{line}" for line in (2, 3, 4)]
    reasons = [bad.reason for bad in report.bad]
    assert all("on top of each other" in reason for reason in reasons)
    assert "atoms 0 and 1" in reasons[0]
    assert ": 0 angstrom" in reasons[0]
    assert ": 0.08 angstrom apart, expected at least 0.5" in reasons[1]
    assert "atom 0 and its periodic image" in reasons[2]
    assert report.kept == 1


def test_atoms_without_neighbours_are_kept_and_told(tmp_path, capsys):
    alone = atoms(20, ["He"], [[0, 0, 0]])
    partly = atoms(20, ["H", "H", "He"], [[0, 0, 0], [0.04, 0, 0], [0.5, 0.5, 0.5]])
    dense = atoms(3, ["Cu"], [[0, 0, 0]])
    records = [{"atoms": a} for a in (alone, dense, partly)]
    path = lines_of(tmp_path / "in.jsonl", *records)
    import_(files=[path], out=tmp_path / "set", cutoff=8, max_neighbours=12, validation=0, test=0)
    shown = " ".join(capsys.readouterr().err.split())
    assert "atom 0 has no neighbour within 8 angstrom" in shown
    report = json.loads((tmp_path / "set" / REPORT).read_text())
    assert report["kept"] == 3
    assert report["remarks"] == [
        {"where": f"{path}:1", "reason": "atom 0 has no neighbour within 8 angstrom"},
        {"where": f"{path}:3", "reason": "atom 2 has no neighbour within 8 angstrom"},
    ]
    assert rows(tmp_path, "edge_index").lengths.tolist() == [0, 12, 2]


def test_a_given_split_that_parts_a_composition_is_told(tmp_path):
    salt = atoms(4, ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    copper = atoms(3, ["Cu"], [[0, 0, 0]])
    doubled = atoms(6, ["Cu", "Cu"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    split = ["train", "test", "train", "val", "train"]
    structures = [salt, salt, copper, doubled, copper]
    path = lines_of(
        tmp_path / "in.jsonl",
        *(
            {"id": f"n{i}", "atoms": a, "part": p}
            for i, (a, p) in enumerate(zip(structures, split, strict=True))
        ),
    )
    _, report = run(path, tmp_path, split_column="part")
    assert report.crossing == 2
    assert report.across == [
        "NaCl: train (n0, ...), test (n1, ...)",
        "Cu: train (n2, ...), validation (n3, ...)",
    ]
    assert (report.kept, report.skipped) == (5, 0)
    _, report = run(path, tmp_path, replace=True)  # by composition: none can cross
    assert (report.crossing, report.across) == (0, [])


def test_optional_properties_are_nan_where_not_known(tmp_path):
    copper = atoms(3, ["Cu"], [[0, 0, 0]])
    values = [1.5, None, float("nan"), 2.5, "high"]
    path = lines_of(tmp_path / "in.jsonl", *({"atoms": copper, "k": v, "e": 0.5} for v in values))
    fields = (field_of_text("k=float32?:GPa:bulk modulus"), FieldSpec(name="e"))
    manifest, report = run(path, tmp_path, fields=fields, bad="skip")
    assert [str(bad).rpartition(":")[0] for bad in report.bad] == [f"{path}:5: k"]
    np.testing.assert_array_equal(rows(tmp_path, "k"), np.float32([1.5, np.nan, np.nan, 2.5]))
    field, known = manifest.field("k"), manifest.statistics["k"]
    assert (field.optional, field.dtype, field.unit) == (True, "float32", "GPa")
    assert (known.count, known.mean) == (2, 2.0)
    assert "optional" not in manifest.field("e").model_dump()
    with pytest.raises(DataError, match=r"3 records(.|\n)*k: no value"):
        run(path, tmp_path, fields=(FieldSpec(name="k"),), replace=True)
    with pytest.raises(DataError, match="optional needs a float dtype, found int64"):
        field_of_text("k=int64?")


def test_optional_columns_of_labels(tmp_path):
    folder = cifs(tmp_path / "in")
    (folder / "labels.csv").write_text("id,k,gap\nsalt,,8.5\nwurtzite,150,3.4\n")
    fields = (FieldSpec(name="k", optional=True), FieldSpec(name="gap"))
    run(folder, tmp_path, labels=folder / "labels.csv", fields=fields)
    np.testing.assert_array_equal(rows(tmp_path, "k"), [np.nan, 150])
    assert rows(tmp_path, "gap").tolist() == [8.5, 3.4]
