"""Tables of molecules: SMILES and values become characters, fingerprints and graphs.

Each row: the value, the SMILES as written, that of RDKit (canonical) as characters, the MACCS keys
and Morgan bits of the molecule, its heavy atoms on axis "atom", its bonds, both ways, on axis "bond".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from dmi_hpc.data.importing.crossing import Crossing
from dmi_hpc.data.importing.csvs import CsvFiles, Lines, by_line
from dmi_hpc.data.importing.optional import library, readable
from dmi_hpc.data.importing.options import ROW, ImportOptions
from dmi_hpc.data.importing.records import BadRecord, Batch, Chunk, PlainSource, listed
from dmi_hpc.data.importing.rows import Splits, good_rows, with_split
from dmi_hpc.data.importing.values import Problems, from_texts
from dmi_hpc.data.manifest import SPLIT, Field
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import DataError, counted

Array = np.ndarray[Any, np.dtype[Any]]
Molecule = Any  # rdkit.Chem.Mol

SCAFFOLD = "scaffold"  # a group: molecules of one Bemis-Murcko scaffold
MACCS, MORGAN = 167, 1024  # bits; the first MACCS key does not exist and is always 0
_LONGEST = 2048  # bytes of a SMILES: anything longer is none
_BONDS = ("SINGLE", "DOUBLE", "TRIPLE", "AROMATIC")  # any other is the number after them


def _field(
    name: str,
    dtype: str,
    description: str,
    shape: tuple[int, ...] = (),
    axis: str | None = None,
    refers: str | None = None,
) -> Field:
    return Field(
        name=name,
        dtype=dtype,
        shape=shape,
        unit="" if name in ("characters", "edge_index") else "1",
        description=description,
        axis=axis,
        refers=refers,
    )


FIELDS = (
    _field("characters", "uint8", "ASCII codes of the canonical SMILES", axis="character"),
    _field("maccs", "uint8", "MACCS keys", (MACCS,)),
    _field("morgan", "uint8", "Morgan fingerprint of radius 2", (MORGAN,)),
    _field("atomic_number", "uint8", "Z of the heavy atoms", axis="atom"),
    _field(
        "atom_features",
        "int8",
        "neighbours, charge, hybridisation (as RDKit numbers them), aromatic, hydrogens, "
        "chirality (1 = R, 2 = S), in a ring",
        (7,),
        "atom",
    ),
    _field("edge_index", "int32", "an atom and a bonded one", (2,), "bond", "atom"),
    _field(
        "bond_features",
        "uint8",
        "order (0 1 2: single double triple, 3 aromatic, 4 other), conjugated, in a ring, stereo "
        "(as RDKit numbers it)",
        (4,),
        "bond",
    ),
)


def parse_smiles(text: str) -> Molecule:
    """An RDKit molecule without its hydrogens. Raises DataError with the reason."""
    chem, base = _rdkit("rdkit.Chem"), _rdkit("rdkit.rdBase")
    if len(text.encode()) > _LONGEST:
        raise DataError(f"longer than {_LONGEST} bytes")
    if not text.strip():
        raise DataError("expected a SMILES, found nothing")
    if len(text.split()) > 1:  # RDKit takes the rest for a name
        raise DataError("expected one SMILES, found white space in it")
    # RDKit writes to the terminal what is told here, and fails where numbers in brackets are absurd
    with base.BlockLogs(), readable("not a valid SMILES"):
        found = chem.MolFromSmiles(text.strip())
        raw = None if found is not None else chem.MolFromSmiles(text.strip(), sanitize=False)
        problems = [] if raw is None else chem.DetectChemistryProblems(raw)
    if found is None:
        why = [problem.Message() for problem in problems] or ["RDKit cannot read it"]
        raise DataError(f"not a valid SMILES: {why[0]}")
    if any(atom.GetAtomicNum() == 0 for atom in found.GetAtoms()):
        raise DataError("an atom '*' of no element")
    return found


def features_of(molecule: Molecule) -> dict[str, Array]:
    """What is stored of a molecule, by the names of `FIELDS`; each bond there and back."""
    chem = _rdkit("rdkit.Chem")
    keys = _rdkit("rdkit.Chem.rdMolDescriptors").GetMACCSKeysFingerprint(molecule)
    convert = _rdkit("rdkit.DataStructs").ConvertToNumpyArray
    maccs, morgan = np.zeros(MACCS, np.uint8), np.zeros(MORGAN, np.uint8)
    convert(keys, maccs)
    convert(_morgan().GetFingerprint(molecule), morgan)
    bonds = [_bond(bond) for bond in molecule.GetBonds()]
    ends = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in molecule.GetBonds()]
    there = np.array(ends, dtype=np.int32).reshape(-1, 2)
    features = np.array(bonds, dtype=np.uint8).reshape(-1, 4)
    return {
        "characters": np.frombuffer(chem.MolToSmiles(molecule).encode("ascii"), np.uint8),
        "maccs": maccs,
        "morgan": morgan,
        "atomic_number": np.array([a.GetAtomicNum() for a in molecule.GetAtoms()], np.uint8),
        "atom_features": np.array([_atom(a) for a in molecule.GetAtoms()], np.int8),
        "edge_index": np.concatenate([there, there[:, ::-1]]),
        "bond_features": np.concatenate([features, features]),
    }


def _atom(atom: Any) -> tuple[int, ...]:
    chirality = atom.GetProp("_CIPCode") if atom.HasProp("_CIPCode") else ""
    return (
        atom.GetDegree(),
        atom.GetFormalCharge(),
        int(atom.GetHybridization()),
        int(atom.GetIsAromatic()),
        atom.GetTotalNumHs(),
        {"R": 1, "S": 2}.get(chirality, 0),
        int(atom.IsInRing()),
    )


def _bond(bond: Any) -> tuple[int, ...]:
    order = str(bond.GetBondType())
    number = _BONDS.index(order) if order in _BONDS else len(_BONDS)
    return (number, int(bond.GetIsConjugated()), int(bond.IsInRing()), int(bond.GetStereo()))


def other_smiles(text: str, seed: int) -> str:
    """The SMILES of a molecule with its atoms in a random order; equal seeds give equal ones.

    Random SMILES of RDKit itself are drawn from one generator of all threads, and cannot be repeated.
    """
    chem, molecule = _rdkit("rdkit.Chem"), parse_smiles(text)
    order = np.random.default_rng(seed).permutation(molecule.GetNumAtoms()).tolist()
    return str(chem.MolToSmiles(chem.RenumberAtoms(molecule, order), canonical=False))


def scaffold_of(molecule: Molecule) -> str:
    """SMILES of the rings and what joins them (Bemis and Murcko 1996); of a molecule without rings
    its own, as all of those would be one group."""
    scaffolds = _rdkit("rdkit.Chem.Scaffolds.MurckoScaffold")
    found: str = scaffolds.MurckoScaffoldSmiles(mol=molecule)
    return found or _rdkit("rdkit.Chem").MolToSmiles(molecule)


def columns_of(molecules: Sequence[Mapping[str, Array]]) -> dict[str, Array | Ragged]:
    """The columns of at least one molecule's features."""
    columns: dict[str, Array | Ragged] = {}
    for field in FIELDS:
        values = [molecule[field.name] for molecule in molecules]
        columns[field.name] = Ragged.from_rows(values) if field.axis else np.stack(values)
    return columns


