import bz2
import gzip
import json
import lzma
import re
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmi_hpc.data.importing.csvs import CsvFiles
from dmi_hpc.data.importing.options import FieldSpec, ImportOptions, field_name
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.data.importing.values import Texts, from_array, from_texts, splits_from
from dmi_hpc.data.manifest import Field
from dmi_hpc.data.reader import ShardSet
from dmi_hpc.errors import DataError


def run(tmp_path, raw, name="table.csv", **options):
    """Without splits unless said: rows stay in the order of the file."""
    path = tmp_path / name
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    options = {"validation": 0, "test": 0, **options}
    return import_files([path], tmp_path / "set", ImportOptions(**options))


def read(tmp_path, *names):
    with ShardSet.open(tmp_path / "set") as shards:
        return [shards.gather(name, shards.rows("all")).tolist() for name in names]


def dtypes(manifest):
    return {field.name: field.dtype for field in manifest.fields}


TABLE = """id,Volume (Å³),count,phase,stable
a,1.5,1,α,True
b,2,2,β-long,False
c,-3e2,3,"x, y",true
"""


def test_types_and_names_come_from_the_file(tmp_path):
    manifest, report = run(tmp_path, TABLE)
    assert dtypes(manifest) == {
        "id": "S1",
        "Volume": "float64",
        "count": "int64",
        "phase": "S7",
        "stable": "uint8",
        "split": "uint8",
    }
    assert manifest.field("Volume").description == "column 'Volume (Å³)'"
    assert (report.read, report.kept, report.skipped) == (3, 3, 0)
    phase, volume, stable = read(tmp_path, "phase", "Volume", "stable")
    assert [text.decode() for text in phase] == ["α", "β-long", "x, y"]
    assert volume == [1.5, 2.0, -300.0]
    assert stable == [1, 0, 1]


def test_fields_as_said(tmp_path):
    fields = (
        FieldSpec(name="v", source="Volume (Å³)", dtype="float32", unit="angstrom^3"),
        FieldSpec(name="id", dtype="S4"),
    )
    manifest, _ = run(tmp_path, TABLE, fields=fields)
    assert dtypes(manifest) == {"v": "float32", "id": "S4", "split": "uint8"}
    assert manifest.field("v").unit == "angstrom^3"
    with pytest.raises(DataError, match=r"expected a column 'w', found columns: id, Volume"):
        run(tmp_path, TABLE, fields=(FieldSpec(name="w"),))


BAD = "x,n,s\n1.5,1,a\nn/a,2,b\n,3,c\n2.5,4.5,d\n3.5,5\ninf,6,e\n\n4.5,7,f\n1_0,8,g\n"


def test_bad_cells_are_named_by_line_and_column(tmp_path):
    manifest, report = run(tmp_path, BAD, bad="skip", fields=(
        FieldSpec(name="x"), FieldSpec(name="n", dtype="int16"), FieldSpec(name="s")
    ))  # fmt: skip
    path = tmp_path / "table.csv"
    assert list(map(str, report.bad)) == [
        f"{path}:3: x: expected a number, found 'n/a'",
        f"{path}:4: x: expected a number, found nothing",
        f"{path}:5: n: 4.5 cannot be stored as int16",
        f"{path}:6: expected 3 cells, found 2",
        f"{path}:7: x: expected finite values, found inf",
        f"{path}:10: x: expected a number, found '1_0'",
    ]
    assert read(tmp_path, "x", "s") == [[1.5, 4.5], [b"a", b"f"]]
    assert (report.read, report.kept, manifest.rows) == (8, 2, 2)
    written = json.loads((tmp_path / "set" / "import-report.json").read_text())
    assert written["skipped"] == 6
    assert written["identity"] == manifest.identity
    assert {entry["where"] for entry in written["bad"]} == {bad.where for bad in report.bad}


