import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from dmi_hpc.cli.data_import import import_
from dmi_hpc.config import parse
from dmi_hpc.data.importing import run as run_module
from dmi_hpc.data.importing.optional import library
from dmi_hpc.data.importing.options import ImportOptions, field_of_text, read_map
from dmi_hpc.data.importing.parallel import ordered_map
from dmi_hpc.data.importing.run import REPORT, import_files
from dmi_hpc.data.manifest import Compression
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.errors import DataError, RecipeError


def table(path, rows=200, header="x,name"):
    path.write_text(header + "\n" + "".join(f"{i}.5,n{i}\n" for i in range(rows)))
    return path


def values(folder, name="x"):
    with ShardSet.open(folder) as shards:
        return shards.gather(name, shards.rows("all")).tolist()


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".h5"}


def test_processes_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("dmi_hpc.data.importing.csvs._CHUNK_BYTES", 2000)
    path = tmp_path / "t.csv"
    formulas = [f"Ti{1 + i % 7}O{1 + i % 5},{i}\n" if i % 9 else f"Xx,{i}\n" for i in range(2000)]
    path.write_text("formula,target\n" + "".join(formulas))
    reports = {}
    for processes in (1, 2):
        options = ImportOptions(processes=processes, bad="skip", rows_per_shard=500)
        _, reports[processes] = import_files([path], tmp_path / str(processes), options)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "1")) == 4
    assert reports[1] == reports[2]
    assert (tmp_path / "1" / REPORT).read_bytes() == (tmp_path / "2" / REPORT).read_bytes()


def square(n):
    if n == 13:
        raise DataError("thirteen")
    return n * n


def die(n):
    os._exit(9)


def test_ordered_map():
    taken = []

    def numbers():
        for n in range(100):
            taken.append(n)
            yield n

    results = ordered_map(square, numbers(), 2)
    assert next(results) == 0
    assert len(taken) <= 5  # no further ahead than the queue
    assert [next(results) for _ in range(12)] == [n * n for n in range(1, 13)]
    with pytest.raises(DataError, match="thirteen"):
        next(results)
    with pytest.raises(DataError, match="a worker process died"):
        list(ordered_map(die, iter(range(3)), 2))