class Molecules(PlainSource):
    """CSV files with a column of SMILES, one of values, and those of `options.fields`."""

    task = "molecule"
    unit = "bytes"
    key = "canonical SMILES"

    def __init__(self, files: Sequence[Path], options: ImportOptions) -> None:
        super().__init__()
        _rdkit("rdkit.Chem")
        self.csv = CsvFiles(files, options.delimiter)
        self.files, self.options = self.csv.files, options
        other = ". Choose another with --{}, or import any columns with --as table"
        self.smiles = self.csv.index(options.smiles, other.format("smiles"))
        about = options.quantity or options.value
        value = Field(name="value", dtype="float64", unit=options.unit or "", description=about)
        place = self.csv.index(options.value, other.format("value"))
        self.values = ((value, place), *self._beside(options))
        self.splits = Splits(options, options.split_column)
        source = options.split_column or options.group_column
        self.by_column = None
        if source is not None and source != SCAFFOLD:
            self.by_column = self.csv.index(source)
            self.key = self.splits.rule.key or f"text of column {source!r}"
        elif options.group == SCAFFOLD:
            self.key = "Bemis-Murcko scaffold; without rings the canonical SMILES"
        elif options.group == ROW:
            self.key = ROW
        self.longest = 1

    def _beside(self, options: ImportOptions) -> Iterator[tuple[Field, int]]:
        taken = {"value", "smiles", "file", "line", *(field.name for field in FIELDS)}
        for spec in options.fields:
            if spec.name in taken:
                raise DataError(
                    f"field {spec.name!r} is one that every import of molecules has. Choose another "
                    f"name, in a --map FILE ([fields.NAME] with source = {spec.origin!r})"
                )
            if spec.axis or spec.refers:
                raise DataError(f"field {spec.name}: a table has no ragged fields")
            about = spec.description or f"column {spec.origin!r}"
            kind = spec.dtype or "float64"
            field = Field(name=spec.name, dtype=kind, unit=spec.unit, description=about)
            yield field, self.csv.index(spec.origin)

    @property
    def total(self) -> int:
        return self.csv.total

    @property
    def fields(self) -> tuple[Field, ...]:
        origin = "index into provenance.files", "of the file; the header is line 1"
        return (
            *(field for field, _ in self.values),
            Field(name="smiles", dtype=f"S{self.longest}", unit="", description="as written"),
            *FIELDS,
            Field(name="file", dtype="uint16", unit="", description=origin[0]),
            Field(name="line", dtype="int64", unit="", description=origin[1]),
        )

    def notes(self) -> Sequence[str]:
        if self.options.unit is not None:
            return ()
        return [f"the unit of {self.options.value!r} is not known: say it with --unit"]

    def scan(self) -> Iterator[Chunk] | None:
        return self.csv.chunks()

    def look(self, chunk: Chunk) -> int:
        rows, _, _ = self.csv.records(chunk.payload)
        sizes = (len(row[self.smiles].strip().encode()) for row in rows)
        return max((size for size in sizes if size <= _LONGEST), default=1)

    def learn(self, findings: Iterable[int]) -> None:
        self.longest = max([1, *findings])

    def chunks(self) -> Iterator[Chunk]:
        return self.csv.chunks()

    def parse(self, chunk: Chunk) -> Batch:
        lines: Lines = chunk.payload
        name = self.files[lines.file]
        read, numbers, found_bad = self.csv.records(lines)
        rows, kept, features, keys, bad = [], [], [], [], list(found_bad)
        for row, number in zip(read, numbers, strict=True):
            text = row[self.smiles].strip()
            try:
                molecule = parse_smiles(text)
            except DataError as error:
                bad.append(BadRecord(f"{name}:{number}", f"{text[:80]!r}: {error}"))
                continue
            rows.append(row)
            kept.append(number)
            features.append(features_of(molecule))
            keys.append(self._key(row, molecule))
        if not rows:
            return Batch({}, by_line(bad))
        columns: dict[str, Array | Ragged] = {}
        problems: dict[str, Problems] = {}
        for field, place in self.values:
            cells = [row[place] for row in rows]
            columns[field.name], problems[self.csv.columns[place]] = from_texts(field, cells)
        smiles = [row[self.smiles].strip().encode() for row in rows]
        columns |= {"smiles": np.array(smiles, f"S{self.longest}"), **columns_of(features)}
        columns["file"] = np.full(len(rows), lines.file, dtype=np.uint16)
        columns["line"] = np.array(kept, dtype=np.int64)
        if self.options.group != ROW:
            with_split(columns, problems, self.splits, keys)
        batch = good_rows(columns, problems, lambda row: f"{name}:{kept[row]}")
        return Batch(batch.rows, by_line([*bad, *batch.bad]))

    def _key(self, row: Sequence[str], molecule: Molecule) -> str:
        if self.by_column is not None:
            return row[self.by_column]
        if self.options.group == SCAFFOLD:
            return scaffold_of(molecule)
        return str(_rdkit("rdkit.Chem").MolToSmiles(molecule))

    def collect(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Note molecules in several splits, which a given split does not keep apart."""
        crossing = Crossing()
        for batch in batches:
            if self.by_column is not None and batch.count:
                characters = cast(Ragged, batch.rows["characters"])
                numbers = (np.asarray(batch.rows[name]) for name in (SPLIT.name, "file", "line"))
                for codes, split, file, line in zip(characters, *numbers, strict=True):
                    smiles = codes.tobytes().decode()
                    crossing.add(smiles, int(split), f"{self.files[file]}:{line}")
            yield batch
        self.crossing, self.across = crossing.found()


def read_molecules(
    path: Path, column: str = "smiles"
) -> tuple[list[str], dict[str, Array | Ragged]]:
    """A CSV or TSV with a column of SMILES, not stored: the text of each, and `FIELDS`.

    Raises DataError naming every record that cannot be used.
    """
    tabbed = ".tsv" in path.suffixes
    table = CsvFiles([path], "\t" if tabbed else ",")
    place = table.index(column)
    labels, features, bad = list[str](), list[dict[str, Array]](), list[BadRecord]()
    for chunk in table.chunks():
        rows, numbers, found_bad = table.records(chunk.payload)
        bad += found_bad
        for row, number in zip(rows, numbers, strict=True):
            text = row[place].strip()
            try:
                features.append(features_of(parse_smiles(text)))
            except DataError as error:
                bad.append(BadRecord(f"{path}:{number}", f"{text[:80]!r}: {error}"))
            labels.append(text)
    if bad:
        raise DataError(
            f"{path}: {counted(len(bad), 'record')} cannot be used:{listed(by_line(bad))}"
        )
    if not features:
        raise DataError(f"{path}: no molecules in it")
    return labels, columns_of(features)


@cache
def _morgan() -> Any:
    return _rdkit("rdkit.Chem.rdFingerprintGenerator").GetMorganGenerator(radius=2, fpSize=MORGAN)


def _rdkit(module: str) -> Any:
    return library(module, "molecules", extra="molecules")