def test_bad_cells_are_an_error_unless_skipped(tmp_path):
    lines = "".join("x\n" if i % 4 == 3 else f"{i}\n" for i in range(100))
    with pytest.raises(
        DataError, match=r"25 records .*--bad skip\):(.|\n)*csv:5: .*\n(.*\n){9}.*15 more"
    ):
        run(tmp_path, "v\n" + lines)
    assert not (tmp_path / "set").exists()


def test_counting_bad_records_ends_somewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("dmi_hpc.data.importing.csvs._CHUNK_BYTES", 2**12)
    with pytest.raises(DataError, match=r"^1,\d\d\d records or more cannot be used"):
        run(tmp_path, "v\n" + "1\nx\n" * 20_000)


@pytest.mark.parametrize(("dtype", "text", "reason"), [
    ("uint8", "256", "256 is out of the range of uint8"),
    ("uint8", "-1", "-1 is out of the range"),
    ("float32", "1e300", "1e\\+300 cannot be stored|expected finite|cannot be stored as float32"),
    ("S3", "αβ", "4 bytes of text, the field holds 3"),
    ("int64", "9223372036854775808", "out of the range"),
])  # fmt: skip
def test_nothing_is_cut_or_wrapped_in_silence(tmp_path, dtype, text, reason):
    with pytest.raises(DataError, match=reason):
        run(tmp_path, f"v\n{text}\n", fields=(FieldSpec(name="v", dtype=dtype),))


def test_numbers_keep_every_bit(tmp_path):
    run(tmp_path, "n,x\n9007199254740993,0.1\n-9223372036854775808,1e-320\n")
    assert read(tmp_path, "n", "x") == [[9007199254740993, -(2**63)], [0.1, 1e-320]]


def test_integers_beyond_64_bits_stay_text(tmp_path):
    manifest, _ = run(tmp_path, "n\n123456789012345678901\n")
    assert dtypes(manifest)["n"] == "S21"


def test_a_group_shares_a_split_and_a_column_names_it(tmp_path):
    text = "g,v,split\n" + "".join(
        f"{i % 7},{i},{'train' if i % 2 else 'val'}\n" for i in range(70)
    )
    manifest, _ = run(tmp_path, text)
    assert dict(manifest.split_rows) == {"train": 35, "validation": 35, "test": 0}
    assert "split" not in [f.name for f in manifest.fields[:-1]]
    manifest, _ = run(tmp_path, text, group="g", validation=0.3, test=0.3, replace=True)
    groups, splits = read(tmp_path, "g", "split")
    assert len(set(zip(groups, splits, strict=True))) == 7
    assert manifest.plan.split_rule.key == "text of column 'g'"
    with pytest.raises(DataError, match="column 'h' to decide the split"):
        run(tmp_path, text, group="h", replace=True)
    with pytest.raises(DataError, match="split: expected train, validation or test, found 'both'"):
        run(tmp_path, text + "1,1,both\n", replace=True)


@pytest.mark.parametrize(("suffix", "pack"), [
    (".xz", lzma.compress), (".gz", gzip.compress), (".bz2", bz2.compress),
])  # fmt: skip
def test_compressed_tables(tmp_path, suffix, pack):
    raw = pack(b"\xef\xbb\xbfa;b\r\n1;2\r\n3;4\r\n")
    run(tmp_path, raw, name=f"t.csv{suffix}", delimiter=";")
    assert read(tmp_path, "a", "b") == [[1, 3], [2, 4]]
    with pytest.raises(DataError, match=r"not a readable table"):
        run(tmp_path, raw[:-5], name=f"torn.csv{suffix}", delimiter=";", replace=True)


def test_tab_separated_and_old_mac_lines(tmp_path):
    run(tmp_path, "a\tb\r1\t2\r\r3\tx\r", name="t.tsv", bad="skip", fields=(
        FieldSpec(name="a"), FieldSpec(name="b", dtype="int8")))  # fmt: skip
    assert read(tmp_path, "a", "b") == [[1], [2]]
    assert "t.tsv:4" in (tmp_path / "set" / "import-report.json").read_text()


