"""Energies and forces: invariances, finite differences, and what a training needs of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call

from dmi_hpc.errors import NetworkError
from dmi_hpc.models.build import build
from dmi_hpc.models.cost import cost, training_flops
from dmi_hpc.models.graphs import EnergyForces, Graphs, nominal_graphs
from dmi_hpc.models.space import NetworkSpace
from dmi_hpc.models.spec import (
    Activation,
    CFConv,
    Dense,
    GraphConv,
    GraphInput,
    GraphReadout,
    MessagePassing,
    NetworkSpec,
    RadialBasis,
    Residual,
)
from search.spaces.grammar import encode

CUTOFF = 3.0
SSP = Activation(function="shifted_softplus")
VECTORS = GraphInput(edge_features=3, edges=20)
SCHNET = (
    Dense(units=8),
    *2 * (Residual(layers=(CFConv(channels=8, filters=6),)),),
    Dense(units=5),
    SSP,
    GraphReadout(),
)


BASIS = RadialBasis(cutoff=CUTOFF, count=12, width=0.3)


def spec_of(layers=SCHNET, *, forces=True):
    return NetworkSpec(input_shape=(2, 4), layers=layers, graph=VECTORS, basis=BASIS, forces=forces)


def network(layers=SCHNET, **others):
    """With weights large enough that its forces are some."""
    torch.manual_seed(0)
    module = build(spec_of(layers, **others)).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def crystal(cell, positions, kinds, shifts=2):
    """All neighbours within the cutoff of each atom of one cell, across its faces too."""
    n = len(positions)
    numbers = torch.arange(-shifts, shifts + 1, dtype=torch.float64)
    images = torch.cartesian_prod(numbers, numbers, numbers) @ cell
    away = positions[None, :, None] + images - positions[:, None, None]  # (i, j, image, 3)
    length = away.norm(dim=3)
    here, there, image = ((length < CUTOFF) & (length > 1e-9)).nonzero(as_tuple=True)
    return Graphs(
        torch.eye(2, dtype=torch.float64)[kinds],
        away[here, there, image],
        torch.stack([here, there], dim=1),
        torch.tensor([0, n]),
        torch.tensor([0, len(here)]),
    )


def batch_of(*parts):
    """Graphs behind each other."""
    sizes, edges = [len(p.nodes) for p in parts], [len(p.edges) for p in parts]
    starts = np.cumsum([0, *sizes])
    return Graphs(
        torch.cat([p.nodes for p in parts]),
        torch.cat([p.edges for p in parts]),
        torch.cat([p.ends + int(start) for p, start in zip(parts, starts, strict=False)]),
        torch.tensor([0, *sizes]).cumsum(0),
        torch.tensor([0, *edges]).cumsum(0),
    )


CELL = torch.tensor([[3.1, 0.2, 0.0], [0.0, 2.9, 0.3], [0.1, 0.0, 3.4]], dtype=torch.float64)
POSITIONS = torch.tensor(
    [[0.1, 0.0, 0.2], [1.6, 1.4, 0.1], [0.2, 1.5, 1.6], [1.7, 0.1, 1.8]], dtype=torch.float64
)
KINDS = torch.tensor([0, 1, 1, 0])
CRYSTAL = crystal(CELL, POSITIONS, KINDS)
GATED = (
    Dense(units=8),
    Residual(layers=(GraphConv(channels=8),)),
    GraphConv(op="attention", channels=8),
    MessagePassing(units=8, steps=2, hidden=4),
    GraphReadout(),
)


@pytest.mark.parametrize("layers", [SCHNET, GATED], ids=["schnet", "gated"])
def test_forces_are_finite_differences_of_the_energy(layers):
    module, step = network(layers), 1e-4
    found = module(CRYSTAL).forces
    assert found.shape == (4, 3) and found.abs().max() > 0.01
    for atom in range(4):
        for axis in range(3):
            total = []
            for sign in (1, -1):
                moved = POSITIONS.clone()
                moved[atom, axis] += sign * step
                total.append(4 * module(crystal(CELL, moved, KINDS)).energy)
            expected = -(total[0] - total[1]).item() / (2 * step)
            assert found[atom, axis].item() == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(found.sum(0), torch.zeros(3, dtype=torch.float64))


def test_a_rotated_crystal_has_its_energy_and_rotated_forces():
    module = network()
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    before, after = module(CRYSTAL), module(crystal(CELL @ turn, POSITIONS @ turn, KINDS))
    torch.testing.assert_close(after.energy, before.energy)
    torch.testing.assert_close(after.forces, before.forces @ turn)


def test_renumbered_and_moved_atoms_make_no_difference():
    module, order = network(), torch.tensor([2, 0, 3, 1])
    before = module(CRYSTAL)
    after = module(crystal(CELL, POSITIONS[order] + 0.7, KINDS[order]))
    torch.testing.assert_close(after.energy, before.energy)
    torch.testing.assert_close(after.forces, before.forces[order])


def test_a_supercell_has_the_same_energy_per_atom_and_forces():
    module = network()
    twice = torch.cat([POSITIONS, POSITIONS + CELL[1]])
    cell = CELL * torch.tensor([[1.0], [2.0], [1.0]], dtype=torch.float64)
    before, after = module(CRYSTAL), module(crystal(cell, twice, KINDS.repeat(2)))
    torch.testing.assert_close(after.energy, before.energy)
    torch.testing.assert_close(after.forces, before.forces.repeat(2, 1))


@pytest.mark.parametrize(
    "layers", [SCHNET, (Dense(units=8), GraphConv(channels=8), GraphReadout())]
)
def test_energies_are_smooth_where_a_neighbour_comes_into_range(layers):
    module = network(layers)

    def energy(distance):
        far = 100 * torch.eye(3, dtype=torch.float64)
        ends = torch.tensor([[0.0, 0, 0], [distance, 0, 0]], dtype=torch.float64)
        found = module(crystal(far, ends, torch.tensor([0, 1])))
        return found.energy.item(), found.forces[0, 0].item()

    beyond, near = energy(CUTOFF + 1e-6), energy(CUTOFF - 1e-6)
    assert near[0] == pytest.approx(beyond[0], abs=1e-9)
    assert beyond[1] == 0.0 and near[1] == pytest.approx(0.0, abs=1e-5)
    assert abs(energy(CUTOFF - 0.5)[0] - beyond[0]) > 1e-5


def test_an_atom_alone_feels_no_force():
    lonely = crystal(100 * torch.eye(3, dtype=torch.float64), POSITIONS[:1], KINDS[:1])
    found = network()(batch_of(lonely, CRYSTAL))
    assert torch.equal(found.forces[0], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found.energy[1:], network()(CRYSTAL).energy)


def test_graphs_of_a_batch_do_not_feel_each_other():
    module = network()
    other = crystal(1.1 * CELL, POSITIONS[:3], KINDS[:3])
    found = module(batch_of(CRYSTAL, other))
    torch.testing.assert_close(found.forces[:4], module(CRYSTAL).forces)
    torch.testing.assert_close(found.forces[4:], module(other).forces)


def test_forces_are_there_without_gradients_and_leave_none():
    module = network()
    wanted = module.train()(CRYSTAL)
    assert wanted.energy.requires_grad and wanted.forces.requires_grad
    module.eval()
    with torch.no_grad():
        found = module(CRYSTAL)
    for a, b in zip(found, wanted, strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b.detach())
    assert not CRYSTAL.edges.requires_grad


def test_a_loss_of_forces_has_the_gradient_of_its_finite_differences():
    module = network().train()
    wanted = torch.randn(4, 3, dtype=torch.float64)

    def loss(weights):
        return (functional_call(module, weights, (CRYSTAL,)).forces - wanted).square().sum()

    weights = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    names = [name for name, p in weights.items() if name != "5.bias" and p.ndim > 1]
    gradients = torch.autograd.grad(loss(weights), [weights[n] for n in names])
    for name, gradient in zip(names, gradients, strict=True):
        way = torch.randn_like(gradient)
        ends = [loss(weights | {name: weights[name] + s * 1e-5 * way}).item() for s in (1, -1)]
        expected = (ends[0] - ends[1]) / 2e-5
        assert (gradient * way).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_short_training_learns_energies_and_forces():
    torch.manual_seed(0)
    module = build(spec_of()).train()
    batch = CRYSTAL.to(torch.device("cpu"))
    batch = replace(batch, nodes=batch.nodes.float(), edges=batch.edges.float())
    wanted = EnergyForces(torch.tensor([[0.7]]), 0.3 * torch.randn(4, 3))
    wanted.forces.sub_(wanted.forces.mean(0))
    optimizer, losses = torch.optim.Adam(module.parameters(), 1e-2), []
    for _ in range(100):
        found = module(batch)
        loss = sum(((a - b) ** 2).mean() for a, b in zip(found, wanted, strict=True))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_nothing_is_computed_in_half_precision():
    batch = replace(CRYSTAL, nodes=CRYSTAL.nodes.float(), edges=CRYSTAL.edges.float())
    module = network().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = module(batch).float()
    for a, b in zip(found, module(batch), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_names_of_weights_are_those_of_a_row():
    with_forces, without = network().state_dict(), network(forces=False).state_dict()
    assert with_forces.keys() == without.keys()
    assert {name.partition(".")[0] for name in without} == {"0", "1", "2", "3", "6"}
    energy = network(forces=False)(CRYSTAL)
    torch.testing.assert_close(energy, network()(CRYSTAL).energy)


def test_costs_of_a_potential():
    with_forces, without = spec_of(), spec_of(forces=False)
    assert cost(without).parameters == sum(p.numel() for p in network().parameters())
    assert cost(with_forces).flops == 2 * cost(without).flops
    assert training_flops(with_forces) > 2 * cost(with_forces).flops
    found = build(with_forces)(nominal_graphs(with_forces, 3))
    assert found.energy.shape == (3, 1) and found.forces.shape == (12, 3)
    assert found.forces.isfinite().all()


def test_potentials_are_not_searched():
    space = NetworkSpace(input_shape=(2, 4), graph=VECTORS)
    network = spec_of((Dense(units=8), GraphReadout()), forces=False)
    with pytest.raises(NetworkError, match="radial basis"):
        encode(network, space)


def test_plain_data_of_a_potential_comes_back():
    assert NetworkSpec.model_validate_json(spec_of().model_dump_json()) == spec_of()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"basis": None}, "forces need a basis and 1 output, found no basis and 1"),
        ({"outputs": 2}, "found a basis and 2"),
        ({"graph": GraphInput(edge_features=4, edges=2)}, "vectors as edges, found 4"),
        ({"graph": None, "forces": False, "input_shape": (3,)}, "found no graphs"),
    ],
)
def test_potentials_without_sense_are_refused(changes, told):
    with pytest.raises(NetworkError, match=told):
        build(spec_of().model_copy(update=changes))
