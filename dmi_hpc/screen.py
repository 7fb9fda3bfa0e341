"""A training as a few lines of text: pieces of a reading, and the display that rich draws of them."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dmi_hpc.meters import Reading

BAR_WIDTH, LEAST_BAR = 40, 8  # characters
GAP = "  "
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


class Screen:
    """Renderable state of a training. Its fields may be replaced while rich's thread draws it."""

    def __init__(self, epochs: int) -> None:
        self.reading: Reading | None = None
        self.scores: tuple[str, ...] = ()
        self._epochs, self._started = epochs, time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        reading, passed = self.reading, duration(time.monotonic() - self._started)
        if reading is None:
            yield Text(f"starting{GAP}{passed}")
            return
        left = f"epoch {reading.epoch + 1}/{self._epochs}"
        right = [f"step {reading.step:,}/{reading.steps_per_epoch:,}", passed]
        if reading.left_s is not None:
            right.append(f"{duration(reading.left_s)} left")
        yield self._bar(reading, left, GAP.join(right), options.max_width)
        # scores stand on their own line, so that the others do not move when they come
        for group in (pieces(reading), self.scores):
            for line in wrapped(group, options.max_width):
                yield Text(line, no_wrap=True, overflow="ellipsis")

    def _bar(self, reading: Reading, left: str, right: str, width: int) -> Table:
        row: list[Text | ProgressBar] = [Text(left, no_wrap=True), Text(right, no_wrap=True)]
        bar = min(BAR_WIDTH, width - len(left) - len(right) - 2 * len(GAP))
        if bar >= LEAST_BAR:
            row.insert(1, ProgressBar(self._epochs, reading.progress, width=bar))
        grid = Table.grid(padding=(0, len(GAP), 0, 0))
        grid.add_row(*row)
        return grid


def pieces(reading: Reading) -> tuple[str, ...]:
    """What a reading says besides its place: loss first; what is not known is left out."""
    found = [f"loss {reading.loss:.4g}"]
    found += rate_pieces(reading.samples_per_s, reading.data_wait)
    if reading.flops:
        share = f" ({percent(reading.mfu)} of peak)" if reading.mfu is not None else ""
        found.append(f"{scaled(reading.flops)}FLOP/s{share}")
    found.append(f"learning rate {reading.learning_rate:.3g}")
    if reading.gradient_norm is not None:
        found.append(f"gradient norm {reading.gradient_norm:.3g}")
    if reading.noise_scale is not None:
        found.append(f"noise scale {reading.noise_scale:,.0f}")
    if reading.skipped:
        found.append(f"{reading.skipped:,} steps skipped")
    return tuple(found)


def rate_pieces(samples_per_s: float | None, data_wait: float | None) -> tuple[str, ...]:
    """Samples a second, and the share of the time (0 .. 1) spent waiting for data."""
    found = []
    if samples_per_s is not None:
        digits = 0 if samples_per_s >= 10 else 2
        found.append(f"{samples_per_s:,.{digits}f} samples/s")
    if data_wait is not None:
        found.append(f"data wait {percent(data_wait)}")
    return tuple(found)


def percent(share: float) -> str:
    """0.1234 -> "12%", 0.0123 -> "1.2%"."""
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}"


def scaled(value: float) -> str:
    """Three digits and an SI prefix for a unit to follow: 1.21e12 -> "1.21 T"."""
    power = 0
    while value >= 999.5 and power < len(_PREFIXES) - 1:
        value, power = value / 1000, power + 1
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_PREFIXES[power]}"


def duration(seconds: float) -> str:
    """0:08:20, or "2 days, 1:00:00"."""
    return str(timedelta(seconds=round(seconds)))


def wrapped(group: tuple[str, ...], width: int) -> list[str]:
    """Lines of at most `width` characters, broken between the pieces (a longer one stands alone)."""
    lines: list[str] = []
    for piece in group:
        if lines and len(lines[-1]) + len(GAP) + len(piece) <= width:
            lines[-1] += GAP + piece
        else:
            lines.append(piece)
    return lines
