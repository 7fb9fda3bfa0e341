"""Modules of networks of graphs.

Those that look beyond a single node receive, besides the values on the nodes, the graphs that these
belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dmi_hpc.models.graphs import Graphs

# Edges for each of their distinct features from which on it pays to multiply kind by kind: 64
# molecules, 3,456 edges, 64 units, one core, forward and backward: 8 kinds 11 ms, 100 kinds 43 ms; edge
# by edge 430 ms.
SHARED_BY = 8


class OnGraphs(nn.Module):
    """A module whose `forward` takes values on the nodes, (N, C), and their `Graphs`."""


class GraphRow(nn.Sequential):
    """Modules in a row, those that need them with the graphs."""

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:  # type: ignore[override]
        for module in self:
            values = module(values, graphs) if isinstance(module, OnGraphs) else module(values)
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


class GatedConv(OnGraphs):
    """Equation 5 of Xie and Grossman 2018 up to the sum: (N, C) -> (N, channels).

    norm: of the values of each edge before the gates, (E, 2 channels).
    """

    def __init__(self, inputs: int, edge: int, channels: int, norm: nn.Module | None) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * inputs + edge, 2 * channels)
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        own, others, edges = split(self.linear, values, graphs)
        here, there = graphs.ends.unbind(1)
        gates, cores = self.norm(
            own.index_select(0, here) + others.index_select(0, there) + edges
        ).chunk(2, dim=1)
        messages = weighted(torch.sigmoid(gates) * functional.softplus(cores), graphs)
        return summed(messages, here, len(values))


class PlainConv(OnGraphs):
    """Equation 4 of Xie and Grossman 2018 before its activation; `mean` divides by the neighbours."""

    def __init__(self, inputs: int, edge: int, channels: int, *, mean: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * inputs + edge, channels)
        self._mean = mean

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        own, others, edges = split(self.linear, values, graphs)
        here, there = graphs.ends.unbind(1)
        messages = weighted(others.index_select(0, there) + edges, graphs)
        if self._mean:
            messages = messages / graphs.neighbours.to(messages.dtype)[here]
        return own.index_add(0, here, messages)


def split(linear: nn.Linear, values: Tensor, graphs: Graphs) -> tuple[Tensor, Tensor, Tensor]:
    """`linear` of [node i, node j, edge i-j] as three summands: of nodes as i (with the bias), of nodes
    as j, and of edges. A node is multiplied once, however many neighbours it has."""
    width = values.shape[1]
    own, others, edges = torch.split(linear.weight, [width, width, graphs.edges.shape[1]], dim=1)
    return (
        functional.linear(values, own, linear.bias),
        functional.linear(values, others),
        functional.linear(graphs.edges.to(values.dtype), edges),
    )


def weighted(messages: Tensor, graphs: Graphs) -> Tensor:
    """Messages (E, C) times the weights of their edges."""
    weights = graphs.edge_weights
    return messages if weights is None else messages * weights.to(messages.dtype)


def summed(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sums of the rows of `values` in each of `count` groups; groups: (rows,) int64."""
    return values.new_zeros(count, values.shape[1]).index_add(0, groups, values)


