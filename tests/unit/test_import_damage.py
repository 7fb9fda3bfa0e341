"""Damaged files of every format: a bad record or a clear error, never another exception."""

import json
import random

import ase.io
import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tifffile
from PIL import Image
from pymatgen.core import Lattice, Structure

from dmi_hpc.data.importing.options import ImportOptions
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.errors import DataError

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0] * 3, [0.5] * 3])
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (9, 8)).astype(np.uint8)


def hdf5(path):
    with h5py.File(path, "w") as file:
        file["x"] = RNG.normal(size=(9, 2))
        file["t"] = [f"s{i}" for i in range(9)]


MAKERS = {
    "a.csv": lambda p: p.write_text('x,"y"\n' + "".join(f'{i}.5,"t{i}"\n' for i in range(20))),
    "a.parquet": lambda p: pyarrow.parquet.write_table(
        pyarrow.table({"x": [1.5, 2.5], "t": ["a", "bc"]}), p
    ),
    "a.npy": lambda p: np.save(p, RNG.normal(size=(9, 3))),
    "a.npz": lambda p: np.savez_compressed(
        p, x=RNG.normal(size=(9, 3)), t=np.array(list("abcdefghi"))
    ),
    "a.h5": hdf5,
    "a.png": lambda p: Image.fromarray(PIXELS).save(p),
    "a.tif": lambda p: tifffile.imwrite(p, PIXELS),
    "a.cif": lambda p: p.write_text(SALT.to(fmt="cif")),
    "POSCAR": lambda p: p.write_text(SALT.to(fmt="poscar")),
    "a.extxyz": lambda p: ase.io.write(p, [SALT.to_ase_atoms()] * 3, format="extxyz"),
    "a.json": lambda p: p.write_text(json.dumps([{"s": SALT.as_dict(), "e": i} for i in range(2)])),
}


@pytest.mark.parametrize("name", MAKERS)
def test_damage_is_told(tmp_path, name, caplog):
    caplog.set_level("CRITICAL")  # of tifffile
    path = tmp_path / name
    MAKERS[name](path)
    options = ImportOptions(bad="skip", replace=True, processes=1, validation=0, test=0)
    assert import_files([path], tmp_path / "set", options)[1].skipped == 0
    whole, dice = path.read_bytes(), random.Random(name)
    outcomes = set()
    for trial in range(24):
        raw = bytearray(whole)
        if trial % 4 == 0:
            del raw[dice.randrange(len(raw)) :]
        for _ in range(dice.choice([1, 2, 8])):
            if raw:
                raw[dice.randrange(len(raw))] = dice.randrange(256)
        path.write_bytes(raw)
        try:
            _, report = import_files([path], tmp_path / "set", options)
            outcomes.add("bad" if report.skipped else "fine")
        except DataError as error:
            assert name in str(error) or "field" in str(error), error
            outcomes.add("refused")
    assert outcomes - {"fine"}
