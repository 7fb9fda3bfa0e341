"""What a network costs, by arithmetic on its shapes: nothing is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from dmi_hpc.errors import TrialFailure
from dmi_hpc.models.spec import (
    Activation,
    CFConv,
    Conv,
    Dense,
    Dropout,
    Embedding,
    GraphConv,
    GraphReadout,
    Layer,
    MessagePassing,
    NetworkSpec,
    NodeShape,
    Norm,
    Parallel,
    Pool,
    Readout,
    Recurrent,
    Residual,
    Shape,
    Take,
    UnitLength,
    Upsample,
    shapes,
    shapes_after,
)

BYTES = 4  # fp32
# weights, gradients, two Adam moments, and one more: what is computed with them needs a copy
STATES_PER_PARAMETER = 5
# an activation and its gradient live at once; convolutions work on a padded copy
COPIES_PER_ACTIVATION = 3
# gates and states that a recurrent unit keeps of each step (oneDNN's LSTM on CPUs keeps about 60)
NUMBERS_PER_STEP = 7


@dataclass(frozen=True)
class Cost:
    """parameters: number; flops: multiply-adds x 2 of one forward pass of one sample;
    activations: numbers kept for the backward pass of one sample."""

    parameters: int
    flops: int
    activations: int

    def memory_bytes(self, batch_size: int) -> int:
        """Estimated memory of training with Adam in fp32 (weights, moments, activations)."""
        return self._state_bytes + self._row_bytes * batch_size

    def rows_within(self, limit_bytes: float) -> int:
        """The largest batch whose training fits into `limit_bytes`; 0 if none does."""
        return int(max(0.0, (limit_bytes - self._state_bytes) // self._row_bytes))

    @property
    def _state_bytes(self) -> int:
        return BYTES * STATES_PER_PARAMETER * self.parameters

    @property
    def _row_bytes(self) -> int:
        return BYTES * COPIES_PER_ACTIVATION * self.activations


def cost(spec: NetworkSpec) -> Cost:
    """Exact parameter count; FLOPs of matrix products and convolutions, and 4 a value of norms;
    numbers that layers put out.

    Raises NetworkError if the layers cannot follow each other.
    """
    afters = shapes(spec)
    weights, uses, activations = _row(spec.layers, spec.enters, afters)
    head_weights, head_uses = _head(spec, (spec.enters, *afters)[-1])
    # forces are a backward pass to the edges, which itself keeps what its own backward pass needs
    passes, kept = (2, 3) if spec.forces else (1, 1)
    return Cost(
        weights + head_weights,
        2 * passes * (uses + head_uses),
        prod(spec.input_shape) + kept * activations,
    )


def training_flops(spec: NetworkSpec) -> int:
    """FLOPs of one sample, forward and backward: each product of the forward pass comes back as two.

    Nobody asks for the gradient by the network's inputs: the first layers with weights have one less.
    Work done twice to save memory (activation checkpointing) does not count.
    """
    shape = (spec.enters, *shapes(spec))[-1]
    first, graded = _ungraded(spec.layers, spec.enters, graded=False)
    if not graded:
        first += _head(spec, shape)[1]
    return 3 * cost(spec).flops - 2 * first


def layer_weights(layer: Layer, before: Shape, after: Shape) -> tuple[int, int]:
    """(parameters, multiply-adds of one sample) of one layer, with those inside it."""
    weights, uses, _ = _layer(layer, before, after)
    return weights, uses


def _layer(layer: Layer, before: Shape, after: Shape) -> tuple[int, int, int]:
    """(parameters, multiply-adds, activations) of one layer, with those inside it."""
    size = prod(after)
    match layer:
        case Pool() | Upsample() | Activation() | Dropout() | Readout() | Take() | UnitLength():
            return 0, 0, size
        case Embedding():
            return layer.entries * layer.units, 0, size
        case GraphConv() | MessagePassing() | CFConv() | GraphReadout():
            assert isinstance(before, NodeShape), before
            return _on_graph(layer, before)
        case Conv():
            kernel = before[0] * layer.kernel ** (len(before) - 1)
            return layer.filters * (kernel + 1), kernel * size, size
        case Dense():
            return layer.units * (before[0] + 1), before[0] * size, size
        case Norm():
            return 2 * before[0], 2 * size, size
        case Recurrent():
            rows, inputs = _rows(layer), before[0] + layer.units
            kept = NUMBERS_PER_STEP * _directions(layer) * layer.units * before[1]
            return rows * (inputs + 2), rows * inputs * before[1], kept
        case Residual():
            weights, uses, kept = _row(layer.layers, before)
            if before == after:
                return weights, uses, kept + size
            return weights + before[0] * after[0], uses + before[0] * size, kept + 2 * size
        case Parallel():
            found = [_row(branch, before) for branch in layer.branches]
            weights, uses, kept = (sum(numbers) for numbers in zip(*found, strict=True))
            return weights, uses, kept + size


def _row(
    layers: Sequence[Layer], shape: Shape, afters: Sequence[Shape] | None = None
) -> tuple[int, int, int]:
    """(parameters, multiply-adds, activations) of layers that follow each other from `shape` on."""
    weights = uses = kept = 0
    for layer, after in zip(layers, afters or shapes_after(layers, shape), strict=True):
        more = _layer(layer, shape, after)
        weights, uses, kept = weights + more[0], uses + more[1], kept + more[2]
        shape = after
    return weights, uses, kept


def _on_graph(
    layer: GraphConv | MessagePassing | CFConv | GraphReadout, before: NodeShape
) -> tuple[int, int, int]:
    match layer:
        case GraphConv():
            return _graph_conv(layer, before)
        case MessagePassing():
            return _message_passing(layer, before)
        case CFConv():
            return _cfconv(layer, before)
        case GraphReadout():
            return _graph_readout(layer, before)


def _graph_conv(layer: GraphConv, before: NodeShape) -> tuple[int, int, int]:
    """Nodes are multiplied once each and then gathered: edges multiply their own features alone."""
    channels, nodes = before
    edges, features = before.graph.edges, before.graph.edge_features
    width = (2 if layer.op in ("gated", "attention") else 1) * layer.channels
    weights = width * (2 * channels + features + 1)
    uses = width * (2 * nodes * channels + edges * features)
    kept = width * (2 * nodes + 3 * edges) + layer.channels * nodes
    if layer.norm is not None:
        weights, uses, kept = weights + 2 * width, uses + 2 * width * edges, kept + width * edges
    if layer.op == "gated":
        uses, kept = uses + layer.channels * edges, kept + 3 * layer.channels * edges
    if layer.op == "attention":
        weights += layer.channels * (layer.channels + 2)
        uses += layer.channels * (2 * edges + layer.channels * nodes)
        kept += layer.channels * (3 * edges + 2 * nodes)
    return weights, uses, kept


def _message_passing(layer: MessagePassing, before: NodeShape) -> tuple[int, int, int]:
    """Edges of a kind share their matrix."""
    nodes, units, hidden = before[1], layer.units, layer.hidden
    graph = before.graph
    matrices = graph.edges if graph.kinds is None else min(graph.kinds, graph.edges)
    made = graph.edge_features * hidden + hidden * units**2
    weights = made + hidden + units**2 + 6 * units * (units + 1)
    uses = matrices * made + layer.steps * units**2 * (graph.edges + 6 * nodes)
    step = 2 * graph.edges + NUMBERS_PER_STEP * nodes
    return weights, uses, matrices * (2 * hidden + units**2) + layer.steps * units * step


def _cfconv(layer: CFConv, before: NodeShape) -> tuple[int, int, int]:
    inputs, nodes = before
    filters, channels, graph = layer.filters, layer.channels, before.graph
    on_edges = filters * (graph.edge_features + filters)
    on_nodes = inputs * filters + channels * (filters + channels)
    weights = on_edges + on_nodes + 2 * filters + 2 * channels
    uses = graph.edges * (on_edges + filters) + nodes * on_nodes
    # of a shifted softplus: what enters, and what leaves
    return weights, uses, 6 * filters * graph.edges + nodes * (2 * filters + 3 * channels)


def _graph_readout(layer: GraphReadout, before: NodeShape) -> tuple[int, int, int]:
    channels, nodes = before
    match layer.op:
        case "attention":
            weights = channels * (channels + 2)
            uses = nodes * channels * (channels + 2)
            return weights, uses, 3 * nodes * channels + channels
        case "set2set":
            uses = layer.steps * channels * (12 * channels + 2 * nodes)
            kept = layer.steps * channels * (3 * nodes + NUMBERS_PER_STEP + 2)
            return 4 * channels * (3 * channels + 2), uses, kept
        case _:
            return 0, 0, channels


def _head(spec: NetworkSpec, shape: Shape) -> tuple[int, int]:
    """(parameters, multiply-adds); shape: what the last layer leaves."""
    inputs = shape[0] if spec.map_output else prod(shape)
    return spec.outputs * (inputs + 1), spec.outputs * prod(shape)


def _rows(layer: Recurrent) -> int:
    """Of the weight matrices of all gates and directions."""
    return (3 if layer.cell == "gru" else 4) * _directions(layer) * layer.units


def _directions(layer: Recurrent) -> int:
    return 2 if layer.bidirectional else 1


def _ungraded(layers: Sequence[Layer], shape: Shape, graded: bool) -> tuple[int, bool]:
    """(multiply-adds whose input needs no gradient, whether the output of `layers` needs one).

    graded: whether the input of `layers` needs one. The first state of a recurrent layer never does.
    """
    found = 0
    for layer, after in zip(layers, shapes_after(layers, shape), strict=True):
        weights, uses = layer_weights(layer, shape, after)
        match layer:
            case Residual():
                found += _ungraded(layer.layers, shape, graded)[0]
                projected = shape != after and not graded
                found += shape[0] * prod(after) if projected else 0
            case Parallel():
                found += sum(_ungraded(branch, shape, graded)[0] for branch in layer.branches)
            case Recurrent():
                found += _rows(layer) * (layer.units + (0 if graded else prod(shape)))
            case _:
                found += 0 if graded else uses
        graded, shape = graded or weights > 0, after
    return found, graded


def parts_that_fit(
    spec: NetworkSpec, found: Cost, rows: int, limit_bytes: float, parts: int = 1
) -> int | None:
    """The least number of parts, `parts` or more, in which a batch of `rows` can be computed so that
    the training of `spec` needs no more than `limit_bytes`; None if there is none.

    found: its cost. In more parts it is the same training, up to rounding, but with batch
    normalisation, whose statistics are of a part: such a network has `parts` or none.
    """
    parts = min(parts, rows)
    if found.memory_bytes(-(-rows // parts)) <= limit_bytes:
        return parts
    most = found.rows_within(limit_bytes)
    if most < 1 or normalises_batches(spec.layers):
        return None
    return -(-rows // most)


def normalises_batches(layers: Sequence[Layer]) -> bool:
    """Whether statistics of the batch take part in what the layers put out."""
    return any(
        (isinstance(layer, Norm) and layer.op == "batch")
        or (isinstance(layer, GraphConv) and layer.norm == "batch")
        or (isinstance(layer, Residual) and normalises_batches(layer.layers))
        or (isinstance(layer, Parallel) and any(map(normalises_batches, layer.branches)))
        for layer in layers
    )


def require_fit(spec: NetworkSpec, rows: int, limit_bytes: float, parts: int = 1) -> int:
    """`parts_that_fit`; a TrialFailure of kind ``memory`` if the training of `spec` fits in none."""
    found = cost(spec)
    fitting = parts_that_fit(spec, found, rows, limit_bytes, parts)
    if fitting is None:
        split = not normalises_batches(spec.layers)
        at_least = 1 if split else -(-rows // min(parts, rows))
        raise TrialFailure(
            "memory",
            f"{found.parameters:,} parameters and batch {rows} need about "
            f"{found.memory_bytes(at_least) / 1e9:.2g} GB"
            + (", even row by row" if split else " (batch normalisation: not computed in parts)")
            + f"; allowed are {limit_bytes / 1e9:.2g} GB",
        )
    return fitting
