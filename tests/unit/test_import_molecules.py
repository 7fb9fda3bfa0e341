import builtins
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from dmi_hpc.data.importing.molecules import (
    features_of,
    other_smiles,
    parse_smiles,
    read_molecules,
    scaffold_of,
)
from dmi_hpc.data.importing.options import FieldSpec, ImportOptions
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.data.manifest import split_of
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.errors import DataError

pytest.importorskip("rdkit", reason="the extra 'molecules' is not installed")

TABLE = """smiles,target
CCO,-0.77
C,1.5
c1ccccc1C#N,2.25
OCC,-0.8
"""


def run(tmp_path, text, *, name="in.csv", **options):
    source = tmp_path / name
    source.write_text(text)
    options = {"validation": 0, "test": 0, "unit": "1", **options}
    return import_files([source], tmp_path / "set", ImportOptions(**options))


def rows(tmp_path, name):
    """In the order of the lines: a set numbers the rows of its splits one after the other."""
    with ShardSet.open(tmp_path / "set") as shards:
        everything = shards.rows("all")
        order = np.argsort(shards.gather("line", everything))
        return shards.gather(name, np.asarray(everything)[order])


def test_table_of_smiles(tmp_path):
    manifest, report = run(tmp_path, TABLE)
    assert (manifest.plan.task, manifest.rows, report.bad) == ("molecule", 4, [])
    assert rows(tmp_path, "value").tolist() == [-0.77, 1.5, 2.25, -0.8]
    assert rows(tmp_path, "smiles").tolist() == [b"CCO", b"C", b"c1ccccc1C#N", b"OCC"]
    texts = [row.tobytes() for row in rows(tmp_path, "characters")]
    assert texts == [b"CCO", b"C", b"N#Cc1ccccc1", b"CCO"]
    assert rows(tmp_path, "atomic_number")[2].tolist().count(7) == 1
    ends = rows(tmp_path, "edge_index")
    assert ends[0].tolist() == [[0, 1], [1, 2], [1, 0], [2, 1]]
    assert len(ends[1]) == 0, "a molecule of one atom has no bonds"
    bits = rows(tmp_path, "maccs"), rows(tmp_path, "morgan")
    assert [b.shape for b in bits] == [(4, 167), (4, 1024)]
    assert all((b[0] == b[3]).all() and (b[0] != b[2]).any() for b in bits)
    assert rows(tmp_path, "line").tolist() == [2, 3, 4, 5]
    assert manifest.field("edge_index").refers == "atom"


