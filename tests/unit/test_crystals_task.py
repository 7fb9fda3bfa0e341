"""Crystals as a task: graphs, networks, descriptors of the forest, a user's files."""

import json
import runpy
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from pymatgen.core import Lattice, Structure
from sklearn.model_selection import KFold

from dmi_hpc.config import TrainConfig
from dmi_hpc.data.importing.crystals import from_structure
from dmi_hpc.data.importing.structures import read_structures
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import DataError, RecipeError
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import cost
from dmi_hpc.models.spec import GraphConv, Residual, shapes
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.crystals import composition_density, read_vectors
from search.spaces.networks import Networks

NAME = "crystals"
SALT = Structure.from_spacegroup(
    "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5] * 3]
).get_primitive_structure()


def crystals(**options):
    return make_task({"name": NAME, **options})


def skewed(seed=0):
    """Three elements in a cell without symmetry: no two distances are equal."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*3 * [[0.0, 0.5]]), axis=-1).reshape(-1, 3)[:5]
    lattice = Lattice(np.eye(3) * 6 + rng.uniform(-0.5, 0.5, (3, 3)))
    return Structure(lattice, ["Na", "Cl", "O", "O", "Na"], grid + rng.uniform(0, 0.2, (5, 3)))


def written(folder, *structures):
    """JSON Lines of structures called a, b, ..."""
    path = folder / "some.jsonl"
    records = [
        {"id": n, "structure": s.as_dict()} for n, s in zip("abcde", structures, strict=False)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def fields_of(path, **options):
    return crystals(**options).read_inputs(path)[1]


def test_nodes_are_elements_and_edges_gaussians_of_the_distance(tmp_path):
    fields = fields_of(written(tmp_path, SALT))
    graphs = crystals().network_inputs(fields)
    assert graphs.nodes.shape == (2, 100)
    assert graphs.nodes.argmax(1).tolist() == [16, 10]  # Z - 1
    assert graphs.nodes.sum() == 2
    assert graphs.edges.shape == (24, 41)
    distance = fields["distance"].values[0]
    assert distance == pytest.approx(2.82)
    centres = np.arange(41) * 0.2
    expected = np.exp(-((distance - centres) ** 2) / 0.2**2)
    np.testing.assert_allclose(graphs.edges[0], expected, atol=1e-6)


def test_vectors_of_elements_come_from_a_file(tmp_path):
    table = {str(z): [z, z**2, 0.5] for z in range(1, 50)}
    path = tmp_path / "atom_init.json"
    path.write_text(json.dumps(table))
    task = crystals(atom_vectors=str(path))
    assert task.input_shape == (3, 30)
    graphs = task.network_inputs(fields_of(written(tmp_path, SALT)))
    assert graphs.nodes.tolist() == [[17, 289, 0.5], [11, 121, 0.5]]
    assert shapes(task.published_network())[-1] == (128,)


@pytest.mark.parametrize(
    "content",
    ["[1, 2]", "{", '{"1": [1], "2": [1, 2]}', '{"1": ["x"]}', '{"0": [1]}', '{"H": [1]}', "{}"],
)
def test_files_that_hold_no_vectors_are_refused(tmp_path, content):
    path = tmp_path / "vectors.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"vectors\.json: not a file of element vectors"):
        read_vectors(path)


def test_an_element_without_a_vector_is_named_with_its_row(tmp_path):
    path = tmp_path / "vectors.json"
    path.write_text(json.dumps({"11": [1.0], "17": [2.0]}))
    heavy = SALT.copy()
    heavy.replace(1, "I")
    fields = fields_of(written(tmp_path, SALT, heavy))
    with pytest.raises(DataError, match=r"row 1 of 2: atoms of Z = 53, .* knows 2 elements"):
        crystals(atom_vectors=str(path)).network_inputs(fields)
    beyond = SALT.copy()
    beyond.replace(0, "Lr")
    with pytest.raises(DataError, match=r"row 0 of 1: atoms of Z = 103, .* knows 100 elements"):
        crystals().network_inputs(fields_of(written(tmp_path, beyond)))


def test_the_published_network_has_the_parameters_of_the_authors_code(tmp_path):
    """Embedding 92-64, 3 x (169-128, norms of 128 and 64), 64-128-1."""
    path = tmp_path / "vectors.json"
    path.write_text(json.dumps({str(z): [0.0] * 92 for z in range(1, 101)}))
    network = crystals(atom_vectors=str(path)).published_network()
    convolution = 169 * 128 + 128 + 2 * 128 + 2 * 64
    expected = 92 * 64 + 64 + 3 * convolution + 64 * 128 + 128 + 128 + 1
    assert cost(network).parameters == expected == 80_833


def test_the_first_convolution_of_the_paper_shares_its_weights():
    layers = crystals(convolution="sum").published_network().layers
    assert [layer.op for layer in layers if isinstance(layer, GraphConv)] == ["sum"] * 3
    assert not any(isinstance(layer, Residual) for layer in layers)


def test_several_targets_are_several_outputs_of_one_network():
    task = crystals(targets={"log10_k": "log10(GPa)", "gap": "eV"}, log=["gap"])
    assert task.target_fields == ("log10_k", "gap")
    assert [(q.unit, q.transform) for q in task.quantities] == [
        ("log10(GPa)", "identity"),
        ("eV", "log"),
    ]
    assert task.published_network().outputs == task.space().network.outputs == 2
    assert (task.target_field, task.quantity) == ("log10_k", task.quantities[0])
    with pytest.raises(RecipeError, match="log names density, expected some of gap"):
        crystals(targets={"gap": "eV"}, log=["density"])


@pytest.mark.parametrize("convolution", ["gated", "sum"])
def test_a_crystal_is_the_same_turned_moved_renumbered_or_repeated(tmp_path, convolution):
    base = skewed()
    turned = base.copy()
    turned.apply_operation(_rotation())
    moved = base.copy()
    moved.translate_sites(range(5), [0.3, 0.7, 0.1])
    renumbered = Structure.from_sites([base[i] for i in (4, 2, 0, 3, 1)])
    repeated = base.make_supercell([2, 1, 1], in_place=False)
    task = crystals(convolution=convolution)
    torch.manual_seed(0)
    network = build(task.published_network()).eval()
    with torch.no_grad():
        others = (turned, moved, renumbered, repeated)
        found = [
            float(network(task.network_inputs(fields_of(written(tmp_path, s)))))
            for s in (base, *others, skewed(1))
        ]
    np.testing.assert_allclose(found[1:5], found[0], rtol=1e-4)
    assert found[5] != pytest.approx(found[0], rel=1e-3)


def _rotation():
    from pymatgen.core.operations import SymmOp

    return SymmOp.from_axis_angle_and_translation([1, 2, 3], 40)


def test_descriptors_of_the_forest(tmp_path):
    fields = fields_of(written(tmp_path, SALT, SALT.make_supercell(2, in_place=False)))
    found = composition_density(fields)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    assert found[0, [11, 17]].tolist() == [0.5, 0.5]
    mass, volume = (22.98977 + 35.453) / 2, 5.64**3 / 8
    assert found[0, -2:] == pytest.approx([volume, mass / volume], rel=1e-5)
    assert found[0, -3] == 2  # elements
    properties = found[0, 119:-3].reshape(4, -1)  # mean, deviation, least, largest
    assert properties[:, 0] == pytest.approx([2.045, 1.115, 0.93, 3.16])  # electronegativity
    assert np.isfinite(found).all()


def test_the_forest_learns_and_takes_molecules_too(tmp_path):
    """Without a cell there is no volume: it counts as zero."""
    numbers = Ragged.from_rows([np.array([6, 8]), np.array([1, 1]), np.array([2])] * 6)
    fields = {"atomic_number": numbers, "cell": np.zeros((18, 3, 3))}
    (forest,) = crystals(forest_trees=5).baselines()
    target = np.array([1.0, 2.0, 3.0] * 6)
    assert np.abs(forest.predict(fields, target, fields) - target).max() < 0.5


def test_files_of_users(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "salt.cif").write_text(SALT.to(fmt="cif"))
    (folder / "POSCAR").write_text(SALT.to(fmt="poscar"))
    (folder / "id_prop.csv").write_text("another,1.0\n")  # is not needed to predict
    names, fields = crystals().read_inputs(folder)
    assert names == ["POSCAR", "salt"]
    assert fields["atomic_number"].lengths.tolist() == [2, 2]
    assert fields["edge_index"].lengths.tolist() == [24, 24]
    (folder / "torn.cif").write_text(SALT.to(fmt="cif")[:200])
    (folder / "twice.vasp").write_text(
        Structure(Lattice.cubic(4), ["Na", "Na"], [[0, 0, 0], [0.01, 0, 0]]).to(fmt="poscar")
    )
    with pytest.raises(DataError, match="2 structures cannot be used") as error:
        crystals().read_inputs(folder)
    assert "torn.cif: not a readable CIF" in str(error.value)
    assert "twice.vasp: atoms 0 and 1 are on top of each other: 0.04 angstrom" in str(error.value)


def test_neighbours_are_found_as_the_options_say(tmp_path):
    path = written(tmp_path, SALT)
    near = fields_of(path, cutoff=3.0, max_neighbours=None)
    assert near["edge_index"].lengths.tolist() == [12]  # six of the other element, for each
    graphs = crystals(cutoff=3.0, max_neighbours=None).network_inputs(near)
    assert graphs.edges.shape == (12, 16)
    with pytest.raises(DataError, match=r"neighbours 3\.99 angstrom away, the task's cutoff is 3"):
        crystals(cutoff=3.0).network_inputs(fields_of(path))
    names, fields = read_structures(path, 8.0, 4)
    assert names == ["a"]
    assert fields["name"].tolist() == [b"a"]
    np.testing.assert_allclose(fields["cell"][0], from_structure(SALT).cell)


def test_the_space_begins_with_the_published_network():
    space = crystals().space()
    (genome,) = Networks(space, TrainConfig().model_dump()).founders()
    assert len(genome.graph.blocks) == 3
    assert (
        cost(space.founders[0].network).parameters
        == cost(crystals().published_network()).parameters
    )


def test_data_that_are_missing_say_how_to_import(tmp_path):
    wanted = r"--cutoff 8 --max-neighbours 12"
    with pytest.raises(DataError, match=wanted):
        crystals().build_data(tmp_path / "none", None)


@pytest.mark.parametrize(("target", "least"), [("e_form", 0.0215), ("gap", 0.1861), ("mine", None)])
def test_published_figures_are_those_of_the_target(target, least):
    figures = crystals(targets={target: "eV"}).published()
    assert min((figure.mae for figure in figures), default=None) == least


def test_published_figures_of_several_targets_name_them():
    labels = [f.label for f in crystals(targets={"gap": "eV", "log10_k": "log10(GPa)"}).published()]
    assert labels[0] == "gap: CGCNN"
    assert labels[-1] == "log10_k: Random forest"


SCRIPT = Path(__file__).parents[2] / "recipes" / "prepare" / "mp_structures.py"


def prepared(folder, monkeypatch, *options):
    """Records that the script writes of 40 structures: the primitive cell of salt, stretched."""
    n, unknown = 40, np.arange(40) % 4 == 0
    with h5py.File(folder / "mp.h5", "w") as file:
        a, b, c = SALT.lattice.abc
        lattices = np.array([[a + 0.01 * i, b, c, *SALT.lattice.angles] for i in range(n)])
        file["n_atoms"] = np.full(n, 2, dtype=np.uint16)
        file["lattice_abc_alpha_beta_gamma"] = lattices.astype(np.float32)
        file["Z"] = np.array([site.specie.Z for site in SALT] * n, dtype=np.uint8)
        file["frac_1e6"] = np.tile(SALT.frac_coords, (n, 1)).T.round(6) * 1e6
        for name in ("band_gap_eV", "e_form_eV_per_atom", "log10_K_VRH_GPa", "log10_G_VRH_GPa"):
            file[name] = np.arange(n, dtype=np.float32) / 10
        file["refractive_index"] = np.where(unknown, np.nan, 1.5).astype(np.float32)
    out = folder / "out.jsonl"
    monkeypatch.setattr(sys, "argv", ["x", str(folder / "mp.h5"), str(out), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_prepared_structures_are_those_of_the_file(tmp_path, monkeypatch):
    records = prepared(tmp_path, monkeypatch, "--with", "n", "--first", "3")
    assert [r["id"] for r in records] == [f"mb-mp-gap-{i:06d}" for i in (2, 3, 4)]
    assert [r["gap"] for r in records] == [0.1, 0.2, 0.3]
    names, fields = crystals().read_inputs(tmp_path / "out.jsonl")
    assert names == [r["id"] for r in records]
    expected = Structure(
        Lattice.from_parameters(SALT.lattice.a + 0.03, *SALT.lattice.abc[1:], *SALT.lattice.angles),
        SALT.species,
        SALT.frac_coords,
    )
    nearest = expected.get_all_neighbors(8.0)[0]
    wanted = sorted(neighbour.nn_distance for neighbour in nearest)[:12]
    np.testing.assert_allclose(fields["distance"][2][:12], wanted, atol=1e-4)


def test_prepared_folds_are_those_of_matbench(tmp_path, monkeypatch):
    records = prepared(tmp_path, monkeypatch, "--fold", "1", "--validation", "0.25")
    folds = list(KFold(5, shuffle=True, random_state=18012019).split(np.arange(40)))
    assert [i for i, r in enumerate(records) if r["split"] == "test"] == folds[1][1].tolist()
    assert sum(r["split"] == "validation" for r in records) == 8
    assert [r["n"] for r in records[:5]] == [None, 1.5, 1.5, 1.5, None]


def test_prepared_rows_are_drawn_at_random_by_seed(tmp_path, monkeypatch):
    drawn = {}
    for seed in ("0", "1"):
        (tmp_path / seed).mkdir()
        records = prepared(tmp_path / seed, monkeypatch, "--random", "10", "--seed", seed)
        drawn[seed] = [r["id"] for r in records]
        assert len(drawn[seed]) == 10
        assert drawn[seed] == sorted(drawn[seed])
    assert drawn["0"] != drawn["1"]
    (tmp_path / "2").mkdir()
    with pytest.raises(SystemExit, match="only 30 structures are left"):
        prepared(tmp_path / "2", monkeypatch, "--with", "n", "--random", "31")
