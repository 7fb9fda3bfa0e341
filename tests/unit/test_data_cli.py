"""`dmi data`: what a user types, sees, and finds on disk."""

import json
import os
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from runner import command, environment, toy_recipe, wait_for
from toy_set import toy_set

from dmi_hpc import cli
from dmi_hpc.cli.data_show import bars, columns, head_lines, info_lines, value_text
from dmi_hpc.cli.data_tools import compression_of, part_of
from dmi_hpc.data import build as build_module
from dmi_hpc.data import repair as repair_module
from dmi_hpc.data.manifest import Compression, Field, read_manifest
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.data.stage_home import Lock, home_of
from dmi_hpc.data.statistics import Histogram, Statistics
from dmi_hpc.data.storage import stored_bytes
from dmi_hpc.errors import DataError


@pytest.fixture(scope="module", params=[None, "zstd"], ids=["plain", "zstd"])
def original(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "set"
    toy_set(folder, codec=request.param)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "set"))


plain_only = pytest.mark.parametrize("original", [None], ids=["plain"], indirect=True)


@pytest.fixture
def dmi(monkeypatch, capsys):
    """Run `dmi data ...` here: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["dmi", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return ended.value.code or 0, said.out, said.err

    return run


# info and head


def test_info_shows_everything_within_80_columns(folder, dmi):
    code, out, _ = dmi("info", folder)
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines[1:])) <= 80, "a path may be longer"
    manifest = read_manifest(folder)
    for field in manifest.fields:
        if field.name != "split":
            line = next(line for line in lines if line.startswith(f"{field.name} "))
            assert field.description in line
    for word in ("300 rows", "5 shards of 20 to 70 rows", manifest.identity, "row number, seed 1"):
        assert word in out
    assert "GPa" in out
    assert "eV/atom" in out
    assert "uint8 per node" in out
    assert "(number of the row's node)" in " ".join(out.split())
    assert "origin: test" in out
    assert "█" in out
    assert ("times smaller" in out) == (manifest.plan.compression is not None)


def test_info_for_programs(folder, dmi):
    code, out, _ = dmi("info", folder, "--json")
    found, manifest = json.loads(out), read_manifest(folder)
    assert code == 0
    assert found["identity"] == manifest.identity
    assert found["rows"] == 300
    assert found["field_bytes"] == stored_bytes(folder, manifest)
    assert found["statistics"]["y"]["histogram"]["counts"]
    assert len(found["shards"]) == 5


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120])
def test_info_fits_narrow_terminals_as_far_as_its_columns_do(original, width):
    manifest = read_manifest(original)
    stored = stored_bytes(original, manifest)
    lines = info_lines(Path("s"), manifest, stored, width=width, plain=True)
    text = "\n".join(lines)
    assert text.isascii()
    for field in manifest.fields[:-1]:
        assert field.description.split()[0] in text


@plain_only
def test_a_set_with_a_missing_shard_is_an_error_not_a_traceback(folder, dmi):
    (folder / read_manifest(folder).shards[2].file).unlink()
    for name in ("info", "head"):
        code, _, err = dmi(name, folder)
        assert code == 2
        assert "missing" in err
    code, _, err = dmi("info", folder / "nothing")
    assert code == 2
    assert "no such file" in err


def test_head_shows_rows_of_a_split(folder, dmi):
    code, out, _ = dmi("head", folder, "-n", 2, "--split", "test")
    assert code == 0
    assert out.count("row ") == 2
    assert out.count(", test") == 2
    with ShardSet.open(folder) as shards:
        row = shards.rows("test")[np.array([0])]
        assert repr(shards.gather("formula", row)[0].decode()) in out
        assert f"{shards.gather('y', row)[0]:.6g} eV/atom" in out
        assert f"{len(shards.gather('z', row)[0])} node entries" in out
    code, out, _ = dmi("head", folder, "--fields", "y, formula", "-n", 1)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["row", "y", "formula"]


def test_head_fits_the_terminal():
    fields = {"f": [np.arange(6) - 0.123456789], "split": np.array([0])}
    manifest = SimpleNamespace(field=lambda name: field("float64", (6,)))
    for width in (40, 60, 120):
        lines = head_lines(manifest, np.array([7]), fields, width)
        assert max(map(len, lines)) <= width
        assert lines[1].startswith("  f  [-0.123457, 0.876543, ")
        assert all(line.startswith("     ") for line in lines[2:])
        assert "".join(lines).endswith("4.87654] K")


@plain_only
def test_head_names_what_it_does_not_know(folder, dmi):
    assert "no field 'q'; found x" in dmi("head", folder, "--fields", "q")[2]
    assert "no split 'q'; expected all" in dmi("head", folder, "--split", "q")[2]


def field(dtype, shape=(), **more):
    return Field(name="f", dtype=dtype, shape=shape, unit="K", description="", **more)


@pytest.mark.parametrize(
    ("of", "value", "text"),
    [
        (field("float64"), np.float64(1 / 3), "0.333333 K"),
        (field("int8"), np.int8(-3), "-3 K"),
        (field("S4"), np.bytes_(b"a\x1b["), r"'a\x1b[' K"),
        (field("int16", (2, 2)), np.arange(4).reshape(2, 2), "[[0, 1], [2, 3]] K"),
        (field("int16", (3, 3)), np.arange(9).reshape(3, 3), "int16[3x3], 0 to 8, mean 4 K"),
        (field("float32", (3,), axis="atom"), np.zeros((0, 3)), "0 atom entries"),
        (field("uint8", axis="atom"), np.array([6, 8]), "2 atom entries: [6, 8] K"),
        (
            field("float32", (3,), axis="atom"),
            np.ones((4, 3)),
            "4 atom entries of float32[3], 1 to 1, mean 1 K",
        ),
        (field("S2", (9,)), np.full(9, b"Fe"), "text of 2 bytes[9], first 'Fe'"),
    ],
)
def test_values_as_text(of, value, text):
    assert value_text(of, value) == text


@given(arrays.arrays(np.int64, st.integers(1, 64), elements=st.integers(0, 10**9)), st.booleans())
@settings(deadline=None)
def test_bars_show_every_value_and_the_peak(counts, plain):
    histogram = Histogram(exponent=0, first=0, counts=tuple(counts.tolist()))
    values = {"mean": 0, "std": 0, "min": 0, "max": 0, "count": 1}
    shown = bars(Statistics(**values, histogram=histogram), plain=plain)
    assert 1 <= len(shown) <= 24
    group = -(-len(counts) // 24)
    sums = [counts[k : k + group].sum() for k in range(0, len(counts), group)]
    assert [bar == " " for bar in shown] == [total == 0 for total in sums]
    if max(sums):
        assert shown[int(np.argmax(sums))] == ("@" if plain else "█")


def test_columns_are_aligned():
    assert columns([("a", "10"), ("bbb", "9")], right={1}) == ["a    10", "bbb   9"]


# verify and master


def test_verify_lists_damage_and_mends_it(folder, original, dmi):
    assert dmi("verify", folder)[1].endswith("all whole\n")
    shard = read_manifest(folder).shards[0]
    with (folder / shard.file).open("rb+") as stream:
        stream.seek(shard.arrays["split"].offset or 9)
        stream.write(b"\x07")
    (folder / "shard-00003.h5").unlink()
    code, _, err = dmi("verify", folder)
    assert code == 2
    assert f"{folder / shard.file}: " in err
    assert "shard-00003.h5: the file is missing" in err
    assert f"2 places damaged in 2 files. Mend from a copy: dmi data verify {folder}" in err
    code, out, _ = dmi("verify", folder, "--repair-from", original)
    assert code == 0
    assert f"mended {folder / 'shard-00003.h5'}: the whole file" in out
    assert "1 damaged place, " in out or "HDF5's own parts, " in out
    assert out.endswith("all whole now\n")
    assert dmi("verify", folder)[0] == 0


def test_master_is_one_file_for_any_tool(folder, dmi):
    code, out, _ = dmi("master", folder)
    assert code == 0
    assert str(folder / "master.h5") in out
    with h5py.File(folder / "master.h5") as file, ShardSet.open(folder) as shards:
        assert file["x"].shape == (300, 5)
        assert file["_axes/node"][-1] == len(file["z"])
        if shards.manifest.plan.compression is None:
            assert np.array_equal(file["x"][:], shards.gather("x", shards.rows("all")))
    assert dmi("verify", folder)[0] == 0


def stopped(number):
    """In the place of a function: a batch system or Ctrl-C ends the process within it."""
    return lambda *arguments, **more: signal.raise_signal(number)


@plain_only
def test_a_repair_that_is_stopped_leaves_the_damaged_shard(folder, original, dmi, monkeypatch):
    path = folder / read_manifest(folder).shards[0].file
    damaged = path.read_bytes()[:-1]
    path.write_bytes(damaged)
    with monkeypatch.context() as patch:
        patch.setattr(repair_module, "_assemble", stopped(signal.SIGTERM))
        code, _, err = dmi("verify", folder, "--repair-from", original)
    assert code == 75
    assert "stopped by SIGTERM: repeat the command" in err
    assert path.read_bytes() == damaged
    assert {file.name for file in folder.iterdir()} == {file.name for file in original.iterdir()}


@plain_only
def test_a_lost_manifest_is_mended(folder, original, dmi):
    (folder / "manifest.json").unlink()
    assert dmi("verify", folder)[0] == 2
    _, out, err = dmi("verify", folder, "--repair-from", original)
    assert "manifest.json: lost or damaged" in err
    assert "manifest.json: the whole file" in out
    assert dmi("verify", folder)[0] == 0


# split


@plain_only
def test_a_split_that_is_stopped_continues(folder, tmp_path, dmi, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(build_module, "_commit", stopped(signal.SIGHUP))
        code, _, err = dmi("split", folder, "--out", tmp_path / "new", "--processes", 1)
    assert code == 75
    assert "stopped by SIGHUP: the same command continues" in err
    assert dmi("split", folder, "--out", tmp_path / "new", "--processes", 1)[0] == 0


@plain_only
def test_split_makes_a_new_set(folder, tmp_path, dmi):
    new = tmp_path / "new"
    options = ("--shuffle", 3, "--compress", "blosc2:2", "--rows-per-shard", 100, "--processes", 1)
    code, out, _ = dmi("split", folder, "--out", new, "--test", 0.4, "--group", "formula", *options)
    assert code == 0
    assert "300 rows" in out
    plan = read_manifest(new).plan
    assert plan.compression == Compression(codec="blosc2", level=2)
    rule = plan.split_rule
    assert (rule.validation, rule.test, rule.seed) == (0.1, 0.4, 0)
    assert plan.rows_per_shard == 100
    assert plan.shuffled
    code, _, err = dmi("split", folder, "--out", folder)
    assert code == 2
    assert "its own folder" in err


def test_compression_as_text():
    assert compression_of("none") == "none"
    assert compression_of("zstd") == Compression(codec="zstd")
    assert compression_of("blosc2:9") == Compression(codec="blosc2", level=9)
    for text in ("gzip", "zstd:x", "blosc2:10", ""):
        with pytest.raises(DataError, match="expected none, zstd, blosc2"):
            compression_of(text)


# stage


@plain_only
def test_stage_and_remove(folder, tmp_path, dmi, monkeypatch):
    to = tmp_path / "node"
    to.mkdir()
    monkeypatch.delenv("DMI_STAGE", raising=False)
    code, out, err = dmi("stage", folder, "--to", to)
    assert code == 0
    assert str(home_of(to)) in out
    assert f"export DMI_STAGE={to}" in err
    monkeypatch.setenv("DMI_STAGE", str(to))
    _, out, err = dmi("stage", folder, "--to", to)
    assert "there already" in out
    assert err == ""
    assert dmi("stage", "--to", to, "--remove")[1] == f"{to}: 1 copy removed\n"
    assert list(to.iterdir()) == []
    assert dmi("stage", folder, "--to", to, "--part", "1/2")[0] == 0
    assert dmi("stage", folder, "--to", to, "--remove")[0] == 0
    code, _, err = dmi("stage", "--to", to)
    assert code == 2
    assert "stage needs SET" in err


@plain_only
@pytest.mark.parametrize("part", [(), ("--part", "1/3")], ids=["whole", "part"])
def test_a_damaged_copy_is_replaced_when_nobody_uses_it(folder, tmp_path, dmi, part):
    to = tmp_path / "node"
    to.mkdir()
    order = ("stage", folder, "--to", to, "--lock-timeout", 0.1, *part)
    assert dmi(*order)[0] == 0
    (copy,) = (p for p in home_of(to).iterdir() if p.is_dir())
    own = [path for path in copy.glob("*.h5") if not path.is_symlink()]
    for path in (*own, copy / "manifest.json"):
        good = path.read_bytes()
        path.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
        if path == own[0]:
            user = Lock.take(copy, alone=False)
            code, _, err = dmi(*order)
            user.close()
            assert code == 2
            assert "damaged, and another process has been" in err
        assert "there already" not in dmi(*order)[1]
        assert path.read_bytes() == good
    assert "there already" in dmi(*order)[1]


@plain_only
def test_where_copies_are_looked_for(folder, tmp_path, dmi, monkeypatch):
    to = tmp_path / "node"
    to.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DMI_STAGE", "/else")
    assert f"export DMI_STAGE=/else:{to.resolve()}\n" in dmi("stage", folder, "--to", "node")[2]
    monkeypatch.setenv("DMI_STAGE", "node")
    assert "DMI_STAGE: found 'node', expected absolute" in dmi("stage", folder, "--to", to)[2]


def test_parts_as_text():
    assert part_of("0/4") == (0, 4)
    for text in ("4/4", "1", "-1/2", "a/b", "1/2/3", ""):
        with pytest.raises(DataError, match=r"expected K/N with K from 0 to N - 1"):
            part_of(text)


def is_open(pid, path):
    files = []
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            files.append(handle.readlink())
    return path in files


@plain_only
def test_a_batch_systems_signal_leaves_nothing_of_a_copy(folder, tmp_path):
    to = tmp_path / "node"
    to.mkdir()
    shard = folder / read_manifest(folder).shards[1].file
    shard.unlink()
    os.mkfifo(shard)
    silent = os.open(shard, os.O_RDWR)  # a source that never answers
    process = subprocess.Popen(
        command("data", "stage", folder, "--to", to), env=environment(), stderr=subprocess.PIPE
    )
    try:
        wait_for(lambda: is_open(process.pid, shard), process)
        assert list(to.glob("dmi-stage-*/.tmp-*"))
        process.send_signal(signal.SIGTERM)
        os.close(silent)  # now the thread that reads can end
        assert process.wait(100) == 75
    finally:
        process.kill()
        process.communicate(timeout=30)
    assert not list(to.glob("dmi-stage-*/.tmp-*"))


# bench


def test_bench_measures_every_way_next_to_memory(folder, dmi):
    code, out, _ = dmi("bench", folder, "--seconds", 0.01, "--batch-size", 64)
    assert code == 0
    plain = read_manifest(folder).plan.compression is None
    shown = [line.rsplit("  ", 3)[0].strip() for line in out.splitlines() if ": " in line]
    for backend in ("mmap", "pread", "ram"):
        for what in ("shuffled", "in order", "shuffled, first epoch"):
            usable = plain or backend != "mmap"
            assert any(line.startswith(f"{backend}: {what}") for line in shown) == usable
    assert any(line.startswith("memory: copied in order") for line in shown)
    assert "x, y, z, edge" in out
    assert "dmi reads this set by" in out
    code, out, _ = dmi("bench", folder, "--seconds", 0.01, "--fields", "x,y", "--split", "all")
    assert code == 0
    assert "300 rows of all" in out
    for options, said in (
        (("--fields", "formula"), "expected fields of numbers: x, y"),
        (("--split", "q"), "no split 'q'"),
    ):
        code, _, err = dmi("bench", folder, *options)
        assert code == 2
        assert said in err


# build


def test_an_interrupted_build_is_continued_only_when_asked(tmp_path, dmi, monkeypatch):
    recipe, run = toy_recipe(tmp_path / "toy.toml"), tmp_path / "run"

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "_commit", stopped(signal.SIGINT))
        code, _, err = dmi("build", recipe, "--out", run)
    assert code == 75
    assert "stopped by SIGINT: with --resume it continues" in err
    data = run / "data"
    made = sorted(data.glob("shard-*.h5"))
    assert len(made) > 1
    code, _, err = dmi("build", recipe, "--out", run)
    assert code == 2
    assert f"left {len(made)} finished shards" in err
    assert "--resume keeps them" in err
    made[1].unlink()
    before = {path: path.stat().st_mtime_ns for path in made if path.exists()}
    assert dmi("build", recipe, "--out", run, "--resume")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert made[1].exists()
    assert dmi("verify", data)[0] == 0
    assert dmi("build", recipe, "--out", run)[0] == 0, "a finished set is kept"
    assert dmi("build", recipe, "--out", tmp_path / "fresh", "--resume")[0] == 0
