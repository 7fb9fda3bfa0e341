"""Inherited weights are judged by their errors before they are trained."""

from dataclasses import replace

import pytest
import torch
from runner import toy_data, toy_recipe

from dmi_hpc import checkpoint
from dmi_hpc.config import load_recipe
from dmi_hpc.job import Job
from dmi_hpc.models.spec import Activation, Dense, NetworkSpec
from dmi_hpc.problem import Problem
from dmi_hpc.tasks import make_task
from dmi_hpc.train import fit
from search.records.kept import Origin, Trained
from search.trials.ending import Deadline
from search.trials.heritage import beginning_with, heritage, shortened


def network(*units):
    layers = [layer for n in units for layer in (Dense(units=n), Activation())]
    return NetworkSpec(input_shape=(8,), layers=tuple(layers))


def fitted(job):
    return fit(job, Deadline(None), resume=False, warn=pytest.fail)


def changed(job, **changes):
    return replace(job, config=job.config.model_copy(update=changes))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    recipe = load_recipe(toy_recipe(folder / "toy.toml", toy_data(folder / "data")))
    problem = Problem.open(make_task(recipe.task), folder / "data", reading=recipe.data)
    return Job(problem, network(16), recipe.train, seed=3)


@pytest.fixture(scope="module")
def parent(job, tmp_path_factory):
    """Trained until it errs half as much as a new network."""
    folder = tmp_path_factory.mktemp("parent")
    result = fitted(replace(changed(job, epochs=40), checkpoints=folder))
    path, _ = checkpoint.best(folder, pytest.fail)
    return Trained(job.network, checkpoint.read_weights(path), 40.0, result.best_error)


def test_of_an_equal_network_all_is_taken(job, parent):
    found = heritage(job, [(7, parent)], 9)
    assert found.origin == Origin(parent=7, share=1.0, epochs=40.0)
    assert all(torch.equal(found.weights[name], parent.weights[name]) for name in parent.weights)


def test_the_training_begins_with_them(job, parent, tmp_path):
    found = heritage(job, [(7, parent)], 9)
    unmoved = changed(job, epochs=1, learning_rate=1e-12)
    begun = fitted(beginning_with(unmoved, found.weights, tmp_path))
    assert begun.best_error == pytest.approx(parent.error, rel=1e-4)
    assert fitted(unmoved).best_error > 1.5 * parent.error


def test_weights_that_err_like_a_new_network_are_left(job, parent):
    shuffled = {name: tensor.flip(0).clone() for name, tensor in parent.weights.items()}
    shuffled["0.weight"] = shuffled["0.weight"].flip(1)
    assert heritage(job, [(7, replace(parent, weights=shuffled))], 9) is None


def test_what_a_network_may_err_depends_on_its_parent(job, parent):
    def taken(share):
        return heritage(job, [(7, replace(parent, error=share * parent.error))], 9) is not None

    assert [taken(share) for share in (1.0, 0.9, 0.1)] == [True, True, False]


def test_weights_that_are_not_finite_are_left(job, parent):
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in parent.weights.items()}
    assert heritage(job, [(7, replace(parent, weights=broken))], 9) is None
    assert heritage(job, [(5, replace(parent, weights=broken)), (7, parent)], 9).origin.parent == 7


def test_without_parents_there_is_nothing(job):
    assert heritage(job, [], 9) is None


def test_the_network_that_keeps_the_function_is_taken(job, parent):
    narrow = replace(parent, network=network(4), weights=cut(parent.weights, 4))
    wider = replace(job, network=network(24))
    for parents in ([(1, narrow), (2, parent)], [(2, parent), (1, narrow)]):
        assert heritage(wider, parents, 9).origin.parent == 2


def cut(weights, units):
    """Of a layer and the head the first units."""
    return {
        name: tensor[:units]
        if name.startswith("0.")
        else tensor[:, :units]
        if tensor.ndim > 1
        else tensor
        for name, tensor in weights.items()
    }


@pytest.mark.parametrize(("epochs", "expected"), [(12, 6), (5, 3), (1, 1)])
def test_a_child_that_inherits_is_trained_half_as_long(job, epochs, expected):
    assert shortened(changed(job, epochs=epochs)).config.epochs == expected