@pytest.mark.parametrize(("text", "message"), [
    ("", "expected a column 'formula'|no columns"),
    ("a,b\n", "no usable record in 0"),
    ("a,a\n1,2\n", "not the only one"),
    ("a b,a-b\n1,2\n", "not the only one"),
    ("α,β\n1,2\n", "empty, reserved or not the only one"),
    ('a\n"1\n', "a quote that is never closed"),
    ("a\n" + "x" * 200_000 + "\n", "field larger than field limit"),
])  # fmt: skip
def test_tables_that_cannot_be_imported(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        run(tmp_path, text, fields=(FieldSpec(name="a", dtype="int8"),) if '"' in text else ())


def test_files_of_one_header_become_one_set(tmp_path):
    one, two, three = (tmp_path / f"{i}.csv" for i in range(3))
    one.write_text("a,b\n1,x\n")
    two.write_text("a,b\n2,long\n")
    three.write_text("a,c\n2,long\n")
    options = ImportOptions(validation=0, test=0)
    manifest, _ = import_files([one, two], tmp_path / "set", options)
    assert manifest.field("b").dtype == "S4"
    assert read(tmp_path, "a", "b") == [[1, 2], [b"x", b"long"]]
    with pytest.raises(DataError, match=r"2.csv: columns a, c; .*has a, b"):
        import_files([one, three], tmp_path / "set", options)


def test_memory_does_not_grow_with_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr("dmi_hpc.data.importing.csvs._CHUNK_BYTES", 2**14)

    def peak(lines):
        path = tmp_path / f"{lines}.csv"
        path.write_text("x,y,name\n" + "".join(f"{i}.5,{i},n{i % 99}\n" for i in range(lines)))
        options = ImportOptions(rows_per_shard=1000, processes=1)
        tracemalloc.start()
        try:
            import_files([path], tmp_path / f"set{lines}", options)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(1000)  # what is loaded once
    small, large = peak(3_000), peak(18_000)
    assert large < 1.2 * small + 2**19


def parquet(tmp_path, columns, name="table.parquet", **options):
    path = tmp_path / name
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    options = {"validation": 0, "test": 0, **options}
    return import_files([path], tmp_path / "set", ImportOptions(**options))


def test_parquet_columns(tmp_path):
    vectors = pyarrow.array(
        [[1.0, 2.0], [3.0, 4.0], None, [5.0, 6.0]], pyarrow.list_(pyarrow.float32(), 2)
    )
    columns = {
        "x": pyarrow.array([1.5, None, 3.5, 4.5]),
        "n": pyarrow.array([1, 2, 3, 4], pyarrow.uint16()),
        "ok": [True, False, True, True],
        "text": ["ü", "abc", "d", "efgh"],
        "kind": pyarrow.array(["a", "b", "a", "b"]).dictionary_encode(),
        "vector": vectors,
    }  # fmt: skip
    manifest, report = parquet(tmp_path, columns, bad="skip")
    assert dtypes(manifest) == {
        "x": "float64", "n": "uint16", "ok": "uint8", "text": "S4", "kind": "S1",
        "vector": "float32", "split": "uint8",
    }  # fmt: skip
    assert read(tmp_path, "x", "n", "text", "vector", "kind") == [
        [1.5, 4.5], [1, 4], ["ü".encode(), b"efgh"], [[1, 2], [5, 6]], [b"a", b"b"],
    ]  # fmt: skip
    path = tmp_path / "table.parquet"
    assert list(map(str, report.bad)) == [
        f"{path}, row 1: x: no value",
        f"{path}, row 2: vector: no value",
    ]


def test_parquet_that_cannot_be_imported(tmp_path):
    with pytest.raises(DataError, match=r"column 'when' is of type timestamp.*--field"):
        parquet(tmp_path, {"when": pyarrow.array([0], pyarrow.timestamp("s"))})
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match=r"bad\.parquet: not a readable Parquet file"):
        import_files([tmp_path / "bad.parquet"], tmp_path / "set", ImportOptions())


