"""What all charts share: inline SVG whose colours are CSS variables, so that a page restyles them.

Matplotlib writes ``figure`` colours as hexadecimal; each colour of ``LIGHT`` is unique and becomes
``var(--name)`` afterwards. No state outlives a call, and equal data give equal bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

LIGHT = {
    "ink": "#1d2530",
    "muted": "#667080",
    "grid": "#dfe3e9",
    "network": "#0b6bb5",
    "baseline": "#dd8a2e",
    "founder": "#7b52ab",
    "random": "#98a1ad",
    "mutation": "#169b78",
    "crossover": "#2f86d6",
    "incumbent": "#c9a227",
    "climb": "#b3478f",
    "failed": "#c8383f",
}
DARK = {
    "ink": "#e4e8ee",
    "muted": "#98a3b3",
    "grid": "#313a47",
    "network": "#5fb4f5",
    "baseline": "#eda85a",
    "founder": "#b494e0",
    "random": "#7f8a99",
    "mutation": "#4cc9a4",
    "crossover": "#7db8f2",
    "incumbent": "#e0c25a",
    "climb": "#e292c8",
    "failed": "#f0757b",
}
ORIGINS = ("founder", "random", "mutation", "crossover", "incumbent", "climb")

# Beyond this many points a scatter is stored as a bitmap: the page stays small.
MOST_VECTOR_POINTS = 2500
_STYLE: dict[str, Any] = {
    "font.size": 12,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
ABOVE: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 8}
ABOVE_LEFT: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderpad": 0.1}
_NO_METADATA: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def origin_colour(origin: str) -> str:
    return origin if origin in ORIGINS else "muted"


def chart(name: str, label: str, size: tuple[int, int], draw: Callable[[Figure], None]) -> str:
    """Draw on a new figure of `size` (CSS pixels); `name` keeps its element ids apart."""
    text = io.StringIO()
    with mpl.rc_context(), warnings.catch_warnings():
        # The browser draws the text; matplotlib only measures it and may lack the glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        mpl.rcdefaults()  # not the user's matplotlibrc
        style: Any = _STYLE | {"svg.hashsalt": name}
        mpl.rcParams.update(style)
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        draw(figure)
        figure.savefig(text, format="svg", transparent=True, metadata=_NO_METADATA)
    return _inline(text.getvalue(), label)


def _inline(svg: str, label: str) -> str:
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None
    body = svg[svg.index("<defs>") :]
    body = re.sub(r'<g id="[^"]*"(/?)>', r"<g\1>", body)  # numbered anew in each chart
    for name, colour in LIGHT.items():
        body = body.replace(colour, f"var(--{name})")
    return (
        f'<svg viewBox="{box.group(1)}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{body}"
    )


def log_scale(axes: Axes, name: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers: 0.2, 0.5, 1, 2 ..."""
    axes.set(**{f"{name}scale": "log"})
    axis = axes.xaxis if name == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)))
    axis.set_major_formatter(tick)
    axis.set_minor_formatter(NullFormatter())


def tick(value: float, _position: float | None) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def wide(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis shows these better."""
    finite = [value for value in values if math.isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) > 5 * min(finite)


def limits(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def plain(text: str) -> str:
    """Text that matplotlib takes neither for a formula nor, in a legend, for a hidden entry."""
    return text.replace("$", r"\$").lstrip("_")
