import os
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from dmi_hpc.data.importing import arrays
from dmi_hpc.data.importing.options import AxisSpec, FieldSpec, ImportOptions
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.errors import DataError


def run(tmp_path, *names, **options):
    """Without splits: rows stay in the order of the files."""
    options = {"validation": 0, "test": 0, **options}
    return import_files(
        [tmp_path / name for name in names], tmp_path / "set", ImportOptions(**options)
    )


def rows(tmp_path, name):
    with ShardSet.open(tmp_path / "set") as shards:
        return shards.gather(name, shards.rows("all"))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_npy_files_are_fields_of_one_table(tmp_path, rng):
    x, y = rng.normal(size=(50, 3, 4)).astype(">f4"), rng.integers(0, 9, 50).astype(np.int16)
    np.save(tmp_path / "x.npy", np.asfortranarray(x))
    np.save(tmp_path / "y.npy", y)
    manifest, report = run(tmp_path, "x.npy", "y.npy")
    assert [(f.name, f.dtype, f.shape) for f in manifest.fields[:2]] == [
        ("x", "float32", (3, 4)),
        ("y", "int16", ()),
    ]
    assert np.array_equal(rows(tmp_path, "x"), x)
    assert np.array_equal(rows(tmp_path, "y"), y)
    assert (report.read, report.kept) == (50, 50)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_rows_follow_each_other_and_stream(tmp_path, rng, monkeypatch, save):
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 256)
    x = rng.normal(size=(70, 5))
    texts = np.array([f"α{i}" for i in range(70)])
    flags = rng.random(70) < 0.5
    save(tmp_path / "a.npz", x=x[:40], s=texts[:40], ok=flags[:40])
    save(tmp_path / "b.npz", x=x[40:], s=texts[40:], ok=flags[40:])
    manifest, _ = run(tmp_path, "a.npz", "b.npz")
    assert manifest.field("s").dtype == "S4"
    assert manifest.field("ok").dtype == "uint8"
    assert np.array_equal(rows(tmp_path, "x"), x)
    assert [t.decode() for t in rows(tmp_path, "s")] == texts.tolist()
    assert np.array_equal(rows(tmp_path, "ok"), flags)


def test_values_that_cannot_be_stored_are_bad_rows(tmp_path):
    x = np.ones((6, 2))
    x[2, 1], x[4, 0] = np.nan, 300
    np.savez(tmp_path / "a.npz", x=x)
    _, report = run(tmp_path, "a.npz", bad="skip", fields=(FieldSpec(name="x", dtype="uint8"),))
    path = tmp_path / "a.npz"
    assert list(map(str, report.bad)) == [
        f"{path}, row 2: x: expected finite values, found nan",
        f"{path}, row 4: x: values from 1.0 to 300.0 cannot be stored as uint8",
    ]
    assert len(rows(tmp_path, "x")) == 4


def test_which_arrays_belong_together_must_be_said(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((4, 2)), y=np.ones(5))
    with pytest.raises(DataError, match=r"which arrays(.|\n)*--field(.|\n)*x: float64 \(4, 2\)"):
        run(tmp_path, "a.npz")
    with pytest.raises(DataError, match=r"different numbers of rows \(x 4, y 5\)"):
        run(tmp_path, "a.npz", fields=(FieldSpec(name="x"), FieldSpec(name="y")))
    manifest, _ = run(tmp_path, "a.npz", fields=(FieldSpec(name="z", source="y"),))
    assert manifest.rows == 5


