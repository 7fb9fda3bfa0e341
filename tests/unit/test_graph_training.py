"""Crystals from a file to a trained network of graphs: import, training, prediction, export."""

import ase
import ase.io
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from silent import Silent

from dmi_hpc.config import TrainConfig
from dmi_hpc.data.importing.options import ROW, ImportOptions
from dmi_hpc.data.importing.run import import_files
from dmi_hpc.errors import DataError, RunError
from dmi_hpc.evaluate import Predictor
from dmi_hpc.export import export, load_export
from dmi_hpc.job import Job
from dmi_hpc.models.build import build
from dmi_hpc.models.spec import (
    Activation,
    Dense,
    GraphConv,
    GraphReadout,
    NetworkSpec,
    Norm,
    Residual,
)
from dmi_hpc.predict import Model
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.train import fit
from dmi_hpc.world import World

CONFIG = TrainConfig(
    epochs=15, batch_size=16, learning_rate=1e-2, engine="torch", threads=1, patience=None
)
TASK = {
    "name": "crystals",
    "targets": {"energy": "eV"},
    "cutoff": 2.5,
    "max_neighbours": 4,
    "step": 0.25,
    "nodes": 3,
}
GRID = np.stack(np.meshgrid(*3 * [[0.0, 1.2, 2.4]]), axis=-1).reshape(-1, 3)
BLOCK = (Residual(layers=(GraphConv(channels=8, norm="batch"), Norm())), Activation())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Clusters of one to five atoms; the energy is the sum of 1 / distance over pairs in reach."""
    folder, rng, frames = tmp_path_factory.mktemp("clusters"), np.random.default_rng(0), []
    for i in range(160):
        n = 1 + i % 5
        places = GRID[rng.choice(len(GRID), n, replace=False)] + rng.uniform(0, 0.6, (n, 3))
        atoms = ase.Atoms(rng.choice(["H", "C", "O"], n), places)
        distances = atoms.get_all_distances()[np.triu_indices(n, 1)]
        energy = float((1 / (0.5 + distances[distances < 2.5])).sum())
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
        frames.append(atoms)
    ase.io.write(folder / "all.xyz", frames, format="extxyz")
    options = ImportOptions(cutoff=2.5, max_neighbours=4, group=ROW)
    import_files([folder / "all.xyz"], folder / "set", options)
    return folder / "set"


def problem_of(data):
    return Problem.open(make_task(TASK), data)


def network_of(problem):
    layers = (Dense(units=8), *BLOCK, *BLOCK, GraphReadout(op="sum"), Dense(units=8), Activation())
    task = problem.task
    return NetworkSpec(input_shape=task.input_shape, layers=layers, graph=task.graph)


def job_of(data, **changes):
    problem = problem_of(data)
    config = CONFIG.model_copy(update=changes)
    return Job(problem, network_of(problem), config, seed=1)


def model_of(data):
    problem = problem_of(data)
    torch.manual_seed(0)
    network = network_of(problem)
    parts = (problem.task, problem.scale, build(network), 7, network, "checkpoint", "", {})
    return problem, Model(*parts)


def test_training_learns_energies_better_than_the_mean_does(data):
    job = job_of(data, epochs=50)
    result = fit(job, Silent(), resume=False, warn=print)
    _, train = job.problem.split("train")
    _, truth = job.problem.split("validation")
    assert result.best_error < 0.5 * np.abs(truth - train.mean()).mean()


def test_micro_batches_of_graphs_are_the_same_training(data):
    """Without batch statistics; sums in another order differ by rounding alone."""
    problem = problem_of(data)
    layers = (Dense(units=8), GraphConv(channels=8), Activation(), GraphReadout())
    network = NetworkSpec(
        input_shape=problem.task.input_shape, layers=layers, graph=problem.task.graph
    )
    found = []
    for accumulation in (1, 3):
        config = CONFIG.model_copy(update={"accumulation": accumulation, "epochs": 2})
        job = Job(problem, network, config, seed=1)
        found.append(fit(job, Silent(), resume=False, warn=print).best_error)
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_predictions_do_not_depend_on_how_rows_come_in(data):
    """From the shards in batches, from fields in memory row by row."""
    problem, model = model_of(data)
    rows = problem.shards.rows("validation")
    parts = list(Predictor.of_rows(model, problem.shards, rows, World()))
    loaded = np.concatenate([part.values for part in parts])
    given = model.of_fields(problem.shards.fields(problem.task.input_fields, rows))
    np.testing.assert_allclose(given, loaded, rtol=1e-5, atol=1e-6)


def test_an_export_to_safetensors_reads_back_and_others_are_refused(data, tmp_path):
    _, model = model_of(data)
    export(model, tmp_path / "out", "safetensors")
    spec, module = load_export(tmp_path / "out")
    assert spec.network == model.network
    assert all(
        torch.equal(a, b)
        for a, b in zip(module.parameters(), model.module.parameters(), strict=True)
    )
    assert "Graphs of n graphs" in (tmp_path / "out" / "README.txt").read_text()
    with pytest.raises(RunError, match="cannot be exported as onnx yet: choose safetensors"):
        export(model, tmp_path / "other", "onnx")


def test_inputs_that_are_no_graphs_of_the_task_are_refused(data, monkeypatch):
    problem = problem_of(data)
    task, fields = problem.task, problem.shards.fields(problem.task.input_fields, np.array([0]))
    monkeypatch.setattr(type(task), "inputs", lambda self, fields: np.zeros((1, 3), np.float32))
    with pytest.raises(DataError, match=r"expected graphs of 100, 11 features, found \(1, 3\)"):
        task.network_inputs(fields)
