"""What used to vanish, to be invented or to end in a traceback."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dmi_hpc.cli.options import stops_tidily
from dmi_hpc.data.importing.options import AxisSpec, FieldSpec, ImportOptions
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.errors import DataError, RunError
from dmi_hpc.files import exclusive

PLAIN = {"validation": 0, "test": 0, "processes": 1}


def run(source, **options):
    return import_files([source], source.parent / "set", ImportOptions(**{**PLAIN, **options}))


def table(tmp_path, text, **options):
    (tmp_path / "t.csv").write_text(text)
    return run(tmp_path / "t.csv", **options)


def rows(tmp_path, name):
    with ShardSet.open(tmp_path / "set") as shards:
        return shards.gather(name, shards.rows("all")).tolist()


def image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((3, 4), 7, np.uint8)).save(path)


@pytest.mark.parametrize(("axis", "values", "message"), [
    ("lengths", [2, 1], "has 4 entries, the rows of its axis those from 0 to 3: expected all"),
    ("offsets", [1, 2, 4], "those from 1 to 4: expected all of them, from 0 to 4"),
    ("offsets", [0, 2, 3], "those from 0 to 3"),
    ("lengths", [2.0, 2.0], "axis atom: expected integers along one axis in '/n', found float64"),
])  # fmt: skip
def test_axes_take_every_entry(tmp_path, axis, values, message):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["n"], file["z"] = values, np.arange(4)
    fields = (FieldSpec(name="z", axis="atom"),)
    with pytest.raises(DataError, match=message):
        run(path, fields=fields, axes=(AxisSpec(name="atom", **{axis: "n"}),))


def test_a_row_of_labels_belongs_to_one_file(tmp_path):
    for folder in ("train", "test"):
        image(tmp_path / "in" / folder / "a.png")
    labels = tmp_path / "labels.csv"
    labels.write_text("name,y\na,1\n")
    with pytest.raises(DataError, match=r"the row 'a' names several .*test/a\.png.*train/a\.png"):
        run(tmp_path / "in", labels=labels)
    labels.write_text("name,y\ntrain/a,1\ntest/a.png,2\n")
    run(tmp_path / "in", labels=labels)
    assert dict(zip(rows(tmp_path, "name"), rows(tmp_path, "y"), strict=True)) == {
        b"train/a.png": 1,
        b"test/a.png": 2,
    }


def test_no_quantity_or_unit_is_invented(tmp_path):
    manifest, report = table(tmp_path, "formula,gap\nFe,1\n", value="gap")
    assert (manifest.field("value").unit, manifest.field("value").description) == ("", "gap")
    assert any("unit of 'gap' is not known" in note and "--unit" in note for note in report.notes)
    with pytest.raises(DataError, match=r"found columns: formula, gap.*--value, or .*--as table"):
        table(tmp_path, "formula,gap\nFe,1\n")


def test_folders_are_read_through_links_and_nothing_is_dropped_silently(tmp_path):
    inside, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    (inside / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    for folder, name in ((inside, "a"), (inside / "sub", "b"), (elsewhere, "c")):
        (folder / f"{name}.csv").write_text("x\n1\n")
    (inside / "linked").symlink_to(elsewhere)
    (inside / "sub" / "circle").symlink_to(inside)
    (inside / "d.dat").write_text("x\n1\n")
    (inside / ".hidden.dat").write_text("")
    (inside / "gone.csv").symlink_to(tmp_path / "nowhere")
    manifest, report = run(inside)
    names = [entry["name"] for entry in manifest.plan.provenance["files"]]
    assert names == ["a.csv", "linked/c.csv", "sub/b.csv"]
    (note,) = report.notes
    assert note.startswith("left out: 3 files")
    assert all(name in note for name in ("d.dat", "gone.csv", "sub/circle"))


def test_the_table_of_labels_is_not_left_out(tmp_path):
    image(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "labels.csv").write_text("name,y\na,1\n")
    assert "labels.csv" in run(tmp_path / "in")[1].notes[0]
    assert run(tmp_path / "in", labels=tmp_path / "in/labels.csv", replace=True)[1].notes == []


def test_a_damaged_xyz_frame_costs_itself(tmp_path):
    def frame(count, atoms):
        return f"{count}\nenergy=1.5\n" + "".join(f"H {x} 0 0\n" for x in range(atoms))

    text = [frame(2, 2), frame(3, 1), frame(2, 2), frame(1, 2), frame(1, 1), frame(4, 2)]
    path = tmp_path / "md.xyz"
    path.write_text("\n".join(text))
    _, report = run(path, bad="skip", group="row number")
    assert rows(tmp_path, "name") == [b"md:0", b"md:2", b"md:3", b"md:5"]
    assert [str(bad).partition("md.xyz:")[2] for bad in report.bad] == [
        "6 (frame 1): the frame ends after 1 of 3 atoms",
        "18 (frame 4): expected the number of atoms, found 'H 1 0 0'",
        "24 (frame 6): the file ends after 2 of 4 atoms",
    ]


def test_identifiers_keep_their_digits(tmp_path):
    manifest, _ = table(tmp_path, "id,n,t\n0071,1,00.5\n1234,2,07\n4321,3,1\n")
    assert [f.dtype for f in manifest.fields[:3]] == ["S4", "int64", "float64"]
    assert rows(tmp_path, "id") == [b"0071", b"1234", b"4321"]
    with pytest.raises(DataError, match="integer 9007199254740993 loses digits as a float"):
        text = "x\n1.5\n9007199254740993\n9007199254740992\n100000000000000000000\n"
        table(tmp_path, text, replace=True)
    for text in ("0071", "1234"):  # said to be a number
        fields = (FieldSpec(name="x", dtype="int64"),)
        table(tmp_path, f"x\n{text}\n", fields=fields, replace=True)
        assert rows(tmp_path, "x") == [int(text)]
    assert table(tmp_path, f"x\n{'9' * 5000}\n", replace=True)[0].field("x").dtype == "S5000"
    with pytest.raises(DataError, match="expected finite"):
        table(tmp_path, f"x\n{'9' * 5000}\n", fields=(FieldSpec(name="x", dtype="int64"),))


def test_a_set_has_rows_for_training(tmp_path):
    shares = {"validation": 0.4, "test": 0.5, "seed": 1}
    text = "g,v\n" + "a,1\n" * 50
    for seed in range(9):
        try:
            table(tmp_path, text, group="g", replace=True, **{**shares, "seed": seed})
        except DataError as error:
            assert "no row is for training: validation and test have all 50" in str(error)
            assert '--group "row number"' in str(error)
            break
    else:
        pytest.fail("one of the seeds leaves nothing for training")
    manifest, report = table(tmp_path, text, group="row number", replace=True, **shares)
    assert manifest.split_rows["train"]
    assert report.notes == []
    with pytest.raises(DataError, match=r"no row is for training.*given by 'split'"):
        table(tmp_path, "v,split\n1,test\n", replace=True)


def test_rows_of_no_group_are_bad(tmp_path):
    _, report = table(tmp_path, "g,v\na,1\n ,2\nb,3\n", group="g", bad="skip")
    assert [bad.reason for bad in report.bad] == ["split: no value of 'g', which decides it"]
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"g": ["a", None], "v": [1, 2]}), path)
    fields = (FieldSpec(name="v"),)
    assert run(path, group="g", bad="skip", fields=fields, replace=True)[1].skipped == 1


def test_folders_of_masks_are_no_classes(tmp_path):
    for folder in ("images", "masks"):
        image(tmp_path / "in" / folder / "a.png")
    with pytest.raises(DataError, match=r"masks: looks like masks.*--masks masks"):
        run(tmp_path / "in")
    run(tmp_path / "in", masks="masks")
    image(tmp_path / "in" / "masks" / "of a class.png")
    assert run(tmp_path / "in", replace=True)[0].field("label").dtype == "uint16"


def test_unreadable_images_say_why(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"no image can be read.*a\.png: not a readable image: "):
        run(tmp_path / "a.png")


def test_parquet_nulls_and_repeated_columns(tmp_path):
    path, lists = tmp_path / "t.parquet", pyarrow.list_(pyarrow.int64(), 2)
    columns = {
        "b": pyarrow.array([True, None, False, True]),
        "l": pyarrow.array([[2**60 + 1, 1], [1, 1], None, [None, 1]], lists),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    _, report = run(path, bad="skip")
    assert rows(tmp_path, "l") == [[2**60 + 1, 1]]
    assert [bad.reason for bad in report.bad] == [
        "b: no value",
        "l: no value",
        "l: no value in it",
    ]
    twice = pyarrow.Table.from_arrays([pyarrow.array([1])] * 2, ["a", "a"])
    pyarrow.parquet.write_table(twice, path)
    with pytest.raises(DataError, match="column 'a' stands there more than once"):
        run(path, fields=(FieldSpec(name="a"),), replace=True)


def test_arrays_that_no_field_holds(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((5, 0)))
    with pytest.raises(DataError, match=r"\(5, 0\): its entries hold no values"):
        run(path)
    if np.dtype(np.longdouble).itemsize > 8:
        np.save(path, np.ones(5, np.longdouble))
        with pytest.raises(DataError, match=r"widest that is stored is float64.*--field a=float64"):
            run(path)
        assert run(path, fields=(FieldSpec(name="a", dtype="float64"),))[0].rows == 5


def test_file_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"\xff.png")
    try:
        image(tmp_path / "in" / "a.png")
        (tmp_path / "in" / "a.png").rename(tmp_path / "in" / name)
    except OSError:
        pytest.skip("this file system takes no such names")
    with pytest.raises(DataError, match=r"udcff\.png': the name is not UTF-8"):
        run(tmp_path / "in")


def test_shuffled_imports_do_not_share_their_scratch(tmp_path, monkeypatch):
    source = tmp_path / "t.csv"
    source.write_text("x\n1\n2\n3\n")
    options = ImportOptions(**PLAIN, shuffle=1)
    with exclusive(tmp_path / ".tmp-set-import", "import"):
        mine = tmp_path / ".tmp-set-import" / "rows"
        mine.mkdir()
        with pytest.raises(RunError, match="another import is running here"):
            import_files([source], tmp_path / "set", options)
        assert mine.is_dir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert import_files([source], Path(), options)[0].rows == 3
    assert not list(tmp_path.glob(".tmp-here*"))


def test_progress_counts_the_checksums(tmp_path):
    source, seen = tmp_path / "t.csv", []
    source.write_text("x\n1\n2\n3\n")
    import_files([source], tmp_path / "set", ImportOptions(**PLAIN), lambda *e: seen.append(e))
    size = source.stat().st_size
    assert ("checksums", size, size, "bytes") in seen


def test_a_signal_ends_an_import_tidily(tmp_path):
    source, target = tmp_path / "t.csv", tmp_path / "set"
    source.write_text("x\n" + "1.5\n" * 2_000_000)
    options = ["--shuffle", "1", "--processes", "1", "--field", "x=float64"]
    command = [sys.executable, "-m", "dmi_hpc", "data", "import", source, "--out", target, *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        hidden = tmp_path / ".tmp-set-import" / "rows"
        for _ in range(3000):
            if hidden.exists() or process.poll() is not None:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert f"stopped by SIGTERM: {target} is as it was before" in " ".join(said.split())
    assert [path.name for path in tmp_path.iterdir()] == ["t.csv"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_end_a_block_and_their_handlers_come_back(number, capsys):
    before, tidied = signal.getsignal(number), []
    with pytest.raises(SystemExit, match="75"), stops_tidily("do it again"):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGTERM)  # while tidying: once is enough
            tidied.append(number)
    assert tidied
    assert signal.getsignal(number) == before
    assert f"stopped by {number.name}: do it again" in capsys.readouterr().err
