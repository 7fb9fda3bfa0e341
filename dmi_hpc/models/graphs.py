"""Batches of graphs of any sizes, and the modules of networks that act on them.

All nodes of a batch lie behind each other, as do all edges: nothing is padded. Modules that look
beyond a single node receive, besides the values on the nodes, the graphs that these belong to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from dmi_hpc.data.ragged import Array, Ragged
from dmi_hpc.models.spec import GraphReadoutName, NetworkSpec

PREFIX = "inputs."  # of the names of tensors that together are the inputs of a batch


@dataclass(frozen=True)
class Graphs:
    """B graphs with N nodes and E edges together; each has at least one node.

    nodes: (N, F) float; edges: (E, K) float; ends: (E, 2) int64, node i and its neighbour j: messages
    run from j to i; node_offsets, edge_offsets: (B + 1,) int64, graph g has the nodes, and edges,
    offsets[g] up to offsets[g + 1].
    """

    nodes: Tensor
    edges: Tensor
    ends: Tensor
    node_offsets: Tensor
    edge_offsets: Tensor

    def __len__(self) -> int:
        return len(self.node_offsets) - 1

    def __getitem__(self, part: slice) -> Graphs:
        """Some of the graphs, one after another."""
        start, stop, step = part.indices(len(self))
        assert step == 1, part
        nodes = self.node_offsets[start : stop + 1]
        edges = self.edge_offsets[start : stop + 1]
        first, last = int(nodes[0]), int(nodes[-1])
        chosen = slice(int(edges[0]), int(edges[-1]))
        return Graphs(
            self.nodes[first:last],
            self.edges[chosen],
            self.ends[chosen] - first,
            nodes - first,
            edges - chosen.start,
        )

    def tensors(self) -> dict[str, Tensor]:
        """By names for `inputs_of`."""
        return {PREFIX + each.name: getattr(self, each.name) for each in fields(self)}

    def to(self, device: torch.device) -> Graphs:
        return Graphs(*(getattr(self, each.name).to(device) for each in fields(self)))

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


def inputs_of(tensors: Mapping[str, Tensor]) -> Inputs:
    """What the network takes, from the tensors of a batch."""
    if "inputs" in tensors:
        return tensors["inputs"]
    return Graphs(**{each.name: tensors[PREFIX + each.name] for each in fields(Graphs)})


def tensors_of(inputs: Array | Graphs) -> dict[str, Tensor]:
    """What a task made of its fields, by names for `inputs_of`; arrays are not converted."""
    if isinstance(inputs, Graphs):
        return inputs.tensors()
    return {"inputs": torch.from_numpy(np.ascontiguousarray(inputs))}


def graphs_of(nodes: Ragged, edges: Ragged, ends: Ragged) -> Graphs:
    """One graph of each row: its nodes (n_i, F) and edges (e_i, K), and (e_i, 2) node i and neighbour j
    of each edge, numbered over all rows, as a data loader gives them. Shares no memory with its input.
    """
    return Graphs(
        torch.tensor(nodes.values, dtype=torch.float32),
        torch.tensor(edges.values, dtype=torch.float32),
        torch.tensor(ends.values, dtype=torch.int64),
        torch.tensor(nodes.offsets),
        torch.tensor(edges.offsets),
    )


def nominal_graphs(spec: NetworkSpec, rows: int, seed: int = 0) -> Graphs:
    """Graphs of the nominal size, every node with about equally many random neighbours."""
    assert spec.graph is not None
    (features, n), e = spec.input_shape, spec.graph.edges
    rng = torch.Generator().manual_seed(seed)
    first = n * torch.arange(rows).repeat_interleave(e)
    here = torch.arange(e).repeat(rows) % n
    there = torch.randint(n, (rows * e,), generator=rng)
    return Graphs(
        torch.randn(rows * n, features, generator=rng),
        torch.randn(rows * e, spec.graph.edge_features, generator=rng),
        torch.stack([first + here, first + there], dim=1),
        n * torch.arange(rows + 1),
        e * torch.arange(rows + 1),
    )


class _OnGraphs(nn.Module):
    """A module whose `forward` takes values on the nodes, (N, C), and their `Graphs`."""


class GraphRow(nn.Sequential):
    """Modules in a row, those that need them with the graphs."""

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:  # type: ignore[override]
        for module in self:
            values = module(values, graphs) if isinstance(module, _OnGraphs) else module(values)
        return values


class GraphNetwork(GraphRow):
    """`Graphs` -> (B, outputs). One child for each layer, then the head."""

    def forward(self, graphs: Graphs) -> Tensor:  # type: ignore[override]
        # weights may be of half precision, which engines see to for plain tensors alone
        kind = next(self.parameters()).dtype
        return super().forward(graphs.nodes.to(kind), graphs)


class NodeNorm(nn.BatchNorm1d):
    """Batch normalisation over all nodes or edges of a batch; fewer than two have no variance, and
    are normalised with what was seen so far."""

    def forward(self, values: Tensor) -> Tensor:
        if len(values) > 1 or not self.training:
            return super().forward(values)
        return functional.batch_norm(
            values, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class GatedConv(_OnGraphs):
    """Equation 5 of Xie and Grossman 2018 up to the sum: (N, C) -> (N, channels).

    norm: of the values of each edge before the gates, (E, 2 channels).
    """

    def __init__(self, inputs: int, edge: int, channels: int, norm: nn.Module | None) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * inputs + edge, 2 * channels)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        own, others, edges = _split(self.linear, values, graphs)
        here, there = graphs.ends.unbind(1)
        gates, cores = self.norm(own[here] + others[there] + edges).chunk(2, dim=1)
        messages = torch.sigmoid(gates) * functional.softplus(cores)
        return messages.new_zeros(len(values), messages.shape[1]).index_add(0, here, messages)


class PlainConv(_OnGraphs):
    """Equation 4 of Xie and Grossman 2018 before its activation; `mean` divides by the neighbours."""

    def __init__(self, inputs: int, edge: int, channels: int, *, mean: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * inputs + edge, channels)
        self._mean = mean

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        own, others, edges = _split(self.linear, values, graphs)
        here, there = graphs.ends.unbind(1)
        messages = others[there] + edges
        if self._mean:
            messages = messages / graphs.neighbours.to(messages.dtype)[here]
        return own.index_add(0, here, messages)


def _split(linear: nn.Linear, values: Tensor, graphs: Graphs) -> tuple[Tensor, Tensor, Tensor]:
    """`linear` of [node i, node j, edge i-j] as three summands: of nodes as i (with the bias), of nodes
    as j, and of edges. A node is multiplied once, however many neighbours it has."""
    width = values.shape[1]
    own, others, edges = torch.split(linear.weight, [width, width, graphs.edges.shape[1]], dim=1)
    return (
        functional.linear(values, own, linear.bias),
        functional.linear(values, others),
        functional.linear(graphs.edges.to(values.dtype), edges),
    )


class NodeReadout(_OnGraphs):
    """Mean, sum or maximum over the nodes of each graph: (N, C) -> (B, C)."""

    def __init__(self, op: GraphReadoutName) -> None:
        super().__init__()
        self._op = op

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        graph = graphs.graph_of_node
        if self._op == "max":
            lowest = values.new_full((len(graphs), values.shape[1]), -torch.inf)
            return lowest.scatter_reduce(0, graph[:, None].expand_as(values), values, "amax")
        total = values.new_zeros(len(graphs), values.shape[1]).index_add(0, graph, values)
        return total / graphs.sizes[:, None] if self._op == "mean" else total


class NodeSkip(_OnGraphs):
    """projection(x) + layers(x) on nodes."""

    def __init__(self, layers: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.layers, self.projection = layers, projection

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        total: Tensor = self.projection(values) + self.layers(values, graphs)
        return total


class NodeBranches(_OnGraphs):
    """Branches over the values on the same nodes, concatenated along the channels or summed."""

    def __init__(self, branches: Sequence[nn.Module], *, concat: bool) -> None:
        super().__init__()
        self.branches, self._concat = nn.ModuleList(branches), concat

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        ends: list[Tensor] = [branch(values, graphs) for branch in self.branches]
        return torch.cat(ends, 1) if self._concat else sum(ends[1:], ends[0])
