"""Atomic fingerprints: the same for what is the same crystal, different for what is another."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from pymatgen.core import Lattice, Structure
from scipy.spatial.transform import Rotation

from dmi_hpc.errors import DataError
from dmi_hpc.physics.fingerprints import CLOSEST, fingerprints, neighbours

SALT = Structure.from_spacegroup("Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3])
DIAMOND = Structure.from_spacegroup("Fd-3m", Lattice.cubic(3.57), ["C"], [[0, 0, 0]])
RUTILE = Structure.from_spacegroup(
    "P4_2/mnm", Lattice.tetragonal(4.59, 2.96), ["Ti", "O"], [[0, 0, 0], [0.305, 0.305, 0]]
)
ALL = {"salt": SALT, "diamond": DIAMOND, "rutile": RUTILE}


def skewed(seed=0):
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*3 * [[0.0, 0.5]]), axis=-1).reshape(-1, 3)[:5]
    return np.eye(3) * 6 + rng.uniform(-0.5, 0.5, (3, 3)), grid + rng.uniform(0, 0.2, (5, 3))


def of(cell, fractions, sites=None):
    sites = np.arange(len(fractions)) if sites is None else np.asarray(sites)
    return fingerprints(np.asarray(cell), np.asarray(fractions), sites).astype(int)


def of_structure(structure):
    return of(structure.lattice.matrix, structure.frac_coords)


def test_twelve_views_of_sixteen_pixels_a_side():
    found = fingerprints(SALT.lattice.matrix, SALT.frac_coords, np.array([0, 3, 7]))
    assert found.shape == (3, 12, 16, 16)
    assert found.dtype == np.uint8
    assert 100 < found.max() <= 255
    # nothing of a view is cut off: neighbours fade towards the reach
    assert found[..., [0, -1], :].max() < 30


@pytest.mark.parametrize("case", range(3))
def test_turned_mirrored_blown_up_and_relabelled_crystals_look_the_same(case):
    cell, fractions = skewed(case)
    plain = of(cell, fractions)
    turn = Rotation.random(random_state=case).as_matrix()
    order = np.random.default_rng(case).permutation(5)
    sheared = np.array([[1.0, 0, 0], [1, 1, 0], [0, 2, 1]])
    twice = np.concatenate([fractions, fractions + np.eye(3)[0]]) / [2, 1, 1]
    others = {
        "turned": of(cell @ turn, fractions),
        "mirrored": of(cell @ (turn * [1, 1, -1]), fractions),
        "blown up": of(3.7 * cell, fractions),
        "another origin": of(cell, fractions + np.array([0.3, -1.2, 0.45])),
        "another cell": of(sheared @ cell, fractions @ np.linalg.inv(sheared)),
        "twice the cell": of([[2], [1], [1]] * cell, twice)[:5],
        "other numbers": of(cell, fractions[order])[np.argsort(order)],
    }
    for what, found in others.items():
        assert np.abs(found - plain).max() <= 1, what
    assert np.abs(plain[0] - plain[1]).max() > 50  # sites of one crystal differ


@pytest.mark.parametrize("name", ALL)
def test_equivalent_atoms_look_the_same(name):
    structure = ALL[name]
    found = of_structure(structure)
    for symbol in set(structure.symbol_set):
        same = found[[site.specie.symbol == symbol for site in structure]]
        assert np.abs(same - same[0]).max() <= 1, symbol


def test_elements_are_not_seen_but_surroundings_are():
    salt, diamond, rutile = map(of_structure, ALL.values())
    # both kinds of atoms of rock salt stand in the same surroundings
    assert np.abs(salt - salt[0]).max() <= 1
    assert np.abs(salt[0] - diamond[0]).mean() > 5
    assert np.abs(rutile[0] - rutile[-1]).mean() > 5


def test_small_displacements_change_little():
    moved = RUTILE.copy()
    moved.translate_sites([3], [0.001, 0, 0])
    before, after = (of(s.lattice.matrix, s.frac_coords, [3])[0] for s in (RUTILE, moved))
    assert 0 < np.abs(after - before).max() <= 6


def test_a_neighbour_is_brighter_the_nearer_it_is():
    """Of two atoms in a long cell: weight and place of a Gaussian follow the distance."""
    places = neighbours(np.diag([1.0, 1.0, 1.0]), np.array([[0.0, 0, 0]]), np.array([0]))[0]
    distance = np.linalg.norm(places, axis=1)
    assert (distance[:6] == pytest.approx(1.0)) and distance[6] == pytest.approx(2**0.5)
    assert (np.diff(distance) > -1e-9).all()


@pytest.mark.parametrize(
    ("cell", "fractions", "said"),
    [
        (np.diag([4.0, 4, 4]), [[0, 0, 0], [0.02, 0, 0]], f"[12] and [12] are.*at least {CLOSEST}"),
        ([[4.0, 0, 0], [8, 0, 0], [0, 0, 4]], [[0, 0, 0]], "cell without volume"),
        (np.diag([400.0, 5, 400]), [[0, 0, 0], [0.5, 0.5, 0.5]], "mostly empty"),
    ],
)
def test_structures_that_cannot_be_drawn_say_why(cell, fractions, said):
    with pytest.raises(DataError, match=said):
        of(cell, fractions)


def test_prepared_sites_are_the_distinct_ones(tmp_path):
    """Of rock salt and rutile two sites each; a structure with one atom twice is told."""
    broken = Structure(Lattice.cubic(5), ["Na", "Cl"], [[0, 0, 0], [0.01, 0, 0]])
    structures = [SALT, RUTILE, broken]
    source, out = tmp_path / "mp.h5", tmp_path / "sites.h5"
    with h5py.File(source, "w") as file:
        file["n_atoms"] = [len(s) for s in structures]
        file["Z"] = np.concatenate([s.atomic_numbers for s in structures]).astype(np.uint8)
        file["frac_1e6"] = np.rint(np.concatenate([s.frac_coords for s in structures]).T * 1e6)
        file["lattice_abc_alpha_beta_gamma"] = [s.lattice.parameters for s in structures]
    script = Path(__file__).parents[2] / "recipes" / "prepare" / "sites.py"
    command = [sys.executable, str(script), str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "left out mb-mp-gap-000003: atoms" in done.stderr
    with h5py.File(out) as file:
        assert file["formula"][:].tolist() == [b"NaCl"] * 2 + [b"TiO2"] * 2
        assert sorted(file["element"][:2]) == [10, 16]
        assert file["atoms"][:].tolist() == [4, 4, 2, 4]
        assert file["template"][0] == b"225:a.b"
        assert file["fingerprint"].shape == (4, 12, 16, 16)
        np.testing.assert_array_equal(
            file["fingerprint"][0],
            fingerprints(SALT.lattice.matrix, SALT.frac_coords, np.array([0]))[0],
        )
