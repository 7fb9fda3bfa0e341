"""Diagrams as inline SVG: the layers of a network, and the ancestors of a winner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dmi_hpc.models.cost import cost, layer_weights
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
from dmi_hpc.report.charts import origin_colour
from dmi_hpc.report.evaluations import Search, ancestors, known_parents
from dmi_hpc.report.formatting import compact, number

WIDTH = 900


@dataclass(frozen=True)
class Block:
    """A weighted layer with what follows it (norm, activation, pooling, dropout) up to the next.

    shape: after the block, channels first; parameters: trainable numbers in it.
    """

    kind: str
    title: str
    details: tuple[str, ...]
    shape: Shape
    parameters: int


_OPENS = (
    Conv
    | Dense
    | Readout
    | Upsample
    | Recurrent
    | Take
    | Embedding
    | GraphConv
    | MessagePassing
    | CFConv
    | GraphReadout
    | Residual
    | Parallel
)


def blocks(spec: NetworkSpec) -> list[Block]:
    """The network as its readers think of it: input, blocks, linear head."""
    standardized = ("standardized",) if spec.standardize else ()
    found = [Block("input", "Input", standardized, spec.input_shape, 0)]
    before = spec.enters
    for layer, after in zip(spec.layers, shapes(spec), strict=True):
        weights, _ = layer_weights(layer, before, after)
        last = found[-1]
        if isinstance(layer, _OPENS) or last.kind == "input":
            title, inside = layer_text(layer, before), tuple(inner_texts(layer, before))
            found.append(Block(layer.kind, title, inside, after, weights))
        else:
            details = (*last.details, layer_text(layer, before))
            total = last.parameters + weights
            found[-1] = Block(last.kind, last.title, details, after, total)
        before = after
    head = cost(spec).parameters - sum(block.parameters for block in found)
    shape = (spec.outputs, *before[1:]) if spec.map_output else (spec.outputs,)
    return [*found, Block("head", "Linear output", (), shape, head)]


def layer_text(layer: Layer, before: Shape) -> str:
    """One layer in a few words; `before` is the shape that it receives."""
    axes = len(before) - 1
    match layer:
        case Conv():
            stride = f", stride {layer.stride}" if layer.stride > 1 else ""
            periodic = ", periodic" if layer.padding == "circular" else ""
            return f"Conv {extent_text((layer.kernel,) * axes)}{stride}{periodic}"
        case Pool():
            return f"{layer.op} pool {layer.size}"
        case Upsample():
            return f"Upsample to {extent_text(layer.size)}"
        case Dense():
            return f"Dense {layer.units:,}"
        case Recurrent():
            both = ", both ways" if layer.bidirectional else ""
            return f"{layer.cell.upper()} {layer.units:,}{both}{', last state' * layer.last}"
        case Residual():
            return "Residual"
        case Parallel():
            return f"Parallel, {layer.merge}"
        case GraphConv() | MessagePassing() | CFConv() | GraphReadout():
            return _graph_text(layer)
        case Readout():
            return "Flatten" if layer.op == "flatten" else "Mean over space"
        case Take():
            return f"Inputs {layer.start + 1:,} to {layer.stop:,}"
        case UnitLength():
            return "unit length"
        case Embedding():
            return f"Embedding {layer.units:,}, {layer.entries:,} entries"
        case Norm():
            return f"{layer.op} norm"
        case Dropout():
            return f"dropout {layer.rate:g}"
        case Activation():
            return layer.function.replace("_", " ")


def _graph_text(layer: GraphConv | MessagePassing | CFConv | GraphReadout) -> str:
    match layer:
        case GraphConv():
            inner = f", {layer.norm} norm inside" if layer.norm else ""
            return f"Graph conv {layer.channels:,}, {layer.op}{inner}"
        case MessagePassing():
            return f"Messages {layer.units:,}, {layer.steps} steps"
        case CFConv():
            return f"Continuous-filter conv {layer.channels:,}, {layer.filters:,} filters"
        case GraphReadout():
            return f"{layer.op.capitalize()} over nodes"


def inner_texts(layer: Layer, before: Shape) -> list[str]:
    """The layers inside a layer, a line each; branches are marked by their first lines."""
    match layer:
        case Residual():
            return _row_texts(layer.layers, before)
        case Parallel():
            rows = [_row_texts(branch, before) or ["as it is"] for branch in layer.branches]
            return [f"{'| ' if not i else ''}{line}" for row in rows for i, line in enumerate(row)]
        case _:
            return []


def _row_texts(layers: Sequence[Layer], before: Shape) -> list[str]:
    texts: list[str] = []
    for layer, after in zip(layers, shapes_after(layers, before), strict=True):
        texts += [layer_text(layer, before), *inner_texts(layer, before)]
        before = after
    return texts


def extent_text(extent: Sequence[int]) -> str:
    """3³, 7², 5, or 3×5×7."""
    if len(set(extent)) > 1:
        return "×".join(str(n) for n in extent)
    return f"{extent[0]}{ {1: '', 2: '²', 3: '³'}.get(len(extent), f'^{len(extent)}') }"


def shape_text(shape: Shape) -> str:
    """``32 × 21³`` for 32 channels on 21³ voxels; ``2,048`` for a vector."""
    return f"{shape[0]} × {extent_text(shape[1:])}" if len(shape) > 1 else f"{shape[0]:,}"


_CELL, _DRAWN, _LINE = 112, 112, 15
_FILL = {
    "input": "muted",
    "conv": "network",
    "readout": "muted",
    "upsample": "network",
    "residual": "network",
    "parallel": "network",
    "recurrent": "crossover",
    "dense": "founder",
    "head": "mutation",
}


def network_drawing(spec: NetworkSpec) -> str:
    """Feature maps as boxes (faces: space, thickness: channels), vectors as bars, left to right."""
    drawn = blocks(spec)
    texts = [(*b.title.split(", "), *b.details) for b in drawn]  # a cell is narrow
    row_height = _DRAWN + _LINE * (3 + max(len(text) for text in texts)) + 8
    columns = WIDTH // _CELL
    widest = max([max(b.shape[1:]) for b in drawn if len(b.shape) > 1], default=1)
    longest = max([b.shape[0] for b in drawn if len(b.shape) == 1], default=1)
    parts = []
    for i, (block, text) in enumerate(zip(drawn, texts, strict=True)):
        x = (i % columns) * _CELL + _CELL / 2
        y = (i // columns) * row_height
        parts.append(_solid(block, x, y + _DRAWN / 2, widest, longest))
        if i + 1 < len(drawn):
            parts.append(_text(x + _CELL / 2, y + _DRAWN / 2 + 4, "→", "muted", 15))
        y += _DRAWN + _LINE
        for j, line in enumerate(text):
            parts.append(_text(x, y + j * _LINE, line, "muted" if j else "ink", 12, bold=not j))
        y += len(text) * _LINE
        if block.kind != "dense":  # its title says it
            parts.append(_text(x, y, shape_text(block.shape), "ink", 12))
            y += _LINE
        if block.parameters:
            parts.append(_text(x, y, f"{compact(block.parameters)} weights", "muted", 11))
    height = row_height * math.ceil(len(drawn) / columns)
    label = f"Layers of the network: {len(drawn)} blocks from input to output"
    return _svg(min(columns, len(drawn)) * _CELL, height, label, parts)


def _solid(block: Block, x: float, y: float, widest: int, longest: int) -> str:
    """The block's output, centred at (x, y): a box for a map, a bar for a vector."""
    paint = f'fill="var(--{_FILL.get(block.kind, "muted")})" stroke="var(--paper)"'
    if len(block.shape) == 1:
        height = 8 + 84 * math.log1p(block.shape[0]) / math.log1p(longest)
        return (
            f'<rect x="{x - 6:.1f}" y="{y - height / 2:.1f}" width="12" height="{height:.1f}" '
            f'rx="2" {paint}/>'
        )
    side = 8 + 62 * max(block.shape[1:]) / widest
    width, slant = 3 + 4 * math.log2(block.shape[0] + 1), 0.36 * side
    left, top = x - (width + slant) / 2, y - (side - slant) / 2
    right, bottom = left + width, top + side
    faces = [
        (0.95, [(left, top), (right, top), (right, bottom), (left, bottom)]),
        (
            0.6,
            [(left, top), (left + slant, top - slant), (right + slant, top - slant), (right, top)],
        ),
        (
            0.78,
            [
                (right, top),
                (right + slant, top - slant),
                (right + slant, bottom - slant),
                (right, bottom),
            ],
        ),
    ]
    return "".join(
        f'<polygon points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}" '
        f'{paint} fill-opacity="{opacity}"/>'
        for opacity, corners in faces
    )