def _shares(logits: Tensor, groups: Tensor, count: int, weights: Tensor | None) -> Tensor:
    """Softmax of `logits` (M, 1) within each of `count` groups; an entry counts as often as its weight
    (M, 1) says. Groups without weight have shares of 0."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    known = logits.detach()
    highest = known.new_full((count, 1), -torch.inf)
    highest = highest.scatter_reduce(0, groups[:, None], known, "amax")
    found = torch.exp(logits - highest[groups])
    if weights is not None:
        found = found * weights.to(found.dtype)
    total = summed(found, groups, count)
    return found / total[groups].clamp(min=torch.finfo(found.dtype).tiny)


class AttentionConv(OnGraphs):
    """Weighted soft attention of Goodall and Lee 2020 with one head: (N, C) -> (N, channels).

    The last layer of the values is linear: it acts on the mean over the neighbours, not on each edge.
    """

    def __init__(self, inputs: int, edge: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * inputs + edge, 2 * channels)
        self.gate = nn.Linear(channels, 1, bias=False)
        self.value = nn.Linear(channels, channels)

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        own, others, edges = split(self.linear, values, graphs)
        here, there = graphs.ends.unbind(1)
        hidden = functional.leaky_relu(
            own.index_select(0, here) + others.index_select(0, there) + edges
        )
        gates, cores = hidden.chunk(2, dim=1)
        weights = graphs.edge_weights
        if graphs.weights is not None:
            neighbours = graphs.weights[there]
            weights = neighbours if weights is None else weights * neighbours
        shares = _shares(self.gate(gates), here, len(values), weights)
        found: Tensor = self.value(summed(shares.to(cores.dtype) * cores, here, len(values)))
        return found


class EdgeNetwork(OnGraphs):
    """Messages and updates of Gilmer et al. 2017: (N, units) -> (N, units)."""

    def __init__(self, edge: int, units: int, steps: int, hidden: int) -> None:
        super().__init__()
        self.edge = nn.Sequential(
            nn.Linear(edge, hidden), nn.ReLU(), nn.Linear(hidden, units * units)
        )
        self.cell = nn.GRUCell(units, units)
        self._steps = steps

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        messages = self._messages(graphs, values.dtype)
        for _ in range(self._steps):
            values = self.cell(messages(values), values)
        return values

    def _messages(self, graphs: Graphs, kind: torch.dtype) -> Callable[[Tensor], Tensor]:
        """From values on the nodes to what each receives.

        A matrix for each edge is large: edges with the same features, as bonds of a kind have, share
        theirs, if there are enough of them.
        """
        edges, (here, there) = graphs.edges.to(kind), graphs.ends.unbind(1)
        if not edges.requires_grad:
            rows, row_of_edge = torch.unique(edges, dim=0, return_inverse=True)
            if 0 < SHARED_BY * len(rows) <= len(edges):
                return self._of_kinds(rows, row_of_edge, graphs)
        matrices = self._matrices(edges)

        def of_edges(values: Tensor) -> Tensor:
            found = torch.bmm(matrices, values[there, :, None].to(matrices.dtype)).squeeze(2)
            return summed(weighted(found, graphs), here, len(values))

        return of_edges

    def _of_kinds(
        self, rows: Tensor, row_of_edge: Tensor, graphs: Graphs
    ) -> Callable[[Tensor], Tensor]:
        matrices = self._matrices(rows)
        order = row_of_edge.argsort(stable=True)
        counts = row_of_edge.bincount(minlength=len(rows)).tolist()
        here, there = graphs.ends[order].unbind(1)
        weights = None if graphs.edge_weights is None else graphs.edge_weights[order]

        def of_kinds(values: Tensor) -> Tensor:
            parts = torch.split(values.index_select(0, there), counts)
            found = torch.cat(
                [functional.linear(p, m) for p, m in zip(parts, matrices, strict=True)]
            )
            if weights is not None:
                found = found * weights.to(found.dtype)
            return summed(found, here, len(values))

        return of_kinds

    def _matrices(self, edges: Tensor) -> Tensor:
        """(M, units, units) of edge features (M, K)."""
        units = self.cell.hidden_size
        found: Tensor = self.edge(edges)
        return found.view(len(edges), units, units)


class NodeReadout(OnGraphs):
    """Mean, sum or maximum over the nodes of each graph: (N, C) -> (B, C)."""

    def __init__(self, op: Literal["mean", "sum", "max"]) -> None:
        super().__init__()
        self._op = op

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        graph, weights = graphs.graph_of_node, graphs.weights
        if self._op == "max":
            lowest = values.new_full((len(graphs), values.shape[1]), -torch.inf)
            return lowest.scatter_reduce(0, graph[:, None].expand_as(values), values, "amax")
        if self._op == "sum":
            return summed(values, graph, len(graphs))
        if weights is None:
            return summed(values, graph, len(graphs)) / graphs.sizes[:, None]
        total = summed(values * weights.to(values.dtype), graph, len(graphs))
        return total / summed(weights, graph, len(graphs)).to(values.dtype)


class AttentionReadout(OnGraphs):
    """Mean over the nodes of each graph by learned shares, Goodall and Lee 2020: (N, C) -> (B, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, channels)
        self.gate = nn.Linear(channels, 1, bias=False)

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        graph = graphs.graph_of_node
        logits = self.gate(functional.leaky_relu(self.hidden(values)))
        shares = _shares(logits, graph, len(graphs), graphs.weights)
        return summed(shares.to(values.dtype) * values, graph, len(graphs))


class Set2Set(OnGraphs):
    """Vinyals et al. 2015, equations 3 to 7: (N, C) -> (B, 2 C)."""

    def __init__(self, channels: int, steps: int) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(2 * channels, channels)
        self._steps = steps

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        graph, channels = graphs.graph_of_node, values.shape[1]
        found = values.new_zeros(len(graphs), 2 * channels)
        states = None
        for _ in range(self._steps):
            states = self.cell(found, states)
            query = states[0]
            logits = (query[graph] * values).sum(1, keepdim=True)
            shares = _shares(logits, graph, len(graphs), graphs.weights)
            read = summed(shares.to(values.dtype) * values, graph, len(graphs))
            found = torch.cat([query, read], dim=1)
        return found


class NodeSkip(OnGraphs):
    """projection(x) + layers(x) on nodes."""

    def __init__(self, layers: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.layers, self.projection = layers, projection

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        total: Tensor = self.projection(values) + self.layers(values, graphs)
        return total


class NodeBranches(OnGraphs):
    """Branches over the values on the same nodes, concatenated along the channels or summed."""

    def __init__(self, branches: Sequence[nn.Module], *, concat: bool) -> None:
        super().__init__()
        self.branches, self._concat = nn.ModuleList(branches), concat

    def forward(self, values: Tensor, graphs: Graphs) -> Tensor:
        ends: list[Tensor] = [branch(values, graphs) for branch in self.branches]
        return torch.cat(ends, 1) if self._concat else sum(ends[1:], ends[0])
