"""Numbers and durations as people read them."""

from __future__ import annotations

import math

MISSING = "–"


def number(value: float | int | None, digits: int = 3) -> str:
    """`digits` significant digits, thousands separated; whole numbers as they are."""
    if value is None or not math.isfinite(value):
        return MISSING
    if isinstance(value, int) or (abs(value) >= 10**digits and abs(value) < 1e9):
        return f"{value:,.0f}".replace("-", "−")
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e9:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}×10{_superscript(int(exponent))}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def compact(count: float | int | None) -> str:
    """A count with a unit prefix: 950, 12.3 k, 3.81 M."""
    if count is None or not math.isfinite(count):
        return MISSING
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(count) >= limit:
            return f"{count / limit:.3g}{unit}"
    return f"{count:.3g}"


def duration(seconds: float | None) -> str:
    """0.05 s, 12.3 s, 4 min 05 s, 2 h 10 min."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 100:
        return f"{number(seconds, 2 if seconds < 10 else 3)} s"
    if seconds < 6000:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _superscript(exponent: int) -> str:
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