_NODE_WIDTH, _NODE_HEIGHT, _COLUMN, _ROW = 112, 40, 130, 52
GENERATIONS = 6
MOST_PER_GENERATION = 9


def genealogy(search: Search, winner: int) -> str:
    """Ancestors of the winner, the oldest left; within a generation the fittest on top."""
    generations = ancestors(search, winner, GENERATIONS)
    shown = {level: trials[:MOST_PER_GENERATION] for level, trials in generations.items()}
    tallest, oldest = max(len(trials) for trials in shown.values()), max(shown)
    place: dict[int, tuple[float, float]] = {}
    parts: list[str] = []
    for level, trials in shown.items():
        x = (oldest - level) * _COLUMN + 4.0
        y = 4 + (tallest - len(trials)) * _ROW / 2
        place.update({trial.id: (x, y + i * _ROW) for i, trial in enumerate(trials)})
        hidden = len(generations[level]) - len(trials)
        if hidden:
            below = y + len(trials) * _ROW + 8
            parts.append(_text(x + _NODE_WIDTH / 2, below, f"+ {hidden} more", "muted", 11))
    for key in place:
        for parent in known_parents(search, search.trials[key]):
            if parent.id in place and place[parent.id][0] < place[key][0]:
                parts.append(_link(place[parent.id], place[key]))
    for key, (x, y) in place.items():
        parts.append(_node(search, key, x, y, is_winner=key == winner))
    width = oldest * _COLUMN + _NODE_WIDTH + 8
    of = f"{len(place)} networks in {oldest + 1} generations"
    label = f"Ancestors of evaluation {search.name(winner)}: {of}"
    return _svg(width, tallest * _ROW + 16, label, parts)