def test_features_of_atoms_and_bonds():
    found = features_of(parse_smiles("C[C@H](N)/C=C/c1cc[nH]c1"))
    atoms, bonds = found["atom_features"], found["bond_features"]
    assert atoms[1].tolist()[0] == 3 and atoms[1, 4] == 1 and atoms[1, 5] in (1, 2)
    ring = atoms[:, 3].astype(bool)
    assert ring.sum() == 5 and (atoms[ring, 6] == 1).all()
    order = bonds[: len(bonds) // 2, 0].tolist()
    assert order.count(1) == 1 and order.count(3) == 5
    assert bonds[order.index(1), 3] == 3, "trans is E"
    assert (bonds[: len(bonds) // 2] == bonds[len(bonds) // 2 :]).all()
    assert features_of(parse_smiles("[NH4+]"))["atom_features"][0, [1, 4]].tolist() == [1, 4]


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [
        ("", "found nothing"),
        ("C(C", "RDKit cannot read it"),
        ("xyz", "RDKit cannot read it"),
        ("CN(C)(C)C", "valence for atom # 1 N, 4, is greater than permitted"),
        ("c1ccc1c", "not a valid SMILES"),
        ("[FeH200]", "not a valid SMILES"),
        ("C*", "'*' of no element"),
        ("CCO ethanol", "white space"),
        ("C" * 3000, "longer than 2048 bytes"),
    ],
)
def test_invalid_smiles_say_why_and_rdkit_is_silent(smiles, reason, capfd):
    with pytest.raises(DataError, match=reason.replace("*", r"\*")):
        parse_smiles(smiles)
    assert capfd.readouterr() == ("", "")


def test_bad_records_are_named_by_line(tmp_path):
    text = TABLE + "C(C,1\nCC,nan\n\nCCC,\nCCCC,4\nCN\n"
    with pytest.raises(DataError, match="4 records cannot be used"):
        run(tmp_path, text)
    manifest, report = run(tmp_path, text, bad="skip")
    assert manifest.rows == 5
    told = [str(bad).rpartition("in.csv:")[2] for bad in report.bad]
    assert [line.partition(":")[0] for line in told] == ["6", "7", "9", "11"]
    assert "'C(C': not a valid SMILES" in told[0]
    assert "expected finite values, found nan" in told[1]
    assert "expected a number, found nothing" in told[2]
    assert "expected 2 cells, found 1" in told[3]


def test_a_molecule_is_in_one_split_however_it_is_written(tmp_path):
    chains = ["C" * n + "O" for n in range(1, 40)]
    text = "smiles,target\n" + "".join(f"{c},1\n{c[::-1]},2\n" for c in chains)
    manifest, _ = run(tmp_path, text, validation=0.3, test=0.3)
    splits = rows(tmp_path, "split").reshape(-1, 2)
    assert (splits[:, 0] == splits[:, 1]).all()
    assert set(splits[:, 0]) == {0, 1, 2}
    assert manifest.plan.split_rule.key == "canonical SMILES"
    run(tmp_path, text, validation=0.3, test=0.3, group="row number", replace=True)
    splits = rows(tmp_path, "split").reshape(-1, 2)
    assert (splits[:, 0] != splits[:, 1]).any()


def test_split_by_scaffold(tmp_path):
    rings = ["c1ccccc1", "c1ccncc1", "C1CCCCC1", "c1ccc2ccccc2c1", "C1CCOC1", "c1ccsc1"]
    text = "smiles,target\n" + "".join(f"{'C' * n}{ring},1\n" for ring in rings for n in (0, 1, 2))
    run(tmp_path, text, validation=0.3, test=0.3, group="scaffold", kind="molecule", seed=1)
    found = rows(tmp_path, "split").reshape(-1, 3)
    assert (found == found[:, :1]).all()
    assert found[0, 0] == split_of(1, "c1ccccc1", 0.3, 0.3)
    assert len(set(found[:, 0])) > 1
    assert scaffold_of(parse_smiles("CCO")) == "CCO", "molecules without rings are no group"


def test_given_splits_are_honoured_and_molecules_across_them_told(tmp_path):
    text = "smiles,target,part\nCCO,1,train\nOCC,2,test\nC,3,val\nCC,4,train\n"
    _, report = run(tmp_path, text, split_column="part")
    assert rows(tmp_path, "split").tolist() == [0, 2, 1, 0]
    assert report.crossing == 1
    assert report.across[0].startswith("CCO: train (")


def test_columns_of_other_names_and_delimiters(tmp_path):
    """FreeSolv: semicolons, spaces, '#' in SMILES and before the header."""
    text = "# id; SMILES; value (kcal/mol); more\nm1; C#N; -3.02; 0.6\nm2; CCO; -5; 0.7\n"
    options = {"format": "csv", "delimiter": ";", "smiles": "SMILES", "value": "value (kcal/mol)"}
    more = FieldSpec(name="uncertainty", source="more", unit="kcal/mol")
    manifest, _ = run(tmp_path, text, name="freesolv.txt", fields=(more,), **options)
    assert rows(tmp_path, "smiles").tolist() == [b"C#N", b"CCO"]
    assert rows(tmp_path, "value").tolist() == [-3.02, -5.0]
    assert rows(tmp_path, "uncertainty").tolist() == [0.6, 0.7]
    assert manifest.field("value").description == "value (kcal/mol)"
    with pytest.raises(DataError, match="one that every import of molecules has"):
        run(tmp_path, text, name="freesolv.txt", fields=(FieldSpec(name="maccs"),), **options)


def test_which_tables_are_molecules(tmp_path):
    assert run(tmp_path, TABLE, unit=None)[1].notes[0].startswith("the unit of 'target'")
    table = run(tmp_path, "smiles,gap\nCCO,1\nCC,2\n", unit=None, replace=True)[0]
    assert table.plan.task == "table", "without a column of values it may be anything"
    found = run(tmp_path, "smiles\ttarget\nC\t1\nCC\t2\n", name="in.tsv", replace=True)[0]
    assert found.plan.task == "molecule"
    with pytest.raises(DataError, match=r"expected a column 'SMILES', found columns: smiles"):
        run(tmp_path, TABLE, smiles="SMILES", replace=True)
    with pytest.raises(DataError, match="--smiles is for molecule imports"):
        run(tmp_path, TABLE, smiles="SMILES", kind="table", replace=True)


def test_other_smiles_are_of_the_same_molecule():
    found = {other_smiles("CC(=O)Oc1ccccc1C(=O)O", seed) for seed in range(20)}
    assert len(found) > 10
    canonical = {features_of(parse_smiles(text))["characters"].tobytes() for text in found}
    assert canonical == {b"CC(=O)Oc1ccccc1C(=O)O"}
    assert other_smiles("CCO", 3) == other_smiles("CCO", 3)


def test_molecules_to_predict(tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("name,smiles\nethanol,CCO\n,\nwater,O\n")
    with pytest.raises(DataError, match=r"new\.csv:3: '': expected a SMILES, found nothing"):
        read_molecules(path)
    path.write_text("name,smiles\nethanol,CCO\nwater,O\n")
    labels, fields = read_molecules(path)
    assert labels == ["CCO", "O"]
    assert fields["atomic_number"].lengths.tolist() == [3, 1]
    assert fields["maccs"].shape == (2, 167)
    path.write_text("name\nethanol\n")
    with pytest.raises(DataError, match="expected a column 'smiles', found columns: name"):
        read_molecules(path)


def test_without_rdkit_the_error_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("rdkit"):
            raise ModuleNotFoundError("No module named 'rdkit'", name="rdkit")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    for name in [name for name in sys.modules if name.startswith("rdkit")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        DataError, match=r"molecules need rdkit .*pip install 'dmi-hpc\[molecules\]'"
    ):
        run(tmp_path, TABLE)


def test_freesolv(tmp_path):
    default = Path(__file__).parents[2].parent / "shared" / "data"
    path = Path(os.environ.get("DMI_TEST_DATA", default)) / "chemixnet_mpnn" / "freesolv.txt.xz"
    if not path.is_file():
        pytest.skip(f"real data not at hand: {path}")
    options = ImportOptions(
        **{"format": "csv", "delimiter": ";", "processes": 1, "unit": "kcal/mol"},
        smiles="SMILES",
        value="experimental value (kcal/mol)",
    )
    manifest, report = import_files([path], tmp_path / "set", options)
    assert (manifest.rows, report.bad) == (643, [])
    bonds = np.diff(rows(tmp_path, "edge_index").offsets)
    assert (bonds == 0).sum() > 1, "methane, ammonia, ..."