def test_auto_goes_on_in_processes_after_a_while(monkeypatch):
    monkeypatch.setattr("dmi_hpc.data.importing.parallel._INLINE_S", 0.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    pids = list(ordered_map(pid_of, iter(range(20)), "auto"))
    assert pids[0] == os.getpid()
    assert os.getpid() not in pids[1:]


def pid_of(_):
    return os.getpid()


def test_kind_is_told_by_names_and_columns(tmp_path):
    options = ImportOptions()
    plain = table(tmp_path / "plain.csv")
    assert import_files([plain], tmp_path / "a", options)[0].plan.task == "table"
    (tmp_path / "comp.csv").write_text("formula,target,x\nFe,1,2\nFeO,2,2\n")
    assert (
        import_files([tmp_path / "comp.csv"], tmp_path / "b", options)[0].plan.task == "composition"
    )
    asked = ImportOptions(kind="table")
    assert import_files([tmp_path / "comp.csv"], tmp_path / "c", asked)[0].plan.task == "table"
    renamed = plain.rename(tmp_path / "data.txt")
    with pytest.raises(
        DataError, match=r"data\.txt: unknown format\. Say which with --format: csv"
    ):
        import_files([renamed], tmp_path / "d", options)
    import_files([renamed], tmp_path / "d", ImportOptions(format="csv"))


def test_folders_of_nothing_or_of_several_things(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    options = ImportOptions()
    with pytest.raises(DataError, match="no files of a known format"):
        import_files([folder], tmp_path / "a", options)
    np.save(folder / "x.npy", np.arange(4))
    (folder / "POSCAR").write_text("nonsense")
    (folder / ".hidden.cif").write_text("nonsense")
    with pytest.raises(
        DataError, match=r"several kinds \(1 of kind structure, 1 of kind array\).*--as"
    ):
        import_files([folder], tmp_path / "a", options)
    assert import_files([folder], tmp_path / "a", ImportOptions(kind="array"))[0].rows == 4
    with pytest.raises(DataError, match=r"no files of kind image; found"):
        import_files([folder], tmp_path / "a", ImportOptions(kind="image"))
    with pytest.raises(DataError, match=r"gone\.csv: not a readable.*No such file"):
        import_files([tmp_path / "gone.csv"], tmp_path / "a", options)


def test_options_of_other_kinds_are_refused(tmp_path):
    path = table(tmp_path / "t.csv")
    with pytest.raises(
        DataError, match="--cutoff is for structure imports; this is one of kind table"
    ):
        import_files([path], tmp_path / "a", ImportOptions(cutoff=8.0))
    with pytest.raises(DataError, match="--formula is for composition imports"):
        import_files([path], tmp_path / "a", ImportOptions(kind="table", formula="x"))


@pytest.mark.parametrize(("raw", "message"), [
    ({"validation": 0.6, "test": 0.5}, "validation \\+ test is 1.1"),
    ({"group": "a", "split_column": "b"}, "cannot both decide"),
    ({"max_neighbours": 12}, "needs a cutoff"),
    ({"replace": True, "shuffle": 1}, "exclude each other"),
    ({"processes": 0}, "at least 1"),
    ({"bad": "ignore"}, "'error' or 'skip'"),
    ({"kind": "video"}, "composition"),
])  # fmt: skip
def test_options_that_contradict_themselves(raw, message):
    with pytest.raises(RecipeError, match=message):
        parse(ImportOptions, raw, where="dmi data import")


def test_another_set_is_not_replaced_unless_said(tmp_path):
    one, two = table(tmp_path / "one.csv"), table(tmp_path / "two.csv", rows=300)
    target = tmp_path / "set"
    first = import_files([one], target, ImportOptions())[0]
    again = import_files([one], target, ImportOptions())[0]  # needs no --replace
    assert again.identity == first.identity
    with pytest.raises(
        DataError, match=r"holds another data set \(200 rows; it differs in provenance"
    ):
        import_files([two], target, ImportOptions())
    assert len(values(target)) == 200
    import_files([two], target, ImportOptions(replace=True))
    assert len(values(target)) == 300


@pytest.mark.parametrize(
    ("source", "out"), [("raw/t.csv", "raw"), ("raw", "raw"), ("raw", "raw/set"), ("raw", ".")]
)
def test_a_set_is_not_written_among_its_sources(tmp_path, source, out):
    (tmp_path / "raw").mkdir()
    table(tmp_path / "raw" / "t.csv")
    with pytest.raises(DataError, match=r"sources are read from .*raw\. Write the set to a folder"):
        import_files([tmp_path / source], tmp_path / out, ImportOptions())
    assert [path.name for path in tmp_path.rglob("*")] == ["raw", "t.csv"]
    import_files([tmp_path / "raw" / "t.csv"], tmp_path / "raw" / "set", ImportOptions())


def test_an_error_leaves_the_old_set(tmp_path, monkeypatch):
    target = tmp_path / "set"
    import_files([table(tmp_path / "one.csv")], target, ImportOptions())
    before = contents(target)
    two = table(tmp_path / "two.csv", rows=3000)
    monkeypatch.setattr("dmi_hpc.data.importing.csvs._CHUNK_BYTES", 2000)

    def full(path, plan, rows):
        if path.name.endswith("2.h5"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return make_part(path, plan, rows)

    from dmi_hpc.data.writer import make_part

    monkeypatch.setattr("dmi_hpc.data.writer.make_part", full)
    with pytest.raises(DataError, match="no space left"):
        import_files([two], target, ImportOptions(replace=True, rows_per_shard=500))
    assert contents(target) == before
    late = tmp_path / "late.csv"
    late.write_text(two.read_text() + "x,y\n")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"late\.csv:3002: x: expected a number, found 'x'"):
        import_files([late], target, ImportOptions(replace=True, rows_per_shard=500))
    assert contents(target) == before


def test_shuffled_and_compressed(tmp_path):
    pytest.importorskip("zstandard")
    path, target = table(tmp_path / "t.csv", rows=400), tmp_path / "set"
    how = {"validation": 0, "test": 0, "rows_per_shard": 100}
    seen = []
    options = ImportOptions(shuffle=7, compression=Compression(codec="zstd"), **how)
    manifest, report = import_files([path], target, options, lambda *news: seen.append(news))
    assert manifest.plan.shuffled
    assert manifest.plan.compression == Compression(codec="zstd")
    assert (report.kept, len(manifest.shards)) == (400, 4)
    assert sorted(values(target)) == [i + 0.5 for i in range(400)]
    assert values(target) != sorted(values(target))
    assert seen[-1] == ("shuffle", 400, 400, "rows")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    with pytest.raises(DataError):
        import_files([table(tmp_path / "u.csv")], target, options)
    assert len(values(target)) == 400


def test_shards_are_cut_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "SHARD_BYTES", 2000)
    manifest, _ = import_files([table(tmp_path / "t.csv")], tmp_path / "set", ImportOptions())
    assert manifest.plan.rows_per_shard == 2000 // 12  # float64 and S4
    assert [shard.rows for shard in manifest.shards] == [166, 34]


def test_provenance_names_files_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr("dmi_hpc.data.importing.files._NAMED", 10)
    path = table(tmp_path / "t.csv")
    manifest, _ = import_files([path], tmp_path / "a", ImportOptions(processes=2))
    (entry,) = manifest.plan.provenance["files"]
    assert entry["name"] == "t.csv"
    assert len(entry["xxh3"]) == 16
    assert "processes" not in manifest.plan.provenance["options"]
    folder = tmp_path / "many"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:03d}.csv").write_text("x\n1\n")
    manifest, _ = import_files([folder], tmp_path / "b", ImportOptions())
    (entry,) = manifest.plan.provenance["files"]
    assert (entry["name"], entry["files"]) == ("many", 12)
    (folder / "000.csv").write_text("x\n2\n")
    other, _ = import_files([folder], tmp_path / "c", ImportOptions())
    assert other.plan.provenance["files"][0]["xxh3"] != entry["xxh3"]


