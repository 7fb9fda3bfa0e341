"""Batches of graphs of any sizes.

All nodes of a batch lie behind each other, as do all edges: nothing is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dmi_hpc.data.ragged import Array, Ragged
from dmi_hpc.models.spec import NetworkSpec

PREFIX = "inputs."  # of the names of tensors that together are the inputs of a batch


@dataclass(frozen=True)
class Graphs:
    """B graphs with N nodes and E edges together; each has at least one node.

    nodes: (N, F) float; edges: (E, K) float; ends: (E, 2) int64, node i and its neighbour j: messages
    run from j to i; node_offsets, edge_offsets: (B + 1,) int64, graph g has the nodes, and edges,
    offsets[g] up to offsets[g + 1].

    weights: (N, 1) float, how often a node counts in attention and means (fractions of elements);
    without, once. edge_weights: (E, 1) float, of the messages along the edges; without, 1. forces:
    (N, 3) float, a training's target that rides along. Weights are not negative.
    """

    nodes: Tensor
    edges: Tensor
    ends: Tensor
    node_offsets: Tensor
    edge_offsets: Tensor
    weights: Tensor | None = None
    edge_weights: Tensor | None = None
    forces: Tensor | None = None

    def __len__(self) -> int:
        return len(self.node_offsets) - 1

    def __getitem__(self, part: slice) -> Graphs:
        """Some of the graphs, one after another."""
        start, stop, step = part.indices(len(self))
        assert step == 1, part
        nodes = self.node_offsets[start : stop + 1]
        edges = self.edge_offsets[start : stop + 1]
        of_nodes = slice(int(nodes[0]), int(nodes[-1]))
        of_edges = slice(int(edges[0]), int(edges[-1]))
        return Graphs(
            self.nodes[of_nodes],
            self.edges[of_edges],
            self.ends[of_edges] - of_nodes.start,
            nodes - of_nodes.start,
            edges - of_edges.start,
            None if self.weights is None else self.weights[of_nodes],
            None if self.edge_weights is None else self.edge_weights[of_edges],
            None if self.forces is None else self.forces[of_nodes],
        )

    def tensors(self) -> dict[str, Tensor]:
        """By names for `inputs_of`: those that are there."""
        found = {PREFIX + each.name: getattr(self, each.name) for each in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device) -> Graphs:
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return _of_tensors(moved)

    @property
    def device(self) -> torch.device:
        return self.nodes.device

    @cached_property
    def sizes(self) -> Tensor:
        """Nodes of each graph, (B,) int64."""
        return self.node_offsets.diff()

    @cached_property
    def graph_of_node(self) -> Tensor:
        """(N,) int64."""
        numbers = torch.arange(len(self), device=self.sizes.device)
        return numbers.repeat_interleave(self.sizes, output_size=len(self.nodes))

    @cached_property
    def neighbours(self) -> Tensor:
        """How many each node has, (N, 1) float, at least 1."""
        counts = torch.bincount(self.ends[:, 0], minlength=len(self.nodes))
        return counts.clamp(min=1)[:, None].to(self.nodes.dtype)


Inputs = Tensor | Graphs


class EnergyForces(NamedTuple):
    """What a network with forces gives, in network units: energy (B, 1), forces (N, 3)."""

    energy: Tensor
    forces: Tensor

    def float(self) -> EnergyForces:
        """In float32, as of a tensor."""
        return EnergyForces(self.energy.float(), self.forces.float())


Output = Tensor | EnergyForces


def values_of(output: Output) -> Tensor:
    """What is predicted of each row, in network units: (n,), or (n, k)."""
    return (output.energy if isinstance(output, EnergyForces) else output).squeeze(1)


def mean_of(outputs: Sequence[Output]) -> Output:
    """The mean output of several networks."""
    if isinstance(outputs[0], EnergyForces):
        energy, forces = (torch.stack(each).mean(0) for each in zip(*outputs, strict=True))
        return EnergyForces(energy, forces)
    return torch.stack([values for values in outputs if isinstance(values, Tensor)]).mean(0)


def inputs_of(tensors: Mapping[str, Tensor]) -> Inputs:
    """What the network takes, from the tensors of a batch."""
    if "inputs" in tensors:
        return tensors["inputs"]
    return _of_tensors(tensors)


def _of_tensors(tensors: Mapping[str, Tensor]) -> Graphs:
    """Inverse of `Graphs.tensors`; `tensors` may hold others beside."""
    names = {PREFIX + each.name: each.name for each in fields(Graphs)}
    return Graphs(**{names[name]: tensors[name] for name in names if name in tensors})


def tensors_of(inputs: Array | Graphs) -> dict[str, Tensor]:
    """What a task made of its fields, by names for `inputs_of`; arrays are not converted."""
    if isinstance(inputs, Graphs):
        return inputs.tensors()
    return {"inputs": torch.from_numpy(np.ascontiguousarray(inputs))}


def graphs_of(
    nodes: Ragged,
    edges: Ragged,
    ends: Ragged,
    *,
    weights: Ragged | None = None,
    forces: Ragged | None = None,
) -> Graphs:
    """One graph of each row: its nodes (n_i, F) and edges (e_i, K), and (e_i, 2) node i and neighbour j
    of each edge, numbered over all rows, as a data loader gives them; weights (n_i, 1) and forces
    (n_i, 3) of the nodes. Shares no memory with its input.
    """
    return Graphs(
        torch.tensor(nodes.values, dtype=torch.float32),
        torch.tensor(edges.values, dtype=torch.float32),
        torch.tensor(ends.values, dtype=torch.int64),
        torch.tensor(nodes.offsets),
        torch.tensor(edges.offsets),
        weights=None if weights is None else torch.tensor(weights.values, dtype=torch.float32),
        forces=None if forces is None else torch.tensor(forces.values, dtype=torch.float32),
    )


def nominal_graphs(spec: NetworkSpec, rows: int, seed: int = 0) -> Graphs:
    """Graphs of the nominal size, every node with about equally many random neighbours.

    Edges that are vectors have lengths up to the cutoff of the basis, but not near 0.
    """
    assert spec.graph is not None
    (features, n), e = spec.input_shape, spec.graph.edges
    rng = torch.Generator().manual_seed(seed)
    first = n * torch.arange(rows).repeat_interleave(e)
    here = torch.arange(e).repeat(rows) % n
    there = torch.randint(n, (rows * e,), generator=rng)
    nodes = torch.randn(rows * n, features, generator=rng)
    edges = torch.randn(rows * e, spec.graph.edge_features, generator=rng)
    if spec.graph.kinds is not None:
        edges = edges[
            torch.randint(min(spec.graph.kinds, len(edges)), (len(edges),), generator=rng)
        ]
    if spec.basis is not None:
        share = 0.2 + 0.8 * torch.rand(rows * e, 1, generator=rng)
        edges = spec.basis.cutoff * share * functional.normalize(edges)
    return Graphs(
        nodes,
        edges,
        torch.stack([first + here, first + there], dim=1),
        n * torch.arange(rows + 1),
        e * torch.arange(rows + 1),
    )