def test_parquet_groups(tmp_path):
    columns = {"g": [f"k{i % 5}" for i in range(50)], "v": list(range(50))}
    manifest, _ = parquet(tmp_path, columns, group="g", validation=0.3, test=0.3)
    groups, splits = read(tmp_path, "g", "split")
    assert len(set(zip(groups, splits, strict=True))) == 5
    assert manifest.split_rows["train"] < 50


# pure cores

LINE = re.compile("\r\n|\r|\n")
CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(
    st.lists(st.lists(CELL, min_size=3, max_size=3), max_size=20), st.sampled_from(["\n", "\r\n"])
)
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_any_csv_comes_back_as_written(tmp_path_factory, rows, end):
    import csv

    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([["a", "b", "c"], *rows])
    table = CsvFiles([path], ",")
    text = path.read_bytes().decode()
    found, lines = [], []
    for chunk in table.chunks():
        some, numbers, bad = table.records(chunk.payload)
        assert not bad
        found += some
        lines += numbers
    assert found == rows
    assert lines == sorted(set(lines))
    starts = LINE.split(text)
    for row, line in zip(rows, lines, strict=True):
        quoted = row[0].replace('"', '""')
        assert starts[line - 1].startswith(LINE.split(f'"{quoted}"')[0])


@given(st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=5)).map(str), max_size=30))
@settings(deadline=None, max_examples=200)
def test_every_column_fits_the_dtype_found_for_it_or_says_why(cells):
    texts = Texts.of(cells)
    field = Field(name="f", dtype=texts.dtype("float64"), unit="", description="")
    values, problems = from_texts(field, cells)
    assert len(values) == len(cells)
    for i, cell in enumerate(cells):
        if i in problems:
            continue
        if field.numeric:
            truth = {"true": 1, "false": 0}.get(cell.strip().lower())
            assert float(values[i]) == (truth if truth is not None else float(cell))
        else:
            assert values[i].decode() == cell
    split = len(cells) // 3
    assert Texts.of(cells[:split]) + Texts.of(cells[split:]) == texts


@given(
    st.sampled_from(["int8", "uint8", "uint16", "int32", "uint64", "int64"]),
    st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=20),
)
@settings(deadline=None, max_examples=200)
def test_integers_are_stored_exactly_or_refused(dtype, numbers):
    field = Field(name="f", dtype=dtype, unit="", description="")
    limits = np.iinfo(dtype)
    for found in (from_array(field, np.array(numbers)), from_texts(field, list(map(str, numbers)))):
        values, problems = found
        for i, number in enumerate(numbers):
            assert (i in problems) == (not limits.min <= number <= limits.max)
            assert i in problems or int(values[i]) == number


@given(
    st.lists(st.floats(), min_size=1, max_size=20), st.sampled_from(["int64", "uint8", "float16"])
)
@settings(deadline=None, max_examples=200)
def test_floats_are_stored_or_refused(numbers, dtype):
    field = Field(name="f", dtype=dtype, unit="", description="")
    values, problems = from_array(field, np.array(numbers))
    assert np.isfinite(values.astype(float)).all()
    for i, number in enumerate(numbers):
        if i not in problems and field.numpy.kind in "iu":
            assert int(values[i]) == number


def test_names_of_splits():
    splits, problems = splits_from(["train", " VAL", "test", "0", "2", "dev", "x", ""])
    assert splits.tolist() == [0, 1, 2, 0, 2, 1, 0, 0]
    assert set(problems) == {6, 7}


@given(st.text(max_size=80))
@settings(deadline=None)
def test_field_names_are_names(text):
    name = field_name(text)
    assert name == "" or FieldSpec(name=name).name == name
