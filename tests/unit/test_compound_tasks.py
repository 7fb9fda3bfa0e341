"""Tasks on compositions and on configurations of atoms: from files to trained networks."""

import csv
import json
from dataclasses import replace

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.build import bulk
from ase.calculators.lj import LennardJones
from runner import dmi
from silent import Silent

from dmi_hpc.assess import assess
from dmi_hpc.config import TrainConfig
from dmi_hpc.data.importing.options import ROW, ImportOptions
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.data.periodic import PROPERTIES, periodic_table
from dmi_hpc.ensemble import Calibration, save_ensemble
from dmi_hpc.errors import DataError, RecipeError
from dmi_hpc.evaluate import evaluate_rows
from dmi_hpc.job import Job
from dmi_hpc.models.build import build
from dmi_hpc.predict import Model, load
from dmi_hpc.problem import Problem
from dmi_hpc.run import open_run
from dmi_hpc.tasks import make_task
from dmi_hpc.tasks.roost import all_pairs
from dmi_hpc.train import fit
from dmi_hpc.world import World

CONFIG = TrainConfig(epochs=12, batch_size=8, learning_rate=5e-3, engine="torch", threads=1)


def test_a_graph_has_each_element_once_and_all_pairs():
    task = make_task({"name": "roost"})
    fractions = np.zeros((3, 86), dtype=np.float32)
    fractions[0, [0, 6]] = 2 / 3, 1 / 3  # H2O
    fractions[1, 20] = 1.0
    fractions[2, [3, 5, 80]] = 0.25, 0.25, 0.5
    graphs = task.inputs({"fractions": fractions})
    assert graphs.node_offsets.tolist() == [0, 2, 3, 6]
    assert graphs.edge_offsets.tolist() == [0, 2, 3, 9]
    pairs = graphs.ends.tolist()
    assert pairs[:3] == [[0, 1], [1, 0], [2, 2]]
    assert sorted(pairs[3:]) == [[i, j] for i in (3, 4, 5) for j in (3, 4, 5) if i != j]
    assert graphs.nodes[:, :86].argmax(1).tolist() == [0, 6, 20, 3, 5, 80]
    torch.testing.assert_close(graphs.weights[:, 0], graphs.nodes[:, 86])
    assert graphs.weights[3:, 0].tolist() == [0.25, 0.25, 0.5]


def test_pairs_of_no_graphs_are_none():
    assert all_pairs(np.array([0])).shape == (0, 2)


def test_what_is_predicted_does_not_depend_on_the_other_compounds():
    task = make_task({"name": "roost"})
    network = build(task.published_network()).eval()
    fractions = np.random.default_rng(0).dirichlet(np.full(86, 0.02), 20).astype(np.float32)
    fractions[fractions < 0.05] = 0
    together = network(task.inputs({"fractions": fractions}))
    alone = torch.cat([network(task.inputs({"fractions": row[None]})) for row in fractions])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_a_network_of_compositions_learns(tmp_path):
    table, rng = tmp_path / "table.csv", np.random.default_rng(1)
    symbols, charge = ["Li", "Na", "Mg", "Al", "O", "S", "Cl"], [1, 1, 2, 3, -2, -2, -1]
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["formula", "target"])
        for _ in range(300):
            chosen, amounts = rng.permutation(7)[:3], rng.integers(1, 5, 3)
            value = np.dot(amounts, [charge[i] for i in chosen]) ** 2 / amounts.sum() ** 2
            formula = "".join(f"{symbols[i]}{a}" for i, a in zip(chosen, amounts, strict=True))
            writer.writerow([formula, value])
    import_files([table], tmp_path / "set", ImportOptions(processes=1, seed=3))
    task = make_task({"name": "roost"})
    problem = Problem.open(task, tmp_path / "set")
    config = CONFIG.model_copy(update={"batch_size": 16, "learning_rate": 2e-3})
    result = fit(
        Job(problem, task.published_network(), config, 0), Silent(), resume=False, warn=print
    )
    (train, test), truth = (problem.split(name) for name in ("train", "test")), None
    truth = test[1]
    assert result.best_error < 0.4 * np.abs(problem.split("validation")[1] - train[1].mean()).mean()
    for baseline in task.baselines():
        found = baseline.predict(train[0], train[1], test[0])
        assert np.abs(found - truth).mean() < np.abs(truth - train[1].mean()).mean()


def test_the_table_of_elements_is_whole():
    table = periodic_table()
    assert table.values.shape == (86, len(PROPERTIES))
    assert np.isfinite(table.values).all()
    assert table.values[0, 0] == 1


# energies and forces


@pytest.fixture(scope="module")
def atoms(tmp_path_factory):
    """60 configurations of argon, shaken; the last one is a cell of one atom."""
    folder, rng = tmp_path_factory.mktemp("argon"), np.random.default_rng(2)
    frames = []
    for number in range(60):
        cell = bulk("Ar", cubic=True) * (2, 1, 1) if number < 59 else bulk("Ar")
        cell.set_cell(cell.cell * rng.uniform(0.95, 1.05), scale_atoms=True)
        cell.rattle(0.25, rng=rng)
        cell.calc = LennardJones(sigma=3.4, epsilon=0.05, rc=5.5, smooth=True)
        frame = ase.Atoms(cell.numbers, cell.positions, cell=cell.cell, pbc=True)
        frame.info["energy_per_atom"] = cell.get_potential_energy() / len(cell)
        frame.arrays["forces"] = cell.get_forces()
        frames.append(frame)
    ase.io.write(folder / "argon.xyz", frames, format="extxyz")
    options = ImportOptions(cutoff=5.5, group=ROW, validation=0.2, test=0.2, seed=1, processes=1)
    import_files([folder / "argon.xyz"], folder / "set", options)
    return folder / "set"