def _node(search: Search, key: int, x: float, y: float, *, is_winner: bool) -> str:
    trial, name = search.trials[key], search.name(key)
    colour = origin_colour(trial.origin)
    stroke = 3 if is_winner else 1.4
    return (
        f"<g><title>{escape(f'evaluation {name}: {trial.origin}, fitness {trial.fitness}')}</title>"
        f'<rect x="{x}" y="{y}" width="{_NODE_WIDTH}" height="{_NODE_HEIGHT}" rx="7" '
        f'fill="var(--paper)" stroke="var(--{colour})" stroke-width="{stroke}"/>'
        + _text(x + _NODE_WIDTH / 2, y + 17, f"#{name} {trial.origin}", colour, 11, bold=True)
        + _text(x + _NODE_WIDTH / 2, y + 32, number(trial.fitness, 4), "ink", 12)
        + "</g>"
    )


def _link(parent: tuple[float, float], child: tuple[float, float]) -> str:
    x0, y0 = parent[0] + _NODE_WIDTH, parent[1] + _NODE_HEIGHT / 2
    x1, y1 = child[0], child[1] + _NODE_HEIGHT / 2
    bend = (x1 - x0) / 2
    return (
        f'<path d="M{x0},{y0}C{x0 + bend},{y0} {x1 - bend},{y1} {x1},{y1}" '
        'fill="none" stroke="var(--muted)" stroke-opacity="0.6" stroke-width="1.3"/>'
    )


def _text(x: float, y: float, text: str, colour: str, size: int, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{weight} fill="var(--{colour})" '
        f'text-anchor="middle">{escape(text)}</text>'
    )


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    """An SVG no wider on the page than it was drawn: its text keeps its size."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" '
        f'aria-label="{escape(label)}"><title>{escape(label)}</title>{"".join(parts)}</svg>'
    )
