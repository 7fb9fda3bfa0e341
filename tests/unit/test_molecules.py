"""CheMixNet and MPNN: what they make of molecules, their networks, and trainings of both."""

import numpy as np
import pytest
import torch
from silent import Silent

from dmi_hpc.config import TrainConfig
from dmi_hpc.data.importing.molecules import columns_of, features_of, parse_smiles
from dmi_hpc.data.importing.options import ImportOptions
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.data.ragged import Ragged
from dmi_hpc.errors import DataError, RecipeError
from dmi_hpc.job import Job
from dmi_hpc.models.build import build
from dmi_hpc.models.spec import shapes
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.train import fit
from dmi_hpc.world import World
from search.spaces.networks import Networks

pytest.importorskip("rdkit", reason="the extra 'molecules' is not installed")

BRANCHES = ("mixed-cnn", "mixed-rnn", "cnn", "rnn", "fingerprint")


def chemixnet(**options):
    return make_task({"name": "dmi_hpc.tasks.chemixnet:CheMixNet", "length": 16, **options})


def mpnn(**options):
    return make_task({"name": "dmi_hpc.tasks.mpnn:MPNN", **options})


def fields(*smiles):
    """As a data loader gives them: ends of bonds numbered over all rows."""
    found = columns_of([features_of(parse_smiles(text)) for text in smiles])
    ends, starts = found["edge_index"], found["atomic_number"].offsets[:-1]
    shifted = ends.values + np.repeat(starts, ends.lengths)[:, None]
    return {**found, "edge_index": Ragged(shifted, ends.offsets)}


def texts(inputs, length=16):
    """The SMILES that the last columns stand for."""
    return [(row[row > 0].astype(np.uint8) + 32).tobytes().decode() for row in inputs[:, -length:]]


def test_characters_end_at_the_end_and_follow_the_fingerprint():
    task = chemixnet()
    inputs = task.network_inputs(fields("CCO", "C"))
    assert inputs.shape == (2, 167 + 16)
    assert inputs.dtype == np.float32
    assert texts(inputs) == ["CCO", "C"]
    assert (inputs[0, 167:180] == 0).all()
    assert inputs[0, 180] == ord("C") - 32
    assert (inputs[:, :167] == fields("CCO", "C")["maccs"]).all()
    assert chemixnet(branches="rnn").network_inputs(fields("CCO")).shape == (1, 16)
    bits = chemixnet(branches="fingerprint", fingerprint="morgan").network_inputs(fields("CCO"))
    assert (bits == fields("CCO")["morgan"]).all()


def test_longer_smiles_are_an_error_unless_they_may_be_cut():
    long = fields("C" * 20 + "O", "CN")
    with pytest.raises(DataError, match=r"SMILES of 21 characters.*reads 16: set length = 21"):
        chemixnet().network_inputs(long)
    assert texts(chemixnet(truncate=True).network_inputs(long)) == ["C" * 16, "CN"]


def test_codes_that_are_no_characters_are_refused():
    wrong = {**fields("CC"), "characters": Ragged(np.array([7, 67], np.uint8), np.array([0, 2]))}
    with pytest.raises(DataError, match="found codes 7 to 67"):
        chemixnet().network_inputs(wrong)


def test_augmentation_writes_molecules_in_another_way():
    smiles = ["CC(N)C(=O)O"] * 30 + ["C"]
    task = chemixnet(random_smiles=True)
    inputs = task.network_inputs(fields(*smiles))
    bits = np.random.default_rng(0).integers(0, 2**63, len(smiles)).astype(np.uint64)
    changed = task.augment(inputs, bits)
    found = texts(changed)
    assert len(set(found)) > 8
    assert {features_of(parse_smiles(text))["characters"].tobytes() for text in found} == {
        *(b"CC(N)C(=O)O", b"C")
    }
    assert (changed[:, :167] == inputs[:, :167]).all()
    assert (task.augment(inputs, bits) == changed).all()
    assert texts(inputs)[0] == "CC(N)C(=O)O", "its input is as it was"
    assert chemixnet().augment(inputs, bits) is inputs, "the published network has none"
    cut = chemixnet(random_smiles=True, truncate=True, length=8)
    short = cut.network_inputs(fields("CC(N)C(=O)O"))
    assert (cut.augment(short, bits[:1]) == short).all(), "what is cut off cannot be written anew"


@pytest.mark.parametrize("branches", BRANCHES)
def test_networks_of_all_branches_give_one_number(branches):
    task = chemixnet(branches=branches)
    network = build(task.published_network()).eval()
    inputs = torch.from_numpy(task.network_inputs(fields("CCO", "c1ccccc1", "C")))
    found = network(inputs)
    assert found.shape == (3, 1)
    assert len(set(found.flatten().tolist())) == 3