def hdf5(tmp_path, name="f.h5", seed=0):
    """Graphs of 0 to 4 atoms."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 5, 30)
    total = int(lengths.sum())
    content = {
        "n": lengths.astype(np.uint16),
        "z": rng.integers(1, 90, total).astype(np.uint8),
        "starts": np.concatenate([[0], np.cumsum(lengths)]),
        "energy": rng.normal(size=30),
        "id": [f"mp-{i % 3}" for i in range(30)],
    }
    with h5py.File(tmp_path / name, "w") as file:
        for key, value in content.items():
            file[f"deep/{key}"] = value
    return content


@pytest.mark.parametrize("axis", [{"lengths": "n"}, {"offsets": "/deep/starts"}])
def test_hdf5_with_a_map(tmp_path, monkeypatch, axis):
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", 64)
    one, two = hdf5(tmp_path, "a.h5"), hdf5(tmp_path, "b.h5", seed=1)
    fields = (
        FieldSpec(name="atomic_number", source="z", axis="atom", unit="1"),
        FieldSpec(name="e", source="/deep/energy", dtype="float32", unit="eV"),
        FieldSpec(name="id"),
    )
    axes = (AxisSpec(name="atom", **axis),)
    manifest, _ = run(tmp_path, "a.h5", "b.h5", fields=fields, axes=axes)
    assert manifest.rows == 60
    assert manifest.field("e").unit == "eV"
    assert manifest.field("id").dtype == "S4"
    numbers = rows(tmp_path, "atomic_number")
    assert numbers.lengths.tolist() == [*one["n"], *two["n"]]
    assert numbers.values.tolist() == [*one["z"], *two["z"]]
    assert np.array_equal(rows(tmp_path, "e"), np.float32([*one["energy"], *two["energy"]]))


def test_hdf5_groups_and_damaged_axes(tmp_path):
    hdf5(tmp_path)
    fields = (FieldSpec(name="energy"),)
    manifest, _ = run(tmp_path, "f.h5", fields=fields, group="id", validation=0.4, test=0.3)
    assert max(manifest.split_rows.values()) < 30 or manifest.split_rows["train"] == 30
    assert manifest.plan.split_rule.key == "text of 'id'"
    ragged = (FieldSpec(name="z", axis="atom"),)
    with pytest.raises(DataError, match=r"axis 'atom' is not described: add \[axes.atom\]"):
        run(tmp_path, "f.h5", fields=ragged)
    with pytest.raises(DataError, match=r"no array 'm'(.|\n)*/deep/n: uint16 \(30,\)"):
        run(tmp_path, "f.h5", fields=ragged, axes=(AxisSpec(name="atom", lengths="m"),))
    with h5py.File(tmp_path / "f.h5", "a") as file:
        file["deep/n"][0] += 5
    with pytest.raises(
        DataError, match=r"/deep/z: has \d+ entries, the rows of its axis those from 0"
    ):
        run(tmp_path, "f.h5", fields=ragged, axes=(AxisSpec(name="atom", lengths="n"),))


@pytest.mark.parametrize(("name", "raw", "message"), [
    ("bad.npy", b"\x93NUMPY\x01\x00", "not a readable .npy"),
    ("bad.npz", b"PK nonsense", "not a readable .npz"),
    ("bad.h5", b"nonsense", "not readable as HDF5"),
])  # fmt: skip
def test_files_that_are_no_arrays(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        run(tmp_path, name)


def test_objects_fortran_archives_and_torn_archives_are_refused(tmp_path):
    np.save(tmp_path / "o.npy", np.array([{}, {}]), allow_pickle=True)
    with pytest.raises(DataError, match=r"not a readable \.npy"):
        run(tmp_path, "o.npy")
    np.save(tmp_path / "c.npy", np.ones(3, dtype=complex))
    with pytest.raises(DataError, match=r"c \(complex128, \(3,\)\) cannot be imported"):
        run(tmp_path, "c.npy")
    np.savez(tmp_path / "f.npz", x=np.asfortranarray(np.ones((4, 3))))
    with pytest.raises(DataError, match="Fortran order"):
        run(tmp_path, "f.npz")
    np.savez(tmp_path / "t.npz", x=np.arange(1000.0))
    with zipfile.ZipFile(tmp_path / "t.npz") as archive:
        at = archive.infolist()[0].header_offset + 4000
    raw = bytearray((tmp_path / "t.npz").read_bytes())
    raw[at] ^= 1
    (tmp_path / "t.npz").write_bytes(raw)
    with pytest.raises(DataError, match="'x' is damaged: Bad CRC"):
        run(tmp_path, "t.npz")


def test_localization_strains(tmp_path):
    default = Path(__file__).parents[2].parent / "shared" / "data"
    path = Path(os.environ.get("DMI_TEST_DATA", default)) / "localization" / "fe_mve_c10_c50.npz"
    if not path.exists():
        pytest.skip(f"real data not at hand: {path}")
    fields = (
        FieldSpec(name="phase", source="c50_phase"),
        FieldSpec(name="strain", source="c50_strain"),
    )
    import_files([path], tmp_path / "set", ImportOptions(fields=fields, validation=0, test=0))
    with np.load(path) as archive:
        assert np.array_equal(rows(tmp_path, "strain"), archive["c50_strain"])
        assert np.array_equal(rows(tmp_path, "phase"), archive["c50_phase"])
