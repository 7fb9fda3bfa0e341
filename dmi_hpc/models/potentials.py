"""Energies and forces from the positions of atoms: SchNet, Schuett et al. 2017 (arXiv:1706.08566)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmi_hpc.models.graph_layers import GraphNetwork, OnGraphs, summed, weighted
from dmi_hpc.models.graphs import EnergyForces, Graphs
from dmi_hpc.models.spec import RadialBasis


class ShiftedSoftplus(nn.Module):
    """log(1/2 + exp(x)/2): 0 at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.softplus(x) - math.log(2.0)


def in_basis(graphs: Graphs, basis: RadialBasis) -> Graphs:
    """`graphs` with edges that are vectors, (E, 3), in a basis: (E, count), and their weights."""
    lengths = torch.linalg.vector_norm(graphs.edges, dim=1, keepdim=True)
    centres = torch.linspace(
        0.0, basis.cutoff, basis.count, dtype=lengths.dtype, device=lengths.device
    )
    gaussians = torch.exp(-0.5 * ((lengths - centres) / basis.width).square())
    weights = 0.5 * (1.0 + torch.cos(math.pi / basis.cutoff * lengths.clamp(max=basis.cutoff)))
    return replace(graphs, edges=gaussians, edge_weights=weights)


class ContinuousFilterConv(OnGraphs):
    """The interaction of SchNet without its residual connection: (N, C) -> (N, channels)."""

    def __init__(self, inputs: int, edge: int, channels: int, filters: int) -> None:
        super().__init__()
        self.enter = nn.Linear(inputs, filters, bias=False)
        self.filter = nn.Sequential(
            nn.Linear(edge, filters),
            ShiftedSoftplus(),
            nn.Linear(filters, filters),
            ShiftedSoftplus(),
        )
        self.leave = nn.Sequential(
            nn.Linear(filters, channels), ShiftedSoftplus(), nn.Linear(channels, channels)
        )
        for part in self.modules():  # as the authors: torch's own leaves next to no forces
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        here, there = graphs.ends.unbind(1)
        filters = weighted(self.filter(graphs.edges.to(values.dtype)), graphs)
        found: Tensor = self.leave(
            summed(self.enter(values).index_select(0, there) * filters, here, len(values))
        )
        return found


class PotentialNetwork(GraphNetwork):
    """`Graphs` whose edges are vectors, in angstrom -> (B, outputs)."""

    def __init__(self, row: Iterable[nn.Module], basis: RadialBasis) -> None:
        super().__init__(*row)
        self._basis = basis

    def forward(self, graphs: Graphs) -> Tensor:  # type: ignore[override]
        return super().forward(in_basis(graphs, self._basis))


class ForceNetwork(PotentialNetwork):
    """`Graphs` whose edges are vectors, in angstrom -> energy per node and forces, per angstrom.

    Forces are there under ``torch.no_grad`` too. While training, they can be differentiated. Nothing is
    computed in half precision: an energy is a small difference of large numbers.
    """

    def forward(self, graphs: Graphs) -> EnergyForces:  # type: ignore[override]
        learns = self.training and torch.is_grad_enabled()
        with torch.enable_grad(), torch.autocast(graphs.device.type, enabled=False):
            vectors = graphs.edges.detach().requires_grad_()
            energy = super().forward(replace(graphs, edges=vectors))
            total = (energy * graphs.sizes[:, None]).sum()
            (slopes,) = torch.autograd.grad(total, vectors, create_graph=learns)
        # a vector is the position of j less that of i, and a force minus the slope of the energy
        here, there = graphs.ends.unbind(1)
        forces = slopes.new_zeros(len(graphs.nodes), 3)
        forces = forces.index_add(0, here, slopes).index_add(0, there, -slopes)
        return EnergyForces(energy if learns else energy.detach(), forces)