def test_a_search_knows_the_fingerprint_branch_alone():
    assert chemixnet(branches="fingerprint").space().network.input_shape == (167,)
    with pytest.raises(RecipeError, match='Set branches = "fingerprint"'):
        chemixnet().space()


def test_graphs_of_atoms_and_bonds():
    graphs = mpnn().network_inputs(fields("C", "CC=O", "[Na+].[Cl-]", "C[Se]C"))
    assert graphs.sizes.tolist() == [1, 3, 2, 3]
    assert graphs.edge_offsets.tolist() == [0, 0, 4, 4, 8]
    nodes, edges = graphs.nodes.numpy(), graphs.edges.numpy()
    assert nodes[:, 13:36].sum(axis=1).tolist() == [4.0] * 9, "four features are one of a few"
    assert (nodes[:, :13].sum(axis=1) == 1).all()
    assert nodes[7, 12] == 1, "selenium is one of the others"
    assert nodes[4:6, 36].tolist() == [1.0, -1.0]
    assert edges[:, :5].argmax(axis=1).tolist() == [0, 1, 0, 1, 0, 0, 0, 0]


def test_mpnn_does_not_know_the_order_of_atoms_and_takes_single_ones():
    torch.manual_seed(0)
    task = mpnn(units=16)
    network = build(task.published_network()).eval()
    one, other = fields("OCC(N)=C", "C"), fields("C=C(N)CO", "C")
    found = [network(task.network_inputs(f)).detach().numpy() for f in (one, other)]
    assert np.allclose(*found, atol=1e-5)
    alone = network(task.network_inputs(fields("C")))
    assert np.allclose(alone.detach().numpy(), found[0][1], atol=1e-5)
    assert np.isfinite(found).all()


def test_the_spaces_begin_with_their_founders():
    for task in (mpnn(), chemixnet(branches="fingerprint")):
        space = task.space()
        assert len(Networks(space, TrainConfig().model_dump()).founders()) == 1
        shapes(space.founders[0].network)


def table(tmp_path, target=float):
    """Alkanes, alcohols and amines; the value falls with the chain. target: what is told of it."""
    ends = {"": -1.0, "O": 0.0, "N": 0.5}
    text = "smiles,target\n"
    for n in range(1, 25):
        for end, shift in ends.items():
            text += f"{'C' * n}{end},{target(shift - 0.2 * n)}\n"
    (tmp_path / "in.csv").write_text(text)
    options = ImportOptions(validation=0.2, test=0.2, unit="1", seed=3)
    import_files([tmp_path / "in.csv"], tmp_path / "set", options)
    return tmp_path / "set"


def trained(data, task, rate, epochs):
    config = TrainConfig(epochs=epochs, batch_size=8, learning_rate=rate, engine="torch", threads=1)
    problem = Problem.open(task, data)
    spec = task.published_network()
    return fit(Job(problem, spec, config, 0, World()), Silent(), resume=False, warn=print), problem


@pytest.mark.parametrize(
    ("task", "rate", "epochs"),
    [
        (chemixnet(length=40, random_smiles=True, dropout=0.0, forest_trees=20), 5e-3, 12),
        (mpnn(units=64, readout="sum", forest_trees=20), 5e-4, 30),
    ],
    ids=["chemixnet", "mpnn"],
)
def test_trainings_learn_and_forests_stand_beside(tmp_path, task, rate, epochs):
    result, problem = trained(table(tmp_path), task, rate, epochs)
    fields, truth = problem.split("validation")
    mean = np.abs(truth - problem.split("train")[1].mean()).mean()
    assert result.best_error < 0.5 * mean
    for baseline in task.baselines():
        found = baseline.predict(*problem.split("train"), fields)
        assert np.abs(found - truth).mean() < mean


def test_probabilities_of_a_property(tmp_path):
    data = table(tmp_path, lambda value: int(value > -3))
    task = chemixnet(length=40, classification=True, forest_trees=20)
    result, problem = trained(data, task, 5e-3, 8)
    assert result.best_error < 0.2, "1 - AUC"
    for baseline in task.baselines():
        found = baseline.predict(*problem.split("train"), problem.split("test")[0])
        assert found.min() >= 0
        assert found.max() <= 1


def test_files_of_users(tmp_path):
    path = tmp_path / "new.csv"
    path.write_text("smiles,name\nCCO,ethanol\nC,methane\n")
    for task in (chemixnet(), mpnn()):
        labels, found = task.read_inputs(path)
        assert labels == ["CCO", "C"]
        assert sorted(found) == sorted(task.input_fields)
        assert len(task.network_inputs(fields("CCO", "C"))) == 2


def test_data_that_are_missing_say_how_to_import(tmp_path):
    with pytest.raises(DataError, match=r"dmi data import FILE\.csv --as molecule"):
        mpnn().build_data(tmp_path / "none", None)