def test_fields_of_the_command_line():
    spec = field_of_text("energy=float32:eV/atom:at 0 K: relaxed")
    assert (spec.name, spec.dtype, spec.unit) == ("energy", "float32", "eV/atom")
    assert spec.description == "at 0 K: relaxed"
    assert field_of_text("energy").dtype is None
    assert field_of_text("energy=:eV").unit == "eV"
    for text in ("", "9x", "x=complex64", "a b=int8"):
        with pytest.raises(DataError, match="expected NAME"):
            field_of_text(text)


def test_maps(tmp_path):
    path = tmp_path / "map.toml"
    path.write_text(
        '[axes.atom]\nlengths = "n"\n[fields.z]\nsource = "/Z"\naxis = "atom"\nunit = "1"\n'
    )
    fields, axes = read_map(path)
    assert (fields[0].origin, fields[0].axis, axes[0].lengths) == ("/Z", "atom", "n")
    for text, message in [
        ("x = 1", "expected tables"),
        ("[fields]\nz = 3", "fields.z: expected a table"),
        ("[fields.z]\nkind = 1", "fields.z: kind: Extra inputs"),
        ('[axes.a]\nlengths = "n"\noffsets = "m"', "axes.a: .*either lengths or offsets"),
        ("[fields", "not a readable map"),
    ]:
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_map(path)


def test_a_missing_library_says_what_to_install():
    with pytest.raises(
        DataError, match=r"these files need nonesuch .*pip install 'dmi-hpc\[import\]'"
    ):
        library("nonesuch.part", "these files")


def cli(*arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(import_)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_says_what_became_of_the_records(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("formula,target\n" + "".join(f"Fe{i + 1}O,{i}\nXx,1\n" for i in range(30)))
    result = cli(path, "--out", tmp_path / "set", "--bad", "skip", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "composition, 30 of 60 records kept" in result.output
    assert f"skipped {path}:3: 'Xx': element Xx" in result.output
    assert "... and 10 more bad records" in result.output
    result = cli(path, "--out", tmp_path / "other")
    assert isinstance(result.exception, DataError)
    for option, word, known in [
        ("--bad", "maybe", "error, skip"),
        ("--as", "films", "composition, table, .*auto"),
        ("--compress", "zip", "none, zstd, blosc2"),
        ("--processes", "²", "auto, or how many"),
    ]:
        result = cli(path, "--out", tmp_path / "other", option, word)
        assert isinstance(result.exception, DataError)
        assert re.search(f"{option}: found '{word}', expected {known}", str(result.exception))
    field = "value=float32:eV:of the sum"
    mapping = tmp_path / "map.toml"
    mapping.write_text('[fields.value]\nsource = "target"\n')
    result = cli(path, "--out", tmp_path / "x", "--as", "table", "--map", mapping, "--field", field)
    assert "described more than once: value" in str(result.exception)
    result = cli(
        path, "--out", tmp_path / "x", "--as", "table", "--map", mapping, "--processes", "1"
    )
    assert "table, 60 of 60 records kept" in result.output


SLOW = """
import sys
import time
from pathlib import Path
from dmi_hpc.data.importing import csvs
from dmi_hpc.data.importing.options import ImportOptions
from dmi_hpc.data.importing.run import import_files
csvs._CHUNK_BYTES = 4000
options = ImportOptions(processes=2, rows_per_shard=1000, replace=True)
if __name__ == "__main__":
    def tell(phase, done, total, unit):
        if phase == "import" and done > total / 3:
            print("far", flush=True)
    import_files([Path(sys.argv[1])], Path(sys.argv[2]), options, tell)
"""


def test_killed_imports_leave_the_old_set_and_no_process(tmp_path):
    target = tmp_path / "set"
    import_files([table(tmp_path / "one.csv")], target, ImportOptions())
    before = values(target)
    large = table(tmp_path / "large.csv", rows=60_000)
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    with subprocess.Popen(
        [sys.executable, script, large, target], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "far\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert values(target) == before
    for _ in range(1000):
        alive = [c for c in children if Path(f"/proc/{c}").exists() and state(c) != "Z"]
        if not alive:
            break
        time.sleep(0.05)
    assert not alive
    import_files([large], target, ImportOptions(replace=True))
    assert len(values(target)) == 60_000
    assert json.loads((target / REPORT).read_text())["kept"] == 60_000


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except FileNotFoundError:
        return "Z"