def potential(path, **options):
    task = make_task({"name": "schnet", "cutoff": 5.5, "gaussians": 20, "channels": 16, **options})
    return Problem.open(task, path)


def test_energies_and_forces_are_learnt_together(atoms):
    problem = potential(atoms)
    task = problem.task
    assert task.measure == ("MAE + force MAE", "eV/atom")
    job = Job(problem, task.published_network(), CONFIG, 0)
    curve = []

    class Curve(Silent):
        def on_epoch(self, epoch):
            curve.append(epoch)

    fit(job, Curve(), resume=False, warn=print)
    fields = problem.shards.fields(("forces",), problem.shards.rows("validation"))
    size = np.abs(fields["forces"].values).mean()
    assert curve[-1].validation_force_mae < 0.6 * size
    last = curve[-1]
    assert last.validation_error == last.validation_mae + last.validation_force_mae


def test_scores_of_forces_count_each_atom_once(atoms):
    problem = potential(atoms)
    network = build(problem.task.published_network()).eval()
    rows = np.asarray(problem.shards.rows("all"))
    found = evaluate_rows(problem, network, rows, 7, World())
    names, errors = (*problem.task.input_fields, "forces"), []
    for row in rows:
        graphs = problem.task.inputs(problem.shards.fields(names, row[None]))
        errors.append((problem.scale.std * network(graphs).forces - graphs.forces).abs())
    error = torch.cat(errors)
    assert found.force_mae == pytest.approx(float(error.mean()), rel=1e-4)
    assert found.force_rmse == pytest.approx(float(error.square().mean().sqrt()), rel=1e-4)


def test_energies_alone_need_no_forces(atoms):
    problem = potential(atoms, forces="")
    assert problem.fields == (*problem.task.input_fields, "energy_per_atom")
    network = problem.task.published_network()
    assert not network.forces
    result = fit(Job(problem, network, CONFIG, 0), Silent(), resume=False, warn=print)
    train, test = problem.split("train"), problem.split("validation")
    assert result.best_error < np.abs(test[1] - train[1].mean()).mean()


def test_an_ensemble_of_potentials_is_exported_and_predicts_the_mean(atoms, tmp_path):
    problem = potential(atoms)
    task, network = problem.task, problem.task.published_network()
    members = {}
    for seed in (1, 2):
        torch.manual_seed(seed)
        about = (build(network).eval(), 4, network, f"step-{seed}", "abc", {})
        members[f"m{seed}"] = Model(task, problem.scale, *about)
    save_ensemble(tmp_path / "ensemble", members, Calibration(), {})
    ensemble, rows = load(tmp_path / "ensemble", device="cpu"), np.arange(4)
    found = next(iter(ensemble.of_rows(problem.shards, rows, World())))
    each = [next(iter(m.of_rows(problem.shards, rows, World()))) for m in members.values()]
    np.testing.assert_allclose(found.values, np.mean([e.values for e in each], 0), rtol=1e-5)
    forces = np.mean([e.forces for e in each], 0)
    np.testing.assert_allclose(found.forces, forces, atol=1e-5)
    fields = problem.shards.fields(task.input_fields, rows)
    np.testing.assert_allclose(ensemble.predict(fields), found.values, rtol=1e-5)


def test_micro_batches_of_forces_are_the_same_training(atoms):
    problem = potential(atoms)
    network, errors = problem.task.published_network(), []
    for accumulation in (1, 3):
        config = CONFIG.model_copy(update={"epochs": 2, "accumulation": accumulation})
        job = Job(problem, network, config, 0)
        errors.append(fit(job, Silent(), resume=False, warn=print).best_error)
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_a_run_of_forces_from_recipe_to_report(atoms, tmp_path):
    recipe = tmp_path / "argon.toml"
    recipe.write_text(
        '[task]\nname = "schnet"\ncutoff = 5.5\nchannels = 8\ngaussians = 12\n'
        f'[data]\npath = "{atoms}"\n'
        "[train]\nepochs = 2\nbatch_size = 8\nthreads = 1\n[launch]\nranks = 1\n"
    )
    run = tmp_path / "run"
    dmi("launch", "all", recipe, "--out", run, cwd=tmp_path)
    method, baseline = json.loads((run / "evaluation.json").read_text())["methods"]
    assert method["force_mae"] > 0
    assert "force_mae" not in baseline
    page = (run / "report.html").read_text()
    assert "forces MAE" in page
    assert assess(open_run(run), "validation", network_only=True)["rows"] > 5


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation_checkpointing": True}, "activations cannot be computed twice yet"),
        ({"engine": "deepspeed", "zero_stage": 3}, "needs its weights whole: choose 0, 1 or 2"),
    ],
)
def test_what_networks_of_forces_cannot_have_is_refused(atoms, changes, said):
    problem = potential(atoms)
    job = Job(problem, problem.task.published_network(), CONFIG.model_copy(update=changes), 0)
    with pytest.raises(RecipeError, match=said):
        fit(job, Silent(), resume=False, warn=print)


def test_configurations_of_unknown_elements_are_refused(atoms):
    problem = potential(atoms)
    fields = problem.shards.fields(problem.task.input_fields, np.array([0]))
    numbers = fields["atomic_number"]
    strange = {**fields, "atomic_number": replace(numbers, values=numbers.values + 100)}
    with pytest.raises(DataError, match="Z = 118: expected at most 100"):
        problem.task.inputs(strange)
